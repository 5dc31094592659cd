"""What single pictures measured: means of a run are over its rows, and rows of other steps stay."""

import json

import pytest
from safetensors.torch import load_file
from small_runs import BRIEF

from t2ilib.adapters.load import adapter_file
from t2ilib.config import ConfigError
from t2ilib.evaluation.measures import measure
from t2ilib.evaluation.rows import ROWS, Row, read_rows, split, write_rows
from t2ilib.runfile import build_run, merge
from t2ilib.training.loop import train


def test_metrics_are_means_over_the_pictures_that_they_are_about() -> None:
    values = {"all": [1.0, 0.0, 1.0], "heart": [1.0, None, 0.0], "nobody": [None, None, None], "chance": 0.25}
    means, rows = split(values, 30, "concept", ["a", "b", "ü"])
    assert means == {"all": pytest.approx(2 / 3), "heart": 0.5, "chance": 0.25}
    assert [row.values for row in rows] == [{"all": 1.0, "heart": 1.0}, {"all": 0.0}, {"all": 1.0, "heart": 0.0}]
    assert [(row.step, row.group, row.number, row.prompt) for row in rows] == [
        (30, "concept", i, p) for i, p in enumerate("abü")
    ]


def test_a_list_that_is_not_one_value_a_picture_is_told() -> None:
    with pytest.raises(ConfigError, match="all has 2 values for 3 pictures"):
        split({"all": [1.0, 0.0]}, 0, "concept", ["a", "b", "c"])


def test_measuring_again_replaces_the_rows_of_its_step_alone(tmp_path) -> None:
    assert list(read_rows(tmp_path)) == []
    late, early = Row(60, "g", 0, "ü", {"all": 1.0}), Row(30, "g", 0, "ü", {"all": 0.5})
    write_rows(tmp_path, [late])
    write_rows(tmp_path, [early])
    write_rows(tmp_path, [Row(60, "g", 0, "ü", {"all": 0.0})])
    assert list(read_rows(tmp_path)) == [early, Row(60, "g", 0, "ü", {"all": 0.0})]


def test_a_line_that_is_no_row_is_named(tmp_path) -> None:
    (tmp_path / ROWS).write_text(json.dumps({"step": 1}) + "\n")
    with pytest.raises(ConfigError, match=r"rows.jsonl, line 1 is no row"):
        list(read_rows(tmp_path))


def test_the_same_seed_twice_gives_the_same_bits(tmp_path) -> None:
    """On a CPU: rows of single pictures, losses, what was learned; only what the machine itself did differs."""
    found = []
    for name in ("once", "again"):
        sections = {"name": name, "output": str(tmp_path / name), "adapter": {"rank": 2}, "seed": 3}
        run = build_run(merge(BRIEF, sections | {"shapes": {"checked_prompts": 3}}))
        trained = train(run)
        measured = measure(run, trained.components, metrics=trained.metrics)
        weights = {key: value.numpy().tobytes() for key, value in load_file(adapter_file(run.output)).items()}
        machines = ("memory", "second", "peak", "data_wait")
        of_the_run = {key: value for key, value in measured.items() if not any(part in key for part in machines)}
        found.append((of_the_run, (run.output / ROWS).read_bytes(), weights))
    assert found[0][0].keys() >= {"concept/all", "held_out_loss", "clip_score/base_kept"}
    assert found[0] == found[1]
