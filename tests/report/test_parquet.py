"""A study's rows in one file, from which alone the report is made again to the byte."""

import json
import shutil
from dataclasses import fields

import pytest
from reporting import write_study

from t2ilib.config import ConfigError
from t2ilib.evaluation.rows import Row, write_rows
from t2ilib.report import compare, load_report, write_markdown
from t2ilib.report.parquet import ROWS, read_parquet, write_parquet


@pytest.fixture
def study(tmp_path):
    """Four seeds, with rows of single pictures, a run that did not finish, margins and claims."""
    folder = write_study(
        tmp_path / "study",
        range(4),
        margins={"concept/learned": 0.05},
        claims={"dora": [{"metric": "concept/learned", "is": "better"}]},
    )
    for place in folder.glob("*/seed*"):
        learned = json.loads((place / "result.json").read_text())["metrics"]["concept/learned"]
        rows = [
            Row(100, "concept", i, f"prompt {i}, ü", {"concept/learned": learned + 0.01 * (i - 1.5)}) for i in range(4)
        ]
        write_rows(place, [Row(50, "concept", 0, "prompt 0, ü", {"concept/learned": 0.5}), *rows])
    (folder / "qlora" / "seed3" / "result.json").unlink()
    return folder


def test_the_report_is_made_again_from_the_rows_alone_to_the_byte(study, tmp_path) -> None:
    write_markdown(load_report(study), study)
    alone = tmp_path / "elsewhere" / "study"
    alone.mkdir(parents=True)
    shutil.copy(study / ROWS, alone / ROWS)
    write_markdown(load_report(alone), alone)
    made = {path.name: path.read_bytes() for path in study.iterdir() if path.suffix in (".md", ".png")}
    assert {"report.md", "pictures.png", "learned_kept.png", "curves.png", "cost_quality.png"} <= made.keys()
    assert {name: (alone / name).read_bytes() for name in made} == made
    assert (alone / ROWS).read_bytes() == (study / ROWS).read_bytes()
    assert not list(study.glob("*.part"))


def test_nothing_is_lost_between_folders_and_file(study, tmp_path) -> None:
    written = load_report(study)
    read = read_parquet(write_parquet(written, tmp_path / "rows.parquet"))
    for field in fields(written):
        if field.name not in ("folder", "runs"):
            assert getattr(read, field.name) == getattr(written, field.name), field.name
    assert list(read.runs) == list(written.runs)
    for place, run in written.runs.items():
        again = read.runs[place]
        assert dict(again.metrics) == dict(run.metrics)
        assert list(again.metrics) == list(run.metrics)
        assert (again.rows, again.pictures, again.settings) == (run.rows, run.pictures, run.settings)
        assert again.declared == run.declared
        assert again.history == {name: curve for name, curve in run.history.items() if name in run.declared}
    assert compare(read, "concept/learned") == compare(written, "concept/learned")


def test_single_pictures_give_intervals_over_prompts(study) -> None:
    report = load_report(study)
    crossed = compare(report, "concept/learned")["dora"].crossed
    assert crossed.num_prompts == 4
    assert crossed.pairing.correlation == pytest.approx(1.0)
    assert report.runs["dora", 0].by_prompt("concept/learned").keys() == {("concept", i) for i in range(4)}, (
        "of the last step"
    )


def test_what_is_no_such_file_is_told(tmp_path) -> None:
    (tmp_path / ROWS).write_text("nothing")
    with pytest.raises(ConfigError, match=r"rows.parquet is no file of a study's rows"):
        load_report(tmp_path)
