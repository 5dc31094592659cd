"""Training a UNet from nothing: by the recipe of a model that ships, in latents and in pixels; what is left is a pipeline that diffusers draws
with, its weights averaged, its card true, and that is a base again."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from t2ilib.adapters.load import load_adapter
from t2ilib.cli import app
from t2ilib.config import EvaluationConfig, ModelConfig
from t2ilib.evaluation.sampling import draw
from t2ilib.models.load import load_base
from t2ilib.models.pipeline import build_pipeline
from t2ilib.runfile import build_run, load_run, override_values
from t2ilib.training.checkpoint import list_checkpoints, load_checkpoint
from t2ilib.training.loop import train

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SHORT = {
    "evaluation": {
        "validate_every": 0,
        "validation_timesteps": 1,
        "validation_pictures": 2,
        "sample_every": 0,
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "prompts": ['a "red" circle'],
    }
}


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """The recipe of tiny-sd15's UNet, as far as it gets in a few steps."""
    output = tmp_path_factory.mktemp("latents") / "run"
    few = ["shapes.num_pictures=64", "training.steps=16", "training.batch_size=16", "optimizer.warmup_steps=2"]
    few += ["training.ema_horizon=4", "training.checkpoint_every=16", f"output={output}"]
    whole = load_run(ROOT / "experiments" / "tiny-sd15" / "unet.yaml", few)
    run = build_run(whole.model_dump(mode="json") | SHORT)
    return run, train(run)


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    run = build_run(
        {
            "output": str(tmp_path_factory.mktemp("pixels") / "run"),
            "scratch": {"unet": "tiny", "space": "pixels"},
            "data": {"source": "shapes", "resolution": 16, "stages": {8: 1}},
            "shapes": {"num_pictures": 8},
            "training": {"steps": 3, "batch_size": 4, "ema_horizon": 2},
        }
        | SHORT
    )
    return run, train(run)


def losses(run) -> list[float]:
    rows = [yaml.safe_load(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_the_recipe_of_the_shipped_model_learns(latents) -> None:
    run, result = latents
    assert result.components.family.name == "sd15"
    found = losses(run)
    assert len(found) == 16
    assert np.mean(found[-4:]) < 0.8 * np.mean(found[:2])


@pytest.mark.parametrize("space", ["latents", "pixels"])
def test_what_is_saved_is_the_average(space: str, request) -> None:
    run, _ = request.getfixturevalue(space)
    saved = load_file(run.output / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    end = load_checkpoint(list_checkpoints(run.output / "checkpoints")[-1])
    trained = {name.removeprefix("unet."): x for name, x in end.tensors["weights"].items()}
    averaged = {name.removeprefix("unet."): x for name, x in end.tensors["ema"].items()}
    assert saved.keys() == trained.keys()
    assert all(torch.equal(x, averaged[name]) for name, x in saved.items())
    assert any(not torch.equal(x, trained[name]) for name, x in saved.items())


ELSEWHERE = r"""
import os, re, sys
sys.modules["t2ilib"] = None  # as where it is not installed
import numpy as np, torch

def seeded(pipeline):
    options = {"generator": torch.Generator().manual_seed(7), "num_inference_steps": 2, "output_type": "np"}
    return pipeline("a circle", **options).images

*folders, again = sys.argv[1:]
for folder in folders:
    os.chdir(folder)
    exec(re.search(r"```python\n(.*?)```", open("README.md").read(), re.S)[1])
    np.save("seeded.npy", drawn := seeded(pipeline))
    print(type(pipeline).__name__)
pipeline.save_pretrained(again)
del sys.modules["t2ilib"]
from t2ilib import TextToImagePipeline
assert np.array_equal(seeded(TextToImagePipeline.from_pretrained(again)), drawn)
"""


def test_folders_draw_the_same_in_another_process(latents, pixels, tmp_path: Path) -> None:
    """By the code of their cards, with diffusers alone; of pixels also saved again, and drawn with t2ilib."""
    folders, again = [run.output / "model" for run, _ in (latents, pixels)], tmp_path / "again"
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    program = [sys.executable, "-c", ELSEWHERE, *map(str, folders), str(again)]
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["StableDiffusionPipeline", "TextToImagePipeline"]
    for folder, (_, result), side in zip(folders, (latents, pixels), (64, 16), strict=True):
        with Image.open(folder / "picture.png") as picture:
            assert picture.size == (side, side)
        result.components.unet.eval()
        options = {"generator": torch.Generator().manual_seed(7), "num_inference_steps": 2, "output_type": "np"}
        here = build_pipeline(result.components)("a circle", **options).images
        assert np.allclose(np.load(folder / "seeded.npy"), here, atol=1e-5)
    for name in ("README.md", "pipeline.py", "scheduler/scheduler_config.json"):
        assert (again / name).read_text() == (folders[1] / name).read_text(), name


def test_cards_say_what_was_trained(latents, pixels) -> None:
    for (run, result), words in (
        (
            latents,
            ("predicts | v_prediction", "averaged over some 4 steps", "16 of 16 pictures", "0.1", "scaled_linear"),
        ),
        (pixels, ("8 for 1 steps, then 16", "3 of 4 pictures", "works on pixels")),
    ):
        card = (run.output / "model" / "README.md").read_text()
        _, front, body = card.split("---\n", 2)
        told = yaml.safe_load(front)
        assert (told["library_name"], told["pipeline_tag"]) == ("diffusers", "text-to-image")
        assert "from-scratch" in told["tags"]
        count = sum(p.numel() for p in result.components.unet.parameters())
        manifest = yaml.safe_load((run.output / "manifest.json").read_text())
        for word in (*words, f"{count:,} parameters", f"{run.shapes.num_pictures} of ", manifest["digest"]["training"]):
            assert word in body, word


def test_pixels_are_drawn_with_and_trained_on_by_their_folder(pixels, tmp_path: Path) -> None:
    run, result = pixels
    folder, prompts = str(run.output / "model"), list(run.evaluation.prompts)
    words = ["-q", "generate", "--model", folder, "--prompt", prompts[0], "--steps", "2", "--guidance", "2"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    expected = draw(result.components, prompts, EvaluationConfig(num_inference_steps=2, guidance_scale=2.0))[0]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "00.png")), np.asarray(expected))

    on = run.model_dump(mode="json") | {"scratch": None, "output": str(tmp_path / "on")}
    on = override_values(on, [f"model.base={folder}", "training.trains=unet"])
    again = train(build_run(on))
    assert again.components.family.name == "pixels"
    card = (tmp_path / "on" / "model" / "README.md").read_text()
    assert "full-fine-tuning" in card
    assert str(tmp_path) not in card


def test_an_adapter_over_pixels_is_trained_and_loaded(pixels, tmp_path: Path) -> None:
    run, _ = pixels
    values = {
        "output": str(tmp_path),
        "model": {"base": str(run.output / "model")},
        "adapter": {"rank": 2, "init": "gaussian", "text_encoder_targets": "attention"},
        "data": {"source": "shapes", "resolution": 16},
        "shapes": {"num_pictures": 8},
        "training": {"steps": 2, "batch_size": 4},
    }
    trained = train(build_run(values | SHORT)).components
    loaded = load_base(ModelConfig(base=str(run.output / "model")), CPU)
    plain = draw(loaded, ["a circle"], EvaluationConfig(num_inference_steps=1))[0]
    load_adapter(loaded, tmp_path)
    drawn = [draw(parts, ["a circle"], EvaluationConfig(num_inference_steps=1))[0] for parts in (trained, loaded)]
    assert np.array_equal(np.asarray(drawn[0]), np.asarray(drawn[1]))
    assert not np.array_equal(np.asarray(plain), np.asarray(drawn[1]))
