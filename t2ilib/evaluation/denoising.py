"""What a network sees in the noise while it draws: its prediction of the picture, in chosen sampling steps, as a strip a prompt.

How predictions are had, `watching` says.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from t2ilib.config import EvaluationConfig
from t2ilib.evaluation.sampling import decode, draw, make_grid, shown_side, wrap
from t2ilib.evaluation.watching import Call, require_known_noise, watched
from t2ilib.models.components import Components

FEW = 8
"""Sampling steps of a strip where none are named."""
SIDE = 128
"""Pixels of a picture in a strip, at least, and half of what it is at most."""


@torch.no_grad()
def draw_denoising(
    components: Components, prompts: Sequence[str], settings: EvaluationConfig, resolution: int | None = None
) -> list[list[Image.Image]]:
    """For each prompt the pictures predicted in `chosen_steps(settings)`, in order, and last the picture that `draw` gives.

    Raises ConfigError for a scheduler that `require_known_noise` refuses.
    """
    steps = chosen_steps(settings)
    with predictions(components.scheduler, steps, settings.num_inference_steps) as found:
        pictures = draw(components, prompts, settings, resolution=resolution)
    predicted = [decode(components, found[step], settings.vae_tiling) for step in steps]
    return [[*strip, picture] for *strip, picture in zip(*predicted, pictures, strict=True)]


def chosen_steps(settings: EvaluationConfig) -> list[int]:
    """The sampling steps of a strip, from 1 on: those of `strip_steps`, or FEW of them, evenly, the first and the last included."""
    if settings.strip_steps:
        return sorted(set(settings.strip_steps))
    few = min(FEW, settings.num_inference_steps)
    return [1 + round(i * (settings.num_inference_steps - 1) / max(1, few - 1)) for i in range(few)]


@contextlib.contextmanager
def predictions(scheduler, steps: Sequence[int], num_inference_steps: int) -> Iterator[dict[int, list[Tensor]]]:
    """Step -> the predictions (B, C, h, w), float32 and on the host, of each batch that a pipeline draws within the scope.

    Where a scheduler calls the network more often than once a step (PNDM, Heun), the calls are shared out over the steps, and a step's
    last one counts.
    """
    require_known_noise(scheduler)
    found: dict[int, list[Tensor]] = {step: [] for step in steps}

    def note(call: Call) -> None:
        for step in found:
            if call.ends_step(step, num_inference_steps):
                found[step].append(call.predict().cpu())

    with watched(scheduler, note):
        yield found


def save_strips(
    strips: Sequence[Sequence[Image.Image]], steps: Sequence[int], prompts: Sequence[str], folder: Path
) -> Image.Image:
    """Writes a labelled strip a prompt (`00.png`, ...) and all of them, one below the other (`grid.png`), into `folder`; returns
    the latter. `strips`: as `draw_denoising` gives them for `steps`."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.png"):
        path.unlink()
    labels = [*(f"step {step}" for step in steps), "picture"]
    sheets = []
    for number, (strip, prompt) in enumerate(zip(strips, prompts, strict=True)):
        cell = shown_side(strip[0].width, SIDE, 2 * SIDE)
        sheets.append(titled(make_grid([strip], [""], labels, cell), prompt))
        sheets[-1].save(folder / f"{number:02d}.png")
    whole = Image.new("RGB", (sheets[0].width, sum(sheet.height for sheet in sheets)), "white")
    for number, sheet in enumerate(sheets):
        whole.paste(sheet, (0, sum(s.height for s in sheets[:number])))
    whole.save(folder / "grid.png")
    return whole


def titled(sheet: Image.Image, title: str) -> Image.Image:
    font, pad, line = ImageFont.load_default(14), 12, 18
    lines = wrap(title, font, sheet.width - 2 * pad)
    taller = Image.new("RGB", (sheet.width, sheet.height + pad + line * len(lines)), "white")
    taller.paste(sheet, (0, taller.height - sheet.height))
    for number, text in enumerate(lines):
        ImageDraw.Draw(taller).text((pad, pad + number * line), text, "black", font)
    return taller
