"""What users of other programs see: diffusers alone loads the tiny SDXL and a trained adapter, and draws the same picture."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from t2ilib.adapters.load import adapter_file, load_adapter, read_metadata
from t2ilib.cli import app
from t2ilib.evaluation.sampling import draw
from t2ilib.models.files.locate import SHIPPED
from t2ilib.models.load import load_base
from t2ilib.runfile import build_run
from t2ilib.training.loop import train

PROMPT = "a large upright red heart at the center on a white background"

DIFFUSERS_ALONE = f"""
import sys, torch, numpy as np
from diffusers import StableDiffusionXLPipeline
model, adapter, seed, out = sys.argv[1:]
pipeline = StableDiffusionXLPipeline.from_pretrained(model, torch_dtype=torch.float32, use_safetensors=True)
pipeline.load_lora_weights(adapter)
generator = torch.Generator("cpu").manual_seed(int(seed))
picture = pipeline(["{PROMPT}"], generator=[generator], num_inference_steps=4, guidance_scale=2.0).images[0]
np.save(out, np.asarray(picture))
assert "t2ilib" not in sys.modules
"""


@pytest.fixture(scope="module", params=["lora", "dora"])
def trained(request, tmp_path_factory):
    text = "many" if request.param == "lora" else None  # diffusers' loader loses DoRA's magnitudes on text encoders
    folder = tmp_path_factory.mktemp(request.param)
    run = build_run(
        {
            "output": str(folder),
            "adapter": {
                "kind": request.param,
                "rank": 4,
                "alpha": 12.0,
                "targets": "many",
                "text_encoder_targets": text,
            },
            "data": {"source": "shapes"},
            "shapes": {"scenes": ["heart"], "num_pictures": 16},
            "optimizer": {"learning_rate": 5e-3},
            "training": {"steps": 8, "batch_size": 4},
            "evaluation": {"validate_every": 0, "prompts": [PROMPT], "num_inference_steps": 4, "guidance_scale": 2.0},
        }
    )
    return run, train(run)


def test_diffusers_alone_draws_the_same_picture(trained, tmp_path: Path) -> None:
    from t2ilib.evaluation.sampling import DRAW_SEED
    from t2ilib.seeds import seed_for

    run, result = trained
    ours = np.asarray(draw(result.components, [PROMPT], run.evaluation)[0], int)
    command = [sys.executable, "-c", DIFFUSERS_ALONE, str(SHIPPED["tiny-sdxl"]), str(run.output / "adapter")]
    subprocess.run(
        [*command, str(seed_for(DRAW_SEED, "picture", 0)), str(tmp_path / "theirs.npy")], check=True, cwd=tmp_path
    )
    theirs = np.load(tmp_path / "theirs.npy").astype(int)
    assert abs(ours - theirs).max() <= 1
    base = np.asarray(draw(load_base(run.model), [PROMPT], run.evaluation)[0], int)
    assert abs(ours - base).max() > 8, "the adapter changes nothing, so the comparison shows nothing"


def test_generate_command_with_adapter_checkpoint_and_scale(trained, tmp_path: Path) -> None:
    run, result = trained

    def generate(*arguments: str) -> np.ndarray:
        words = ["-q", "generate", "--prompt", PROMPT, "--steps", "4", "--guidance", "2.0", "--out", str(tmp_path)]
        before = len(list(tmp_path.iterdir()))
        done = CliRunner().invoke(app, [*words, *arguments])
        assert done.exit_code == 0, done.output
        assert len(list(tmp_path.iterdir())) == before + 1, "a picture of before was written over"
        return np.asarray(Image.open(tmp_path / f"{before:02d}.png"), int)

    ours = np.asarray(draw(result.components, [PROMPT], run.evaluation)[0], int)
    adapted = generate("--adapter", str(run.output))
    assert abs(adapted - ours).max() <= 1
    assert abs(generate("--adapter", str(run.output), "--checkpoint", "8") - ours).max() <= 1
    base = generate()
    assert abs(generate("--adapter", str(run.output), "--scale", "0") - base).max() == 0
    assert abs(adapted - base).max() > 8


def test_clip_skip_and_negative_prompts_reach_every_picture(tmp_path: Path, caplog) -> None:
    """Trained on an earlier layer, an adapter is drawn on it by the command, which reads its run; a base without is warned of."""
    run = build_run(
        {
            "output": str(tmp_path / "run"),
            "model": {"base": "tiny-sd15", "clip_skip": 1},
            "adapter": {"rank": 2, "text_encoder_targets": "many"},
            "data": {"source": "shapes"},
            "shapes": {"scenes": ["heart"], "num_pictures": 4},
            "optimizer": {"learning_rate": 5e-3},
            "training": {"steps": 2, "batch_size": 2},
            "evaluation": {
                "validate_every": 0,
                "validation_timesteps": 1,
                "prompts": [PROMPT],
                "num_inference_steps": 2,
            }
            | {"guidance_scale": 2.0, "negative_prompt": "a blue square"},
        }
    )
    result = train(run)
    assert read_metadata(adapter_file(run.output))["ss_clip_skip"] == "2"
    ours = np.asarray(draw(result.components, [PROMPT], run.evaluation)[0], int)

    def generate(*arguments: str) -> np.ndarray:
        words = [
            "-q",
            "generate",
            "--prompt",
            PROMPT,
            "--steps",
            "2",
            "--guidance",
            "2.0",
            "--adapter",
            str(run.output),
        ]
        number = len(list(tmp_path.glob("*.png")))
        done = CliRunner().invoke(app, [*words, "--out", str(tmp_path), *arguments])
        assert done.exit_code == 0, done.output
        return np.asarray(Image.open(tmp_path / f"{number:02d}.png"), int)

    away = ("--negative-prompt", "a blue square")
    assert abs(generate(*away) - ours).max() <= 1
    assert abs(generate() - ours).max() > 1
    assert "clip_skip" not in caplog.text
    components = load_base(run.model.model_copy(update={"clip_skip": 0}))
    load_adapter(components, run.output)
    assert "was trained with model.clip_skip 1, and the base has 0: set it to 1" in caplog.text
    assert abs(np.asarray(draw(components, [PROMPT], run.evaluation)[0], int) - ours).max() > 1
