"""Resolution stages: which pictures a step sees, at what size and with what micro-conditioning, and that a run goes on over a border."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from t2ilib.config import ConfigError
from t2ilib.data.dataset import load_datasets
from t2ilib.models.load import load_base
from t2ilib.runfile import build_run
from t2ilib.shapes import world
from t2ilib.training.checkpoint import list_checkpoints, load_checkpoint
from t2ilib.training.loop import build_accelerator, train
from t2ilib.training.setups import setup_diffusion
from t2ilib.training.stages import StagedDataset

CPU = torch.device("cpu")
EVALUATION = {"validate_every": 0, "validation_timesteps": 1, "num_inference_steps": 1, "prompts": ["a circle"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Twelve pictures, eight wide ones and four high ones."""
    path = tmp_path_factory.mktemp("pictures") / "drawn"
    world.write_folder(path, world.mixed_scenes(12, "train", 0, ("base",)), 0, num_phrasings=1)
    for number, row in enumerate((path / "metadata.jsonl").read_text().splitlines()):
        file = path / json.loads(row)["file_name"]
        with Image.open(file) as image:
            whole = image.convert("RGB")
        whole.resize((128, 64) if number % 3 else (64, 128)).save(file)
    return path


def run_of(output: Path, folder: Path, **sections):
    values = {
        "output": str(output),
        "adapter": {"rank": 2},
        "data": {"path": str(folder), "resolution": 64, "stages": {32: 2, 48: 1}, "validation_share": 0.2},
        "training": {"steps": 5, "batch_size": 2, "checkpoint_every": 1, "keep_checkpoints": 9},
        "evaluation": EVALUATION,
    }
    return build_run(values | {name: {**values.get(name, {}), **section} for name, section in sections.items()})


def setup_of(run):
    run.output.mkdir(parents=True, exist_ok=True)
    training, held_out = load_datasets(run)
    return setup_diffusion(run, load_base(run.model, CPU), training, held_out, build_accelerator(run))


@pytest.mark.parametrize("cache", ["all", "off"])
def test_a_step_sees_its_stage(cache: str, folder: Path, tmp_path: Path) -> None:
    setup = setup_of(run_of(tmp_path, folder, data={"cache": cache, "crop": "center"}))
    batches = [setup.batch(setup.order(step), step) for step in range(5)]
    sides = [32, 32, 48, 64, 64]
    assert [tuple(batch["latents"].shape) for batch in batches] == [(2, 4, side // 8, side // 8) for side in sides]
    for batch, side in zip(batches, sides, strict=True):
        for original, crop, target in batch["time_ids"].view(2, 3, 2).tolist():
            assert target == [side, side]
            # the middle of a picture twice as long as high, whose short side has become `side`
            assert crop == [0, side // 2] if original == [64, 128] else crop == [side // 2, 0]
    again = setup.batch(setup.order(2), 2)
    assert torch.equal(again["latents"], batches[2]["latents"])
    assert [sorted(setup.order(step)) for step in range(2)] == [sorted(setup.order(step)) for step in range(2)]


def test_buckets_and_their_order_are_those_of_the_stage(folder: Path, tmp_path: Path) -> None:
    setup = setup_of(run_of(tmp_path, folder, data={"buckets": True}))
    plain = setup_of(run_of(tmp_path / "plain", folder, data={"buckets": True, "stages": {}}))
    for step in range(5):
        latents = setup.batch(setup.order(step), step)["latents"]
        area = latents.shape[-1] * latents.shape[-2] * 64
        assert step < 3 or latents.shape[-1] != latents.shape[-2]
        assert area == pytest.approx({0: 32, 1: 32, 2: 48}.get(step, 64) ** 2, rel=0.35)
    assert [setup.order(step) for step in (3, 4)] == [plain.order(step) for step in (3, 4)]
    assert torch.equal(setup.batch(setup.order(4), 4)["latents"], plain.batch(plain.order(4), 4)["latents"])


def test_a_run_goes_on_over_a_border_as_if_it_had_never_stopped(folder: Path, tmp_path: Path, monkeypatch) -> None:
    seen = []
    batch = StagedDataset.batch

    def watched(self, ids, step, *rest):
        found = batch(self, ids, step, *rest)
        seen.append((step, found["latents"].shape[-1]))
        return found

    monkeypatch.setattr(StagedDataset, "batch", watched)
    straight = run_of(tmp_path / "straight", folder, data={"cache": "latents"})
    train(straight)
    assert seen == [(0, 4), (1, 4), (2, 6), (3, 8), (4, 8)]
    for stopped in (1, 2):  # within a stage, and at a border
        output = tmp_path / f"stopped-{stopped}"
        shutil.copytree(straight.output, output)
        for later in list_checkpoints(output / "checkpoints")[stopped:]:
            shutil.rmtree(later)
        seen.clear()
        train(run_of(output, folder, data={"cache": "latents"}))
        assert [step for step, _ in seen] == list(range(stopped, 5))
        ends = [load_checkpoint(list_checkpoints(place / "checkpoints")[-1]) for place in (straight.output, output)]
        assert [end.step for end in ends] == [5, 5]
        for file, tensors in ends[0].tensors.items():
            assert all(torch.equal(x, ends[1].tensors[file][name]) for name, x in tensors.items()), file


def test_what_is_measured_has_the_last_resolution(folder: Path, tmp_path: Path) -> None:
    losses = []
    for name, stages in (("staged", {32: 2, 48: 1}), ("plain", {})):
        setup = setup_of(run_of(tmp_path / name, folder, data={"stages": stages}))
        losses.append(setup.validate(0))
        assert setup.draw()[0].size == (64, 64)
    assert losses[0] == losses[1]


def test_stages_that_leave_nothing_or_fall_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none is left for data\.resolution 64"):
        run_of(tmp_path, folder, data={"stages": {32: 5}})
    with pytest.raises(ConfigError, match="must rise to resolution 64"):
        run_of(tmp_path, folder, data={"stages": {64: 1}})
