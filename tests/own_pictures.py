"""What the tests of measures without a checker share: a folder of ten pictures, and an embedding model that reads a picture's mean colour."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from t2ilib.evaluation.context import Context
from t2ilib.runfile import build_run
from t2ilib.shapes import world

CPU = SimpleNamespace(device=torch.device("cpu"))
"""All that these measures ask of components, where the base's pictures are there."""


class Colours:
    """Pictures -> the direction of their mean colour, away from grey."""

    name = "colours"

    def __call__(self, pictures):
        found = np.stack(
            [np.asarray(picture.convert("RGB"), float).reshape(-1, 3).mean(0) - 128 for picture in pictures]
        )
        return found / np.linalg.norm(found, axis=1, keepdims=True)


def plain(*colour: int) -> Image.Image:
    return Image.new("RGB", (16, 16), colour)


def shades(count: int, seed: int, around: tuple[int, int, int] = (200, 60, 60), spread: int = 50) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [
        plain(*(int(c) for c in np.clip(around + rng.integers(-spread, spread + 1, 3), 0, 255))) for _ in range(count)
    ]


def context_of(group: str, run=None, **shared) -> Context:
    """`real`: (training, held out); `base`: prompts -> what the base draws."""
    known = {"embedders": [Colours()], "real": shared.get("real"), "base pictures": shared.get("base", {})}
    return Context(group, run, CPU, None, known)


@pytest.fixture
def ten(tmp_path):
    """A folder of ten captioned pictures."""
    return world.write_folder(tmp_path / "ten", world.mixed_scenes(10, "train", 0, ["heart"]), 0)


def run_on(folder, **sections):
    """A short run on a folder of pictures, judged by groups of prompts; its settings can be changed section by section."""
    (folder.parent / "run").mkdir(exist_ok=True)
    values = {
        "output": str(folder.parent / "run"),
        "adapter": {"rank": 2},
        "data": {"path": str(folder), "validation_share": 0.25},
        "optimizer": {"learning_rate": 3e-2},
        "training": {"steps": 3, "batch_size": 2},
        "evaluation": {
            "validate_every": 0, "sample_every": 0, "validation_timesteps": 1, "num_inference_steps": 1, "guidance_scale": 1.0, "animation": "none",
            "prompt_groups": {"contexts": ["a heart", "a small heart"], "unrelated": ["a red circle", "a blue square"]},
        },
    }  # fmt: skip
    return build_run(
        {
            name: {**values.get(name, {}), **own} if isinstance(own, dict) else own
            for name, own in (values | sections).items()
        }
    )
