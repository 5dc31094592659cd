"""A run's checkpoints measured: as its end was, once, and anew only what has changed."""

import json
import shutil

import pytest
import torch

from t2ilib.config import ConfigError
from t2ilib.drawing import judging
from t2ilib.drawing.judging import Shared, measure_steps, spread, steps_to_measure
from t2ilib.drawing.loaded import Loaded
from t2ilib.evaluation.measures import measure
from t2ilib.evaluation.rows import read_rows
from t2ilib.evaluation.steps import load_steps, losses_file, read_steps
from t2ilib.runfile import build_run
from t2ilib.training.loop import train

CPU = torch.device("cpu")
RUN = {
    "data": {"source": "shapes"},
    "shapes": {"scenes": ["heart"], "num_pictures": 8, "checked_prompts": 3},
    "adapter": {"rank": 2, "text_encoder_targets": "attention"},
    "optimizer": {"learning_rate": 1e-2},
    "training": {"steps": 3, "batch_size": 2, "checkpoint_every": 1, "keep_checkpoints": 1, "keep_adapters": "all"},
    "evaluation": {
        "validate_every": 1,
        "sample_every": 0,
        "validation_timesteps": 2,
        "validation_pictures": 3,
        "num_inference_steps": 2,
    },
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judged") / "heart"
    run = build_run(RUN | {"output": str(folder)})
    result = train(run)
    measure(run, result.components, metrics=result.metrics)
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy, with the times of its files."""
    return shutil.copytree(trained, tmp_path / "heart", copy_function=shutil.copy2)


@pytest.fixture
def judged(monkeypatch):
    """The steps that pictures were drawn for."""
    steps, judge = [], judging.judge
    monkeypatch.setattr(judging, "judge", lambda *args: steps.append(args[3]) or judge(*args))
    return steps


def test_every_checkpoint_is_measured_once(run, judged, tmp_path):
    loaded, said = Loaded(CPU, tmp_path), []
    assert measure_steps(run, loaded, say=said.append) == [1, 2, 3]
    assert judged == [0, 1, 2], "the end was measured by the run itself"
    assert len(said) == 4
    assert said[-1].endswith("step 3, as the run measured it")
    found = load_steps(run)
    assert list(found.metrics) == [0, 1, 2, 3]
    at_end = json.loads((run / "metrics.json").read_text())
    assert all(at_end[name] == value for name, value in found.metrics[3].items() if name != "held_out_loss")
    assert found.metrics[3]["held_out_loss"] == pytest.approx(at_end["held_out_loss"])
    assert {picture.group for picture in found.pictures["concept/all"][2]} == {"concept"}
    assert len(found.pictures["concept/all"][2]) == len(found.pictures["held_out_loss"][2]) == 3
    measure_steps(run, loaded)
    assert judged == [0, 1, 2], "nothing twice"


def test_what_is_measured_is_what_the_end_would_have_measured(run, judged, tmp_path):
    before = {(row.group, row.number): row for row in read_rows(run)}
    (run / "metrics.json").unlink()
    measure_steps(run, Loaded(CPU, tmp_path))
    assert judged == [0, 1, 2, 3]
    after = {(row.group, row.number): row for row in read_rows(run) if row.step == 3}
    assert after.keys() == before.keys()
    assert all(after[key].values == pytest.approx(before[key].values, abs=1e-3) for key in before)


def test_only_what_has_changed_is_measured_again(run, judged, tmp_path):
    loaded = Loaded(CPU, tmp_path)
    measure_steps(run, loaded, [1, 2])
    assert judged == [0, 1, 2]
    kept = run / "steps" / "step-000001" / "adapter" / "pytorch_lora_weights.safetensors"
    shutil.copy(run / "steps" / "step-000003" / "adapter" / kept.name, kept)  # as another training would
    measure_steps(run, loaded, [1, 2])
    assert judged == [0, 1, 2, 1]
    config = run / "run.yaml"
    config.write_text(config.read_text().replace("guidance_scale: 3.0", "guidance_scale: 2.0"))
    measure_steps(run, loaded, [2])
    assert judged == [0, 1, 2, 1, 0, 2]
    assert {row.step for row in read_rows(run)} == {0, 1, 2, 3}


def test_a_kill_costs_one_step(run, judged, tmp_path, monkeypatch):
    write = judging.write_step

    def die(folder, known, step, *more):
        if step == 2:
            raise KeyboardInterrupt
        write(folder, known, step, *more)

    monkeypatch.setattr(judging, "write_step", die)
    with pytest.raises(KeyboardInterrupt):
        measure_steps(run, Loaded(CPU, tmp_path))
    assert list(read_steps(run)["steps"]) == ["0", "1"]
    monkeypatch.setattr(judging, "write_step", write)
    measure_steps(run, Loaded(CPU, tmp_path))
    assert judged == [0, 1, 2, 2]


def test_losses_that_training_did_not_measure_are_those_that_it_would_have(run, tmp_path):
    """Against the training's own, of an adapter on UNet and text encoders."""
    trainings = {step: json.loads(losses_file(run, step).read_text()) for step in (1, 2)}
    for step in trainings:
        losses_file(run, step).unlink()
    measure_steps(run, Loaded(CPU, tmp_path))
    for step, expected in trainings.items():
        found = json.loads(losses_file(run, step).read_text())
        assert [row["picture"] for row in found] == [row["picture"] for row in expected]
        assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=1e-4)
    assert trainings[1] != trainings[2]


def test_the_base_of_several_runs_is_measured_once(run, judged, tmp_path):
    other = shutil.copytree(run, tmp_path / "other", copy_function=shutil.copy2)
    shared, loaded = Shared(), Loaded(CPU, tmp_path)
    measure_steps(run, loaded, [1], shared)
    measure_steps(other, loaded, [1], shared)
    assert judged == [0, 1, 1]
    assert load_steps(run).metrics[0] == load_steps(other).metrics[0]


def test_runs_without_checkpoints_are_told(tmp_path, run):
    with pytest.raises(ConfigError, match=r"holds no run\.yaml"):
        measure_steps(tmp_path, Loaded(CPU, tmp_path))
    with pytest.raises(ConfigError, match="no checkpoint of step 7; there are 1, 2, 3"):
        steps_to_measure(run, [7])
    shutil.rmtree(run / "steps")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ConfigError, match="train with training"):
        measure_steps(run, Loaded(CPU, tmp_path))
    assert spread(range(10, 110, 10), 4) == [10, 40, 70, 100]
    assert spread([1, 2], 4) == [1, 2]
