"""Watching a run: when it draws, and that its animation, strips and trackers have all of it, however often it was interrupted."""

import json
from pathlib import Path

import numpy as np
import pytest
from diffusers import EDMEulerScheduler
from PIL import Image

from t2ilib.config import ConfigError
from t2ilib.data.loader import Order
from t2ilib.models.load import load_base
from t2ilib.runfile import build_run
from t2ilib.tracking.tracker import NullTracker, open_tracker
from t2ilib.training.loop import train
from t2ilib.training.stages import StagedOrder

PROMPTS = ["a red heart", "a blue heart"]


class Recorder(NullTracker):
    """What it was told; interrupts the run at a step."""

    def __init__(self, until: int | None = None):
        self.until, self.steps, self.images, self.artifacts = until, [], [], []

    def log_metrics(self, values, step):
        self.steps.append(step)
        if step == self.until:
            raise RuntimeError("interrupted")

    def log_image(self, image, key, step):
        self.images.append((key, step))

    def log_artifact(self, path, folder=None):
        self.artifacts.append((path.name, folder))


def make_run(output: Path, steps: int = 6, tracking=(), **evaluation):
    drawing = {"num_inference_steps": 2, "prompts": PROMPTS, "sample_every_epochs": 1, "validate_every": 0}
    return build_run(
        {
            "output": str(output),
            "model": {"base": "tiny-sd15"},
            "adapter": {"rank": 1, "targets": ["mid_block.attentions.0.transformer_blocks.0.attn2.to_q"]},
            "data": {"source": "shapes"},
            "shapes": {"scenes": ["heart"], "num_pictures": 5},
            "training": {"steps": steps, "batch_size": 2, "checkpoint_every": 3},
            "evaluation": drawing | {"validation_timesteps": 1, "validation_pictures": 1} | evaluation,
            "tracking": dict(tracking),
        }
    )


def pictures_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of three epochs of two steps."""
    run, tracker = make_run(tmp_path_factory.mktemp("whole") / "run", strip_steps=[]), Recorder()
    train(run, tracker)
    return run, tracker


def test_it_draws_by_epochs_and_shows_it_all_at_the_end(whole):
    run, tracker = whole
    assert tracker.images == [*(("samples", step) for step in (0, 2, 4, 6)), ("denoising", 6)]
    assert {("progress", "progress"), ("denoising", "denoising")} <= set(tracker.artifacts)
    assert sorted(pictures_in(run.output / "progress")) == ["00.gif", "01.gif", "grid.gif"]
    assert sorted(pictures_in(run.output / "denoising")) == ["00.png", "01.png", "grid.png"]
    with Image.open(run.output / "progress" / "01.gif") as shown:
        assert shown.n_frames == 4
    with Image.open(run.output / "denoising" / "00.png") as strip:
        assert strip.width > 3 * 128, "two predictions and the picture"


def test_an_interrupted_run_shows_all_of_it(whole, tmp_path):
    run = make_run(tmp_path / "run", strip_steps=[])
    with pytest.raises(RuntimeError, match="interrupted"):
        train(run, Recorder(until=5))
    tracker = Recorder()
    train(run, tracker)
    for folder in ("progress", "denoising", "samples/step-000004"):
        assert pictures_in(run.output / folder) == pictures_in(whole[0].output / folder)
    assert tracker.images[:2] == [("samples", 0), ("samples", 2)], "told again, for what a killed process had not sent"
    assert sorted(set(tracker.steps)) == list(range(7))


def test_other_prompts_are_another_animation(whole, tmp_path):
    """Of a run that went on with other prompts, the pictures of before are no frames."""
    run = make_run(tmp_path / "run", steps=4)
    train(run, Recorder())
    more = make_run(tmp_path / "run", steps=8, prompts=["a green heart"], animation="webp")
    train(more, Recorder())
    assert not list((run.output / "progress").glob("*.webp")), "two samples stand side by side in the grid"
    told = {path.parent.name: json.loads(path.read_text()) for path in run.output.glob("samples/*/prompts.json")}
    assert told == {f"step-00000{k}": PROMPTS if k < 6 else ["a green heart"] for k in (0, 2, 4, 6, 8)}


def test_what_an_attempt_without_checkpoint_drew_is_gone(tmp_path):
    run = make_run(tmp_path / "run", steps=1, animation="none")
    (run.output / "samples" / "step-000050").mkdir(parents=True)
    train(run, Recorder())
    assert sorted(path.name for path in (run.output / "samples").iterdir()) == [
        *("grid-000000.png", "grid-000001.png", "step-000000", "step-000001")
    ]
    assert not (run.output / "progress").exists()


def test_mlflow_gets_an_image_again_that_it_has_lost(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = make_run(tmp_path / "results" / "run", steps=2, tracking={"experiment": "tests"})
    with open_tracker(run) as tracker:
        train(run, tracker)
    lost = next(path for path in tmp_path.rglob("*samples+step+0+*.png"))
    lost.unlink()
    for thumbnail in tmp_path.rglob("*samples+step+0+*.webp"):
        thumbnail.unlink()
    with open_tracker(run) as tracker:
        train(run, tracker)
        losses = tracker.client.get_metric_history(tracker.run_id, "A first look/loss")
    assert [len(list(tmp_path.rglob(f"*samples+step+{step}+*.png"))) for step in (0, 2)] == [1, 1]
    assert [metric.step for metric in losses] == [1, 2]


def loading_with(scheduler):
    def load(*arguments):
        components = load_base(*arguments)
        components.scheduler = scheduler
        return components

    return load


def test_strips_of_an_unknown_sampler_are_refused_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr("t2ilib.training.loop.load_base", loading_with(EDMEulerScheduler()))
    tracker = Recorder()
    with pytest.raises(ConfigError, match=r"evaluation.strip_steps: the base's EDMEulerScheduler"):
        train(make_run(tmp_path / "run", strip_steps=[1]), tracker)
    assert tracker.steps == []


def test_epochs_are_counted_over_the_stages_of_a_training():
    staged = StagedOrder([Order(0, 4, 13), Order(0, 4, 13)], lambda step: int(step >= 5))
    assert [staged.epoch(step) for step in range(12)] == [step // 3 for step in range(12)]
    of_buckets = StagedOrder(
        [Order(0, 4, 13), Order(0, 4, 24, np.repeat((0, 1, 2), (13, 4, 7)))], lambda step: int(step >= 6)
    )
    assert [of_buckets.epoch(step) for step in (5, 6, 7, 10)] == [1, 2, 1, 2], (
        "a border may count anew, and ends no pass by it"
    )
