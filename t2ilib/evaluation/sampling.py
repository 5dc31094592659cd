"""Drawing: the pipeline a user would call, with one addressed generator a picture, so a picture depends on its own seed alone.

A picture of prompt i is the same whatever the batch size and whichever variant draws it: variants differ by their weights.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from t2ilib.config import EvaluationConfig
from t2ilib.memory import pictures_at_once
from t2ilib.models.components import Components
from t2ilib.models.pipeline import build_pipeline
from t2ilib.seeds import generator_for

DRAW_SEED = 0
"""Sample grids use the same starting noise in every run, so that runs can be compared picture by picture."""


@torch.no_grad()
def draw(
    components: Components,
    prompts: Sequence[str],
    settings: EvaluationConfig,
    seed: int = DRAW_SEED,
    batch_size: int = 32,
    resolution: int | None = None,
) -> list[Image.Image]:
    """One picture a prompt, in order. Modules are put in eval mode for drawing and back afterwards."""
    training = [module for module in components.modules().values() if module.training]
    for module in training:
        module.eval()
    size = {} if resolution is None else {"height": resolution, "width": resolution}
    options = {"num_inference_steps": settings.num_inference_steps, "guidance_scale": settings.guidance_scale, **size}
    batch_size = pictures_at_once(resolution or components.unet.config.sample_size * components.vae_scale, batch_size)
    pictures, latents = [], []
    with components.awake():
        pipeline = build_pipeline(components)
        for start in range(0, len(prompts), batch_size):
            part = list(prompts[start : start + batch_size])
            generators = [generator_for(seed, "picture", start + i) for i in range(len(part))]
            latents.append(pipeline(part, generator=generators, output_type="latent", **options).images.cpu())
    with components.awake("unet", "vae"):  # decoding is the peak: the text encoders make room for it
        for part in latents:
            decoded = components.decode_latents(part.to(components.device), settings.vae_tiling)
            pictures += pipeline.image_processor.postprocess(decoded)
    for module in training:
        module.train()
    return pictures


def make_grid(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    cell: int = 128,
    most_columns: int | None = None,
) -> Image.Image:
    """Pictures in rows and columns with their labels; small pictures are enlarged without smoothing to `cell` pixels.

    More than `most_columns` go on below, all rows anew: programs that show a wide picture small leave nothing to see.
    """
    if most_columns is not None and len(column_labels) > most_columns:
        starts = range(0, len(column_labels), most_columns)
        parts = [slice(start, start + most_columns) for start in starts]
        blocks = [make_grid([row[part] for row in rows], row_labels, column_labels[part], cell) for part in parts]
        sheet = Image.new("RGB", (max(b.width for b in blocks), sum(b.height for b in blocks)), "white")
        for number, block in enumerate(blocks):
            sheet.paste(block, (0, sum(b.height for b in blocks[:number])))
        return sheet
    font = ImageFont.load_default(12)
    pad, line = 6, 15
    label_width = max([int(font.getlength(label)) for label in row_labels] or [0]) + 2 * pad
    wrapped = [wrap(label, font, cell) for label in column_labels]
    header = line * max([len(lines) for lines in wrapped] or [0]) + 2 * pad
    width, height = label_width + len(column_labels) * (cell + pad), header + len(rows) * (cell + pad)
    grid = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(grid)
    for column, lines in enumerate(wrapped):
        for number, text in enumerate(lines):
            pen.text((label_width + column * (cell + pad), pad + number * line), text, "black", font)
    for row, (label, pictures) in enumerate(zip(row_labels, rows, strict=True)):
        top = header + row * (cell + pad)
        pen.text((pad, top + cell // 2 - line // 2), label, "black", font)
        for column, picture in enumerate(pictures):
            sampling = Image.Resampling.NEAREST if picture.width < cell else Image.Resampling.LANCZOS
            grid.paste(picture.resize((cell, cell), sampling), (label_width + column * (cell + pad), top))
    return grid


def wrap(text: str, font, width: int) -> list[str]:
    lines, current = [], ""
    for word in text.split():
        joined = f"{current} {word}".strip()
        if current and font.getlength(joined) > width:
            lines.append(current)
            current = word
        else:
            current = joined
    return [*lines, current]


def save_pictures(pictures: Sequence[Image.Image], folder: Path, after: bool = False) -> None:
    """Writes 00.png, 01.png, ... into `folder`; `after`: behind the numbers that are there, instead of over them."""
    folder.mkdir(parents=True, exist_ok=True)
    taken = [int(path.stem) for path in folder.glob("*.png") if path.stem.isdecimal()] if after else []
    for number, picture in enumerate(pictures, max(taken, default=-1) + 1):
        picture.save(folder / f"{number:02d}.png")


def load_pictures(folder: Path) -> list[Image.Image]:
    """The pictures that `save_pictures` wrote, in order."""
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"), key=lambda path: int(path.stem))]
