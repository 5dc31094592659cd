"""Going through a pipeline, with steps that only say that they were done: order, marks, changes, options, budget, readings."""

import json
import logging
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from t2ilib.config import ConfigError
from t2ilib.pipeline import running
from t2ilib.pipeline.job import Options
from t2ilib.pipeline.running import run_pipeline
from t2ilib.pipeline.steps import STEPS, Step
from t2ilib.tracking.ending import Stopped

EVERYTHING = ["download", "process a", "process b", "train a", "train b", "measure a", "measure b", "draw"]


@pytest.fixture
def done(monkeypatch) -> list[str]:
    """What was done, in order; a step depends on its section of the file, and gives what `GIVES` says."""
    happened: list[str] = []

    def fake(name: str, real: Step) -> Step:
        def do(job):
            told = name if job.name is None else f"{name} {job.name}"
            happened.append(told)
            if told in FAILS:
                raise FAILS[told]
            return GIVES.get(told, told)

        section = {"download": "download", "draw": "draw"}.get(name)

        def depends(job):
            fields = {"process": "data", "train": "training", "measure": "evaluation"}
            return str(getattr(job.pipeline, section) if section else getattr(job.run, fields[name]))

        return Step(depends, lambda job: iter([f"will do {name}"]), do, lambda job: name not in GONE, real.each)

    GIVES.clear(), FAILS.clear(), GONE.clear()
    monkeypatch.setattr(running, "release", lambda: None)  # among all that the tests have loaded it takes its time
    monkeypatch.setattr(running, "STEPS", {name: fake(name, real) for name, real in STEPS.items()})
    return happened


GIVES: dict[str, object] = {}
FAILS: dict[str, BaseException] = {}
GONE: set[str] = set()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    values = {
        "output": str(tmp_path / "out"),
        "download": {"folder": str(tmp_path / "coco")},
        "run": {"adapter": {}},
        "variants": {"a": {}, "b": {"data": {"captions": ["lower"]}}},
    }
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_everything_is_done_once_in_its_order(done, file, caplog) -> None:
    with caplog.at_level(logging.INFO):
        assert run_pipeline(file) == {"a": "measure a", "b": "measure b"}
        assert done == EVERYTHING
        assert "[4/8] train a" in caplog.text
        assert caplog.text.index("will do train") < caplog.text.index("memory at before_train")
        done.clear()
        run_pipeline(file)
    assert done == []
    assert "[4/8] train a: done already" in caplog.text
    text = (file.parent / "out" / "pipeline.log").read_text()
    assert "memory at after_draw: process" in text
    assert "disk free" in text


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ("draw.seed=3", ["draw"]),
        ("run.evaluation.guidance_scale=2.0", ["measure a", "measure b", "draw"]),
        ("run.training.steps=9", ["train a", "train b", "measure a", "measure b", "draw"]),
        ("variants.b.training.steps=9", ["train b", "measure b", "draw"]),
        ("variants.b.data.captions=[drop_adverbs]", ["process b", "train b", "measure b", "draw"]),
        ("download.parts=[val]", EVERYTHING),
        ("run.tracking.tags.who=me", []),
    ],
)
def test_what_has_changed_is_done_anew_with_all_that_follows(done, file, change: str, again: list[str]) -> None:
    if "variants.b.training" in change:
        file.write_text(file.read_text().replace("  b:", "  b:\n    training: {}"))
    run_pipeline(file)
    done.clear()
    run_pipeline(file, [change])
    assert done == again
    done.clear()
    run_pipeline(file, [change])
    assert done == []


def test_what_a_step_gives_counts_too(done, file) -> None:
    """Other bytes came from the same server: what was made of the old ones is made anew."""
    run_pipeline(file)
    done.clear()
    GIVES["download"] = "other bytes"
    run_pipeline(file, options=Options(force_extract=True))
    assert done == EVERYTHING
    done.clear()
    run_pipeline(file, options=Options(force_extract=True))
    assert done == ["download"], "which is asked for, and gave the same"


def test_what_is_gone_is_made_again(done, file) -> None:
    run_pipeline(file)
    done.clear()
    GONE.add("process")
    run_pipeline(file)
    assert done == ["process a", "process b"], "the others have what came of it"


def test_what_failed_is_begun_with_again(done, file) -> None:
    FAILS["train b"] = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        run_pipeline(file)
    assert done == EVERYTHING[:5]
    assert "RuntimeError: a bug" in (file.parent / "out" / "pipeline.log").read_text()
    done.clear()
    FAILS.clear()
    run_pipeline(file)
    assert done == EVERYTHING[4:]


@pytest.mark.parametrize(
    ("only", "begin", "meant"),
    [("process", None, ["process a", "process b"]), (None, "measure", EVERYTHING[5:]), ("draw", None, ["draw"])],
)
def test_only_and_from(done, file, only, begin, meant) -> None:
    run_pipeline(file, only=only, begin=begin)
    assert done == meant
    done.clear()
    run_pipeline(file, only=only, begin=begin)
    assert done == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"only": "dowload"},
            "--only: the step 'dowload' does not exist; choose from download, .* Did you mean 'download'",
        ),
        ({"only": "train", "begin": "draw"}, "both say where to begin"),
        ({"only": "train", "options": Options(skip_download=True)}, "--skip-download is about the step download"),
        ({"only": "train", "options": Options(prompts=("a heart",))}, "--prompt is about the step draw"),
        ({"begin": "measure", "options": Options(force_extract=True)}, "--force-extract is about the step download"),
    ],
)
def test_options_that_mean_nothing_are_refused(done, file, options, says) -> None:
    with pytest.raises(ConfigError, match=says):
        run_pipeline(file, **options)
    assert done == []
    assert not (file.parent / "out").exists()


def test_a_step_that_the_file_does_not_name(done, file) -> None:
    file.write_text(file.read_text() + "steps: [download, train]\n")
    with pytest.raises(ConfigError, match="--from draw: this file's steps are download, train"):
        run_pipeline(file, begin="draw")
    run_pipeline(file)
    assert done == ["download", "train a", "train b"]


def test_a_dry_run_tells_and_does_nothing(done, file, capsys) -> None:
    run_pipeline(file, options=Options(dry=True))
    assert done == []
    assert not (file.parent / "out").exists()
    told = capsys.readouterr().out
    assert told.splitlines()[:2] == ["[1/8] download:", "  will do download"]
    run_pipeline(file, only="download")
    capsys.readouterr()
    run_pipeline(file, options=Options(dry=True))
    assert capsys.readouterr().out.startswith("[1/8] download: done already, 2")


def test_two_processes_do_not_go_through_one(done, file) -> None:
    (file.parent / "out").mkdir()
    with FileLock(file.parent / "out" / ".lock"), pytest.raises(ConfigError, match="another process goes through"):
        run_pipeline(file)
    assert done == []


def test_one_budget_for_all_that_a_command_does(done, file, monkeypatch) -> None:
    """A clock that goes a minute a step: the second training is told what is left, and before the third step's end it is spent."""
    clock, left = [0.0], {}
    real = dict(running.STEPS)

    def timed(name: str, step: Step) -> Step:
        def do(job):
            left[f"{name} {job.name}"] = job.seconds_left
            clock[0] += 60.0
            return step.do(job)

        return Step(step.depends, step.needs, do, step.made, step.each)

    monkeypatch.setattr(running, "STEPS", {name: timed(name, step) for name, step in real.items()})
    monkeypatch.setattr(running.time, "monotonic", lambda: clock[0])
    with pytest.raises(Stopped, match="time_budget is spent before measure a; the same command goes on") as error:
        run_pipeline(file, ["run.training.time_budget=5m"])
    assert error.value.code == 75
    assert (left["train a"], left["train b"]) == (120.0, 60.0)
    assert done == EVERYTHING[:5]
    done.clear()
    run_pipeline(file, ["run.training.time_budget=5m"])
    assert done == EVERYTHING[5:]


def test_readings_go_to_the_runs_that_mlflow_knows(done, file, monkeypatch) -> None:
    """Each run hears of its own steps, and of those that are done once."""
    logged: dict[str, dict[str, float]] = {}

    class Tracker:
        def __init__(self, run, results):
            self.run = run

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def log_metrics(self, values, step):
            logged.setdefault(self.run.name, {}).update(values)

    monkeypatch.setattr(running, "open_tracker", Tracker)
    out = file.parent / "out"
    for name in ("a", "b"):
        (out / name).mkdir(parents=True)
    (out / "b" / "tracking.json").write_text(json.dumps({}))
    run_pipeline(file, ["run.tracking.experiment=x"])
    assert list(logged) == ["b"], "of a there is no MLflow run"
    moments = {name.split("/")[1] for name in logged["b"]}
    assert moments == {f"{when}_{step}" for when in ("before", "after") for step in STEPS}
    assert {"disk_free_mib", "system_available_mib", "process_mib"} <= {name.split("/")[2] for name in logged["b"]}


def test_under_a_launcher_it_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="gone through by one process"):
        running.require_one_process()
