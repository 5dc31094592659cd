"""Where a run begins: what is taken, what is refused, what is set aside, and that nothing is lost or mixed."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from t2ilib.config import ConfigError, RunConfig
from t2ilib.runfile import build_run, save_run
from t2ilib.tracking.mlflow_run import FORKED
from t2ilib.tracking.tracker import NullTracker, open_tracker
from t2ilib.training.checkpoint import Checkpoint, CheckpointError, list_checkpoints, save_checkpoint
from t2ilib.training.history import read_rows
from t2ilib.training.loop import train
from t2ilib.training.resume import digest_of, find_beginning


def make_run(output: Path, **changes) -> RunConfig:
    values = {
        "output": str(output),
        "model": {"base": "tiny-sd15"},
        "adapter": {"rank": 2, "alpha": 2.0, "dropout": 0.3},
        "data": {"source": "shapes"},
        "shapes": {"scenes": ["heart"], "num_pictures": 6},
        "training": {"steps": 6, "batch_size": 2, "checkpoint_every": 2, "keep_checkpoints": 3},
        "evaluation": {"validate_every": 0, "validation_timesteps": 1, "prompts": ["a heart"], "num_inference_steps": 1}
        | {"sample_every": 2},
    }
    for address, value in changes.items():
        section, _, field = address.partition("__")
        values.setdefault(section, {})[field] = value
    return build_run(values)


def pretend(run: RunConfig, *steps: int) -> Path:
    """A folder as `run` leaves it, whose weights are the number of the step."""
    for step in steps:
        tensors = {"weights": {"a": torch.full((300,), float(step))}, "optimizer": {"0.m": torch.zeros(9)}}
        save_checkpoint(
            run.output / "checkpoints", Checkpoint(step, tensors, {"digest": digest_of(run), "data": "d"}), 9
        )
        (run.output / "samples" / f"step-{step:06d}").mkdir(parents=True)
        (run.output / "samples" / f"step-{step:06d}" / "00.png").write_text(str(step))
        (run.output / "samples" / f"grid-{step:06d}.png").write_text(str(step))
    (run.output / "samples" / "prompts.json").write_text("[]")
    rows = [{"step": step, "loss": step / 10} for step in range(1, max(steps) + 1)]
    (run.output / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run.output / "adapter").mkdir()
    (run.output / "notes.txt").write_text("mine")
    save_run(run, run.output / "run.yaml")
    return run.output


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def harm(path: Path, how: str) -> None:
    weights, meta, manifest = path / "weights.safetensors", path / "meta.json", path / "manifest.json"
    flipped = bytearray(weights.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    listed = json.loads(manifest.read_text())
    {
        "flipped weights": lambda: weights.write_bytes(flipped),
        "cut weights": lambda: weights.write_bytes(flipped[:-1]),
        "no weights": weights.unlink,
        "empty optimizer": lambda: (path / "optimizer.safetensors").write_bytes(b""),
        "no meta": meta.unlink,
        "broken meta": lambda: meta.write_text('{"step": '),
        "other meta": lambda: meta.write_text(meta.read_text().replace('"step": 6', '"step": 7')),
        "no manifest": manifest.unlink,
        "broken manifest": lambda: manifest.write_text('{"meta.json": "'),
        "empty manifest": lambda: manifest.write_bytes(b""),
        "a manifest of nothing": lambda: manifest.write_text("{}"),
        "a manifest of one file": lambda: manifest.write_text(json.dumps({"meta.json": listed["meta.json"]})),
        "a manifest that is none": lambda: manifest.write_text("17"),
        "a manifest of bytes": lambda: manifest.write_bytes(b"\xff\xfe\x00"),
        "a file in its place": lambda: (shutil.rmtree(path), path.write_text("")),
        "a folder in a file's place": lambda: (weights.unlink(), weights.mkdir()),
    }[how]()


HARMS = (
    *(
        "flipped weights",
        "cut weights",
        "no weights",
        "empty optimizer",
        "no meta",
        "broken meta",
        "other meta",
        "no manifest",
    ),
    *(
        "broken manifest",
        "empty manifest",
        "a manifest of nothing",
        "a manifest of one file",
        "a manifest that is none",
    ),
    *("a manifest of bytes", "a file in its place", "a folder in a file's place"),
)


@pytest.mark.parametrize("how", HARMS)
def test_of_a_damaged_checkpoint_the_one_before_is_taken_and_it_is_said(tmp_path: Path, how: str, caplog) -> None:
    """And the damaged one no longer counts among those that are kept: the next one that is saved stays."""
    run = make_run(tmp_path / "run")
    pretend(run, 2, 4, 6)
    harm(run.output / "checkpoints" / "step-000006", how)
    beginning = find_beginning(run)
    found = beginning.load()
    assert found.step == 4
    assert (found.tensors["weights"]["a"] == 4).all()
    beginning.make_room(4)
    assert "step-000006" in caplog.text
    folder = run.output / "checkpoints"
    assert [path.name for path in list_checkpoints(folder)] == ["step-000002", "step-000004"]
    save_checkpoint(folder, Checkpoint(5, found.tensors, {"digest": digest_of(run)}), keep=1)
    assert [path.name for path in list_checkpoints(folder)] == ["step-000005"]


def test_every_one_damaged_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    pretend(run, 2, 4)
    for path in list_checkpoints(run.output / "checkpoints"):
        harm(path, "broken meta")
    with pytest.raises(CheckpointError, match=r"every checkpoint .* start again with --resume never"):
        find_beginning(run)
    assert find_beginning(run, "never").load() is None


def test_another_run_is_refused_with_what_differs_wherever_it_lies(tmp_path: Path) -> None:
    """Of what decides the steps alone: other prompts, kernels and names are no other run."""
    other = make_run(tmp_path / "other", compute__channels_last=True, evaluation__prompts=["a star"])
    pretend(other, 2, 4)
    before = contents(tmp_path)
    run = make_run(tmp_path / "run", adapter__rank=4, optimizer__learning_rate=0.5)
    for path in (other.output, other.output / "checkpoints", other.output / "checkpoints" / "step-000002"):
        with pytest.raises(
            CheckpointError,
            match=r"holds a run with other settings \(adapter.rank 2 -> 4, optimizer.learning_rate 0.001 -> 0.5\): give its settings",
        ):
            find_beginning(run, path)
    short = make_run(tmp_path / "run", training__steps=3)
    with pytest.raises(CheckpointError, match=r"has taken 4 steps, and training.steps is 3: raise it"):
        find_beginning(short, other.output)
    assert find_beginning(short, other.output / "checkpoints" / "step-000002").load().step == 2
    assert contents(tmp_path) == before
    (other.output / "run.yaml").unlink()
    with pytest.raises(CheckpointError, match="with other settings: give its settings"):
        find_beginning(run, other.output)


def test_a_path_without_a_checkpoint_says_what_there_is(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    pretend(run, 2, 4)
    with pytest.raises(
        ConfigError, match=r"no checkpoint at .*step-000003; beside it there are step-000002, step-000004: give"
    ):
        find_beginning(run, run.output / "checkpoints" / "step-000003")
    with pytest.raises(ConfigError, match=r"no checkpoint at .*elsewhere: give the folder of one"):
        find_beginning(run, str(tmp_path / "elsewhere"))
    harm(run.output / "checkpoints" / "step-000002", "flipped weights")
    with pytest.raises(CheckpointError, match=r"step-000002.weights.safetensors is damaged"):
        find_beginning(run, run.output / "checkpoints" / "step-000002").load()
    harm(run.output / "checkpoints" / "step-000004", "no manifest")
    with pytest.raises(CheckpointError, match="step-000004 is not a committed checkpoint"):
        find_beginning(run, run.output / "checkpoints" / "step-000004")


def test_what_is_left_behind_is_set_aside_whole_and_the_past_of_the_step_takes_its_place(
    tmp_path: Path, caplog
) -> None:
    run = make_run(tmp_path / "run")
    output = pretend(run, 2, 4, 6)
    before = contents(output)
    beginning = find_beginning(run, output / "checkpoints" / "step-000004")
    assert beginning.load().step == 4
    beginning.make_room(4)
    assert f"is now in {output / 'earlier-1'}" in caplog.text
    of_run = {name: data for name, data in before.items() if name != "notes.txt"}
    assert contents(output / "earlier-1") == of_run
    now = {name: data for name, data in contents(output).items() if not name.startswith("earlier-1/")}
    assert now == {
        name: data
        for name, data in before.items()
        if name in ("notes.txt", "metrics.jsonl", "samples/prompts.json")
        or name.startswith(
            ("checkpoints/step-000004", *(f"samples/{kind}-00000{n}" for kind in ("step", "grid") for n in (2, 4)))
        )
    }
    (output / "samples" / "grid-000004.png").write_text(
        "drawn anew"
    )  # in place: what was set aside is no other name of it
    assert contents(output / "earlier-1") == of_run

    anew = find_beginning(run, "never")
    anew.make_room(0)
    assert {path.name for path in output.iterdir()} == {"earlier-1", "earlier-2", "notes.txt"}
    assert find_beginning(run).load() is None
    find_beginning(run, "never").make_room(0)
    assert not (output / "earlier-3").exists()


@pytest.mark.parametrize("resume", ["never", "step"])
def test_a_kill_while_setting_aside_loses_and_mixes_nothing(tmp_path: Path, monkeypatch, resume: str) -> None:
    """Behind every single rename: the next start, whatever it asks for, finds what the whole would have left."""

    class Killed(BaseException):
        pass

    def at_rest(name: str, kill: int | None) -> dict[str, bytes]:
        run = make_run(tmp_path / name / "run")
        output, calls = pretend(run, 2, 4), []
        path = output / "checkpoints" / "step-000002"
        beginning = find_beginning(run, path if resume == "step" else resume)

        def rename(self: Path, target: Path) -> Path:
            calls.append(target)
            if len(calls) == kill:
                raise Killed
            return real(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", rename)
            try:
                beginning.make_room(2)
            except Killed:
                assert kill is not None
        lengths.append(len(calls))
        found = find_beginning(run).load()
        if kill == 1:  # nothing was said yet: as before
            assert found.step == 4
        else:
            assert (found.step if found else 0) == (2 if resume == "step" else 0)
        return {
            name: data
            for name, data in contents(output).items()
            if ".beginning/" not in name and Path(name).name not in ("run.yaml", ".lock")
        }

    real, lengths = Path.rename, []
    whole = at_rest("whole", None)
    assert lengths[0] >= 6
    assert "earlier-1/checkpoints/step-000004/weights.safetensors" in whole
    for kill in range(2, lengths[0] + 1):
        assert at_rest(f"kill-{kill}", kill) == whole, f"killed before rename {kill}"
    assert "checkpoints/step-000004/weights.safetensors" in at_rest("first", 1)


def test_what_is_known_of_a_stream_stays_with_the_run(tmp_path: Path) -> None:
    """The data are opened before the folder is made ready, and what was met of a stream is true of it."""
    run = make_run(tmp_path / "run")
    output = pretend(run, 2)
    for name in ("stream.jsonl", "manifest.csv"):
        (output / name).write_text(name)
    find_beginning(run, "never").make_room(0)
    assert (
        (output / "stream.jsonl").read_text() == (output / "earlier-1" / "stream.jsonl").read_text() == "stream.jsonl"
    )
    assert (output / "manifest.csv").exists()


class Curves(NullTracker):
    def __init__(self) -> None:
        self.points: list[tuple[str, int]] = []

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        self.points += [(name, step) for name in values]


def losses(output: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_rows(output / "metrics.jsonl") if "grad_norm" in row]


def last_bytes(output: Path) -> dict[str, bytes]:
    return contents(output / "checkpoints" / "step-000006")


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """6 steps that nothing disturbed, of a cosine schedule with warm-up."""
    run = make_run(tmp_path_factory.mktemp("straight") / "run", optimizer__schedule="cosine", optimizer__warmup_steps=3)
    train(run)
    return run.output


def again(output: Path) -> RunConfig:
    return make_run(output, optimizer__schedule="cosine", optimizer__warmup_steps=3)


@pytest.mark.parametrize("where", ["own folder", "elsewhere", "a run's folder", "damaged", "never"])
def test_wherever_a_run_begins_it_ends_as_the_straight_one(tmp_path: Path, straight: Path, where: str) -> None:
    """Weights, optimizer, schedule and losses to the bit, with the global generators of another process; every step once in the curves."""
    torch.manual_seed(len(where))
    output = tmp_path / "run"
    if where in ("own folder", "damaged", "never"):
        shutil.copytree(straight, output)
    if where == "damaged":
        for step in (4, 6):
            harm(output / "checkpoints" / f"step-{step:06d}", "flipped weights")
    if where == "a run's folder":
        shutil.copytree(straight / "checkpoints" / "step-000004", tmp_path / "moved" / "checkpoints" / "step-000004")
    resume, begins = {
        "own folder": (output / "checkpoints" / "step-000002", 2),
        "elsewhere": (straight / "checkpoints" / "step-000002", 2),
        "a run's folder": (tmp_path / "moved", 4),
        "damaged": ("latest", 2),
        "never": ("never", 0),
    }[where]
    before, tracker = contents(straight), Curves()
    assert train(again(output), tracker, resume).resumed_from == begins
    assert last_bytes(output) == last_bytes(straight)
    assert contents(straight) == before
    lacking = 4 if where == "a run's folder" else 0  # a checkpoint that lay alone brings no curve along
    assert losses(output) == losses(straight)[lacking:]
    assert [step for name, step in tracker.points if name == "grad_norm"] == [*range(lacking + 1, 7)]
    grids = {path.name: path.read_bytes() for path in (straight / "samples").glob("grid-*.png")}
    grids = {name: data for name, data in grids.items() if not lacking or name >= "grid-000006"}
    assert {path.name for path in (output / "samples").glob("grid-*.png")} == grids.keys()
    if not lacking:
        assert {path.name: path.read_bytes() for path in (output / "samples").glob("grid-*.png")} == grids
    assert (output / "earlier-1").exists() == (where in ("own folder", "never"))


def test_mlflow_has_each_past_once(tmp_path: Path, straight: Path, monkeypatch) -> None:
    """Going on is the same MLflow run, without doubling; going back or beginning anew is another, with its whole curve, and the first
    stays as it was."""
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = make_run(tmp_path / "run", training__steps=4, evaluation__sample_every=0)
    run = run.model_copy(update={"tracking": run.tracking.model_copy(update={"experiment": "resume"})})

    def start(resume: str | Path) -> str:
        with open_tracker(run) as tracker:
            train(run, tracker, resume)
            return tracker.run_id

    def curve(run_id: str) -> list[int]:
        return [metric.step for metric in client.get_metric_history(run_id, "grad_norm")]

    first = start("latest")
    client = MlflowClient(json.loads((run.output / "tracking.json").read_text())["uri"])
    harm(run.output / "checkpoints" / "step-000004", "flipped weights")
    assert start("latest") == first
    assert start(run.output) == first
    assert curve(first) == [1, 2, 3, 4]
    ended = client.get_run(first).info.end_time
    forked = start(run.output / "checkpoints" / "step-000002")
    assert curve(forked) == [1, 2, 3, 4]
    assert client.get_run(forked).data.tags[FORKED] == f"{first} at step 2"
    fresh = start("never")
    assert curve(fresh) == [1, 2, 3, 4]
    assert FORKED not in client.get_run(fresh).data.tags
    assert len({first, forked, fresh}) == 3
    assert (curve(first), client.get_run(first).info.end_time) == ([1, 2, 3, 4], ended)


def test_the_command_says_what_it_can_resume_from(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from t2ilib.cli import app

    run = make_run(tmp_path / "run")
    save_run(run, tmp_path / "run.yaml")
    done = CliRunner().invoke(app, ["train", str(tmp_path / "run.yaml"), "--resume", str(tmp_path / "nowhere")])
    assert done.exit_code == 2
    assert "no checkpoint at" in done.output
