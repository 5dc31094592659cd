"""Whether a run so surely fits that tracing it would be a waste of time: a crude bound from file headers alone, without torch."""

import json
from math import prod
from pathlib import Path

from t2ilib.config import RunConfig
from t2ilib.memory import pictures_at_once
from t2ilib.models.files.headers import read_header

SHIPPED = Path(__file__).parents[1] / "models" / "weights"
TEXT_TOKENS, CAPTIONS, PICTURES = 77, 64, 32
"""Of a caption, and what is encoded or drawn at once at the most."""
SMALL_SHARE = 0.5
"""A run whose bound is under this share of what is available is not traced."""


COPIES = 7
"""Of every weight in float32, as if all were trained: itself, its gradient, at most Prodigy's four, and the base as it was beside it."""


TENSORS_A_LAYER = 8
"""Of a layer's output in float32: the output, its norm, activation, their casts and gradients, with room."""


def memory_bound(run: RunConfig) -> int | None:
    """A crude upper bound, in bytes, on what training `run` can take, from the headers of its base's weight files alone; None
    where they do not lie in a folder here, and for a network from scratch, which has no file yet.

    As if everything were float32 and trained, every layer's output were kept TENSORS_A_LAYER times over, and no block worked at
    less than the full size of the latents. Many times the truth, and enough to tell a small model from one that must be traced
    (`planning`) in a millisecond; no torch is imported.
    """
    if run.scratch is not None:
        return None
    shipped, named = SHIPPED / run.model.base, Path(run.model.base).expanduser()
    folder = shipped if shipped.is_dir() else named
    parts = ("unet", "vae", "text_encoder", "text_encoder_2")
    try:
        shapes = {
            part: {
                name: tensor.shape
                for path in sorted((folder / part).glob("*.safetensors"))
                for name, tensor in read_header(path, "").items()
            }
            for part in parts
        }
        levels = len(json.loads((folder / "vae" / "config.json").read_text())["block_out_channels"])
    except (OSError, ValueError, KeyError):  # damaged: loading it will say so
        return None
    if not all(shapes[part] for part in ("unet", "vae", "text_encoder")):
        return None
    weights = 4 * sum(prod(shape) for part in shapes.values() for shape in part.values())
    widths = {
        name: [shape[0] for key, shape in part.items() if len(shape) > 1 and "embedding" not in key] or [0]
        for name, part in shapes.items()
    }
    pixels, batch = run.data.resolution**2, run.training.batch_size
    activations = {
        "unet": batch * pixels // 4 ** (levels - 1) * sum(widths["unet"]),
        "text": max(batch, CAPTIONS) * TEXT_TOKENS * sum(widths["text_encoder"] + widths["text_encoder_2"]),
        "vae": pixels * pictures_at_once(run.data.resolution, PICTURES) * max(widths["vae"]),
    }
    return COPIES * weights + 4 * TENSORS_A_LAYER * sum(activations.values())


def surely_fits(run: RunConfig, available: float) -> bool:
    """Whether the crude bound is so far below the `available` bytes that tracing the run would be a waste of time."""
    bound = memory_bound(run)
    return bound is not None and bound < SMALL_SHARE * available
