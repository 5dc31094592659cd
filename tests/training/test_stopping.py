"""What ends a training early: errors, signals, its time, a full disk or memory; and that a run which goes on is the run that did not stop."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from t2ilib import memory
from t2ilib.config import RunConfig
from t2ilib.memory import MemoryLog
from t2ilib.runfile import build_run
from t2ilib.tracking.ending import Stopped
from t2ilib.tracking.sending import ENDED
from t2ilib.tracking.tracker import open_tracker
from t2ilib.training import checkpoint, loop, state, stopping
from t2ilib.training.checkpoint import NonFiniteState, list_checkpoints
from t2ilib.training.history import read_rows
from t2ilib.training.loop import train
from t2ilib.training.stopping import AGAIN, DISK, MEMORY, NO_ROOM, TIME, Interrupted, Stops

STEPS = 6


def make_run(output: Path, **changes) -> RunConfig:
    values = {
        "output": str(output),
        "model": {"base": "tiny-sd15"},
        "adapter": {"rank": 2, "alpha": 2.0, "dropout": 0.3},
        "data": {"source": "shapes"},
        "shapes": {"scenes": ["heart"], "num_pictures": 6},
        "training": {"steps": STEPS, "batch_size": 2, "checkpoint_every": 100},
        "evaluation": {"validate_every": 2, "validation_timesteps": 1, "prompts": ["a heart"], "num_inference_steps": 1}
        | {"sample_every": 2, "animation": "none"},
    }
    for address, value in changes.items():
        section, _, field = address.partition("__")
        values.setdefault(section, {})[field] = value
    return build_run(values)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """The folder of a run that nothing stopped."""
    output = tmp_path_factory.mktemp("straight") / "run"
    train(make_run(output))
    return output


def names(output: Path) -> list[str]:
    return [path.name for path in list_checkpoints(output / "checkpoints")]


def measured(output: Path) -> list[dict]:
    """Everything that was measured, without what it cost, step by step."""
    found: dict[int, dict] = {}
    for row in read_rows(output / "metrics.jsonl"):
        cost = ("memory/", "peak_", "steps_per_second", "data_wait_share")
        found.setdefault(row["step"], {}).update({k: v for k, v in row.items() if not k.startswith(cost)})
    return [found[step] for step in sorted(found)]


def require_same(found: Path, straight: Path) -> None:
    last = f"checkpoints/step-{STEPS:06d}"
    for name in ("weights", "optimizer"):
        file = f"{last}/{name}.safetensors"
        assert (found / file).read_bytes() == (straight / file).read_bytes(), name
    assert measured(found) == measured(straight)
    assert sorted(p.name for p in (found / "samples").glob("grid*")) == [
        f"grid-{step:06d}.png" for step in range(0, STEPS + 1, 2)
    ]


def breaking(monkeypatch, place: object, name: str, at: int, error: BaseException) -> None:
    """Has the `at`-th call of a function raise."""
    original, calls = getattr(place, name), []

    def call(*arguments, **named):
        calls.append(name)
        if len(calls) == at:
            raise error
        return original(*arguments, **named)

    monkeypatch.setattr(place, name, call)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("a bug"), KeyboardInterrupt(), torch.OutOfMemoryError("CUDA out of memory"), SystemExit(3)],
    ids=lambda error: type(error).__name__,
)
def test_an_error_in_a_step_leaves_a_checkpoint_of_the_one_before(tmp_path, monkeypatch, straight, error) -> None:
    run = make_run(tmp_path / "run")
    with monkeypatch.context() as patch:
        breaking(patch, loop, "take_gradients", 4, error)
        with pytest.raises(type(error)):
            train(run)
    assert names(run.output) == ["step-000003"]
    assert train(run).resumed_from == 3
    require_same(run.output, straight)
    log = (run.output / "run.log").read_text()
    assert "emergency checkpoint of step 3" in log
    assert log.count("--- process") == 2


def test_an_error_while_measuring_leaves_a_checkpoint_and_is_made_up_for(tmp_path, monkeypatch, straight) -> None:
    """Held-out loss and samples of step 2 are lacking when the run goes on from it."""
    from t2ilib.training import setups

    run = make_run(tmp_path / "run")
    with monkeypatch.context() as patch:
        breaking(patch, setups, "held_out_loss", 2, RuntimeError("a bug"))
        with pytest.raises(RuntimeError, match="a bug"):
            train(run)
    assert names(run.output) == ["step-000002"]
    assert train(run).resumed_from == 2
    require_same(run.output, straight)


def test_no_checkpoint_is_made_of_half_a_step(tmp_path, monkeypatch) -> None:
    """The optimizer has changed the weights, and nothing else has followed."""
    from t2ilib.training import optim

    run = make_run(tmp_path / "run", training__checkpoint_every=2)
    build = optim.build_schedule

    def built(*arguments):
        schedule = build(*arguments)
        breaking(monkeypatch, schedule, "step", 4, RuntimeError("between them"))
        return schedule

    monkeypatch.setattr(state, "build_schedule", built)
    with pytest.raises(RuntimeError, match="between them"):
        train(run)
    assert names(run.output) == ["step-000002"]


def poisoned(monkeypatch, at: int) -> None:
    """Has the weights be NaN after a step."""
    step = state.TrainState.step

    def takes(self) -> None:
        step(self)
        if self.done == at:
            with torch.no_grad():
                self.parameters[0].fill_(float("nan"))

    monkeypatch.setattr(state.TrainState, "step", takes)


def test_no_checkpoint_is_made_of_weights_that_are_not_finite(tmp_path, monkeypatch, caplog) -> None:
    run = make_run(tmp_path / "run", training__checkpoint_every=2, evaluation__validate_every=0)
    poisoned(monkeypatch, 3)
    with pytest.raises(loop.NonFiniteLoss):
        train(run)
    assert names(run.output) == ["step-000002"]
    assert "no emergency checkpoint of step 3: NonFiniteState: 1 tensor(s) are not finite" in caplog.text


def test_nor_one_that_is_due(tmp_path, monkeypatch) -> None:
    run = make_run(tmp_path / "run", training__checkpoint_every=2, evaluation__sample_every=0)
    poisoned(monkeypatch, 4)
    with pytest.raises(
        NonFiniteState, match=r"not finite after step 4 \(weights: unet\..*lower optimizer.learning_rate"
    ):
        train(run)
    assert names(run.output) == ["step-000002"]


def test_a_checkpoint_that_could_not_be_written_is_not_tried_again(tmp_path, monkeypatch) -> None:
    tried = []

    def full(folder, saved, keep) -> None:
        tried.append(saved.step)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "save_checkpoint", full)
    with pytest.raises(OSError, match="No space left"):
        train(make_run(tmp_path / "run", training__checkpoint_every=2))
    assert tried == [2]


def test_the_first_error_is_told_also_where_the_disk_is_full(tmp_path, monkeypatch, caplog) -> None:
    def full(*arguments) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    breaking(monkeypatch, loop, "take_gradients", 3, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        train(make_run(tmp_path / "run"))
    assert "no emergency checkpoint of step 2: OSError" in caplog.text


def test_a_second_signal_exits_at_once_and_writes_nothing(tmp_path, monkeypatch) -> None:
    import os
    import signal

    def impatient(*arguments, **named):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **named)

    original = loop.take_gradients
    monkeypatch.setattr(loop, "take_gradients", impatient)
    with pytest.raises(Interrupted) as error:
        train(make_run(tmp_path / "run"))
    assert error.value.code == 143
    assert names(tmp_path / "run") == []


def reading(**changed: float) -> dict[str, float]:
    return {"process_mib": 500.0, "system_available_mib": 9000.0, "disk_free_mib": 9000.0} | changed


def injected(monkeypatch, readings: list[dict[str, float]]) -> None:
    """A reading for each step, the last one for all that follow; those at named moments are as they are."""
    moments = {"noting": False}
    note = MemoryLog.note

    def noting(self, moment: str) -> None:
        moments["noting"] = True
        note(self, moment)
        moments["noting"] = False

    left = list(readings)

    def read(folder: Path) -> dict[str, float]:
        if moments["noting"]:
            return reading()
        return left.pop(0) if len(left) > 1 else left[0]

    monkeypatch.setattr(MemoryLog, "note", noting)
    monkeypatch.setattr(memory, "read_memory", read)
    monkeypatch.setattr(memory, "SECONDS_BETWEEN_READINGS", 0.0)


LOW_DISK, LOW_MEMORY = {"disk_free_mib": 256.0}, {"system_available_mib": 100.0}


def short_of(low: dict[str, float]) -> list[dict[str, float]]:
    """At the second step, which passes, and at the fourth and fifth."""
    return [reading(), reading(**low), reading(), reading(**low), reading(**low)]


def test_without_memory_a_run_warns_then_stops_with_a_checkpoint_and_goes_on(
    tmp_path, monkeypatch, caplog, straight
) -> None:
    run = make_run(tmp_path / "run")
    with monkeypatch.context() as patch:
        injected(patch, short_of(LOW_MEMORY))
        says = r"stopped after step 5 of 6 with a checkpoint: the system can give 100 MiB of memory, .*: close other programs"
        with pytest.raises(Stopped, match=says) as error:
            train(run)
    assert error.value.code == NO_ROOM
    assert caplog.text.count("If that stays so, the run stops with a checkpoint") == 2
    assert names(run.output) == ["step-000005"]
    assert train(run).resumed_from == 5
    require_same(run.output, straight)


def test_without_disk_it_does_too_and_mlflow_says_so(tmp_path, monkeypatch) -> None:
    from mlflow import MlflowClient

    run = make_run(tmp_path / "run", tracking__experiment="room")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with monkeypatch.context() as patch:
        injected(patch, short_of(LOW_DISK))
        with (
            pytest.raises(Stopped, match=r"the disk under .* has 256 MiB free, .*: free some"),
            open_tracker(run) as tracker,
        ):
            train(run, tracker)
    note = json.loads((run.output / "tracking.json").read_text())
    client = MlflowClient(note["uri"])
    ended = client.get_run(note["run_id"])
    assert ended.info.status == "KILLED"
    assert "Then the same command goes on" in ended.data.tags[ENDED]
    values = {m.step: m.value for m in client.get_metric_history(note["run_id"], "memory/disk_free_mib")}
    assert values == {1: 9000.0, 2: 256.0, 3: 9000.0, 4: 256.0, 5: 256.0}
    assert "memory at step 3: process 500 MiB, system available 9,000 MiB" in (run.output / "run.log").read_text()
    with open_tracker(run) as tracker:
        train(run, tracker)
    ended = client.get_run(note["run_id"])
    assert (ended.info.status, ENDED in ended.data.tags) == ("FINISHED", False)


def test_floors_of_zero_stop_nothing(tmp_path, monkeypatch) -> None:
    injected(monkeypatch, [reading(disk_free_mib=1.0, system_available_mib=1.0)])
    run = make_run(tmp_path / "run", training__least_free_disk_mib=0, training__least_free_memory_mib=0)
    train(run)


def test_a_budget_stops_a_run_in_time_and_the_same_command_goes_on(tmp_path, monkeypatch, caplog, straight) -> None:
    """A clock that goes ten seconds a step: of a minute, four are taken."""
    run = make_run(tmp_path / "run", training__time_budget="1m", tracking__experiment="budget")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with monkeypatch.context() as patch:
        clock = SimpleNamespace(at=0.0)

        def slow(*arguments, **named):
            clock.at += 10.0
            return original(*arguments, **named)

        original = loop.take_gradients
        patch.setattr(loop, "take_gradients", slow)
        patch.setattr(stopping.time, "monotonic", lambda: clock.at)
        patch.setattr(stopping.time, "perf_counter", lambda: clock.at)
        with pytest.raises(Stopped) as error, open_tracker(run) as tracker:
            train(run, tracker)
    assert error.value.code == AGAIN
    assert "time_budget 1m: stopped after step 5 of 6 with a checkpoint, 10 s before it is spent" in caplog.text
    assert names(run.output) == ["step-000005"]

    from mlflow import MlflowClient

    note = json.loads((run.output / "tracking.json").read_text())
    ended = MlflowClient(note["uri"]).get_run(note["run_id"])
    assert ended.info.status == "SCHEDULED"
    assert "time_budget" in ended.data.tags[ENDED]
    longer = make_run(tmp_path / "run", tracking__experiment="budget")  # another budget, or none, is the same run
    with open_tracker(longer) as tracker:
        assert train(longer, tracker).resumed_from == 5
    assert MlflowClient(note["uri"]).get_run(note["run_id"]).info.status == "FINISHED"
    require_same(run.output, straight)


def stops_of(run: RunConfig, longest: dict, recent: list[float], prompts: int = 4) -> Stops:
    """At 100 seconds of the run."""
    steps = run.training.steps
    found = SimpleNamespace(
        checkpoint_bytes=lambda: 0, due=lambda step: step % run.training.checkpoint_every == 0 or step == steps
    )
    evaluation = SimpleNamespace(
        setup=SimpleNamespace(prompts=["a"] * prompts), due=lambda step: step != steps and step % 10 == 0
    )
    history = SimpleNamespace(longest=longest, recent=[(seconds, 0.0) for seconds in recent], began=0.0)
    memory = SimpleNamespace(now=lambda step, tell: {}, folder=run.output)
    return Stops(run, found, history, evaluation, memory, 0.0)


@pytest.mark.parametrize(
    ("budget", "done", "stops"),
    [
        ("1m", 3, True),  # spent
        ("1h", 3, False),
        # another step, and a checkpoint: 1.25 (2 + 8) + 5
        ("117s", 3, True),
        ("118s", 3, False),
        # after this step is an evaluation of 40 s: 1.25 (40 + 2 + 8) + 5
        ("167s", 10, True),
        ("168s", 10, False),
        # or after the next
        ("167s", 9, True),
        # after it a checkpoint, another step, and a checkpoint again: 1.25 (8 + 2 + 8) + 5
        ("127s", 25, True),
        ("128s", 25, False),
        # the last: a checkpoint, the evaluation, and 12 pictures where the grid has 4: 1.25 (8 + 40 + 3 * 40) + 5
        ("314s", 30, True),
        ("315s", 30, False),
    ],
)
def test_what_is_still_to_come_must_fit_into_the_budget(monkeypatch, tmp_path, budget, done, stops) -> None:
    monkeypatch.setattr(stopping.time, "monotonic", lambda: 100.0)
    training = {"steps": 30, "checkpoint_every": 25, "time_budget": budget}
    prompts = [f"a heart {number}" for number in range(12)]
    run = build_run({"adapter": {}, "training": training, "output": str(tmp_path), "evaluation": {"prompts": prompts}})
    asked = stops_of(run, {"saving": 8.0, "evaluating": 40.0}, [1.0, 2.0, 1.0])
    assert asked(done) == ([TIME] if stops else [])


def test_a_signal_counts_more_than_the_budget(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(stopping.time, "monotonic", lambda: 100.0)
    run = build_run({"adapter": {}, "training": {"time_budget": "10s"}, "output": str(tmp_path)})
    asked = stops_of(run, {}, [1.0])
    asked.reasons.append(15)
    assert asked(3) == [15]
    ending = asked.ending(15, 3)
    assert (type(ending), ending.code, str(ending)) == (
        Interrupted,
        143,
        "SIGTERM after step 3, of which there is a checkpoint",
    )


def test_a_process_elsewhere_without_room_is_told_of(tmp_path) -> None:
    """Of several processes each watches its own machine, and hears of the others by number."""
    run = build_run({"adapter": {}, "output": str(tmp_path)})
    for reason in (DISK, MEMORY):
        ending = stops_of(run, {}, []).ending(reason, 3)
        assert (ending.code, "another machine has no room left" in str(ending)) == (NO_ROOM, True)
