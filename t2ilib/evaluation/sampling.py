"""Drawing: the pipeline a user would call, with one addressed generator a picture, so a picture depends on its own seed alone.

A picture of prompt i is the same whatever the batch size and whichever variant draws it: variants differ by their weights.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from t2ilib.config import EvaluationConfig
from t2ilib.evaluation.watching import Look, watched
from t2ilib.memory import pictures_at_once
from t2ilib.models.components import Components
from t2ilib.models.pipeline import build_pipeline
from t2ilib.seeds import generator_for

DRAW_SEED = 0
"""Sample grids use the same starting noise in every run, so that runs can be compared picture by picture."""
ROW_LABEL = 240
"""Pixels after which the label of a grid's row goes on in a new line."""


@torch.no_grad()
def draw(
    components: Components,
    prompts: Sequence[str],
    settings: EvaluationConfig,
    seed: int = DRAW_SEED,
    batch_size: int = 32,
    resolution: int | None = None,
    first: int = 0,
    *,
    size: tuple[int, int] | None = None,
    noise: Sequence[tuple[int, int]] | None = None,
    scheduler: Any = None,
    look: Look | None = None,
) -> list[Image.Image]:
    """One picture a prompt, in order, from noise by number, `first` and on. Modules are put in eval mode for drawing and back afterwards.
    What the settings leave to their defaults, a model that is drawn in a way of its own says (`Components.drawn_by`).

    `size`: (width, height) in pixels, in place of `resolution`. `noise`: of each picture seed and number, in place of `seed` and `first`.
    `scheduler`: draws in place of the base's own. `look`: is called at every call of the network (see `watching`); what it raises ends
    the drawing.
    """
    settings = drawn_as(components, settings)
    noise = noise or [(seed, first + i) for i in range(len(prompts))]
    sides = size or (resolution or components.native_side,) * 2
    at_once = pictures_at_once(math.ceil(math.sqrt(math.prod(sides))), batch_size)
    options = {"num_inference_steps": settings.num_inference_steps, "guidance_scale": settings.guidance_scale}
    if size or resolution:
        options |= {"width": sides[0], "height": sides[1]}
    latents = []
    with evaluating(components), components.awake():
        pipeline = build_pipeline(components, scheduler)
        with watched(pipeline.scheduler, look) if look else contextlib.nullcontext():
            for start in range(0, len(prompts), at_once):
                part = list(prompts[start : start + at_once])
                generators = [generator_for(s, "picture", number) for s, number in noise[start : start + at_once]]
                if settings.negative_prompt:  # else the pipeline's own, which for some bases is zeros
                    options["negative_prompt"] = [settings.negative_prompt] * len(part)
                latents.append(pipeline(part, generator=generators, output_type="latent", **options).images.cpu())
    return decode(components, latents, settings.vae_tiling)


def drawn_as(components: Components, settings: EvaluationConfig) -> EvaluationConfig:
    """The settings with steps and guidance of how the model is drawn, where none were given."""
    drawn, names = components.drawn_by, {"num_inference_steps", "guidance_scale"} - settings.model_fields_set
    return settings.model_copy(update=drawn.model_dump(include=names)) if drawn else settings


@contextlib.contextmanager
def evaluating(components: Components) -> Iterator[None]:
    """All modules in eval mode for as long as the scope lasts, and then as they were."""
    training = [module for module in components.modules().values() if module.training]
    for module in training:
        module.eval()
    try:
        yield
    finally:
        for module in training:
            module.train()


def decode(components: Components, latents: Sequence[torch.Tensor], tiled: bool = False) -> list[Image.Image]:
    """Pictures of batches of latents (B, C, h, w), in order."""
    pictures = []
    with components.awake("unet", "vae"):  # decoding is the peak: the text encoders make room for it
        for part in latents:
            decoded = components.decode_latents(part.to(components.device), tiled)
            pictures += VaeImageProcessor().postprocess(decoded)
    return pictures


def make_grid(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    cell: int = 128,
    most_columns: int | None = None,
) -> Image.Image:
    """Pictures in rows and columns with their labels. Each keeps its proportions, its longer side `cell` pixels; small ones are enlarged
    without smoothing.

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
    sizes = [fitted(picture, cell) for pictures in rows for picture in pictures] or [(cell, cell)]
    across, down = max(width for width, _ in sizes), max(height for _, height in sizes)
    beside = [wrap(label, font, ROW_LABEL) for label in row_labels]
    label_width = max([int(font.getlength(text)) for lines in beside for text in lines] or [0]) + 2 * pad
    wrapped = [wrap(label, font, across) for label in column_labels]
    header = line * max([len(lines) for lines in wrapped] or [0]) + 2 * pad
    width, height = label_width + len(column_labels) * (across + pad), header + len(rows) * (down + pad)
    grid = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(grid)
    for column, lines in enumerate(wrapped):
        for number, text in enumerate(lines):
            pen.text((label_width + column * (across + pad), pad + number * line), text, "black", font)
    for row, (lines, pictures) in enumerate(zip(beside, rows, strict=True)):
        top = header + row * (down + pad)
        for number, text in enumerate(lines):
            pen.text((pad, top + down // 2 - line // 2 * len(lines) + number * line), text, "black", font)
        for column, picture in enumerate(pictures):
            sampling = Image.Resampling.NEAREST if max(picture.size) < cell else Image.Resampling.LANCZOS
            shown = picture.resize(fitted(picture, cell), sampling)
            grid.paste(shown, (label_width + column * (across + pad), top))
    return grid


def fitted(picture: Image.Image, cell: int) -> tuple[int, int]:
    """Width and height of a picture whose longer side is `cell` pixels."""
    longer = max(picture.size)
    return tuple(max(1, round(side * cell / longer)) for side in picture.size)


def shown_side(side: int, least: int, most: int) -> int:
    """Pixels at which a picture of `side` is shown: the first whole multiple that is `least` or more; of a large one, `most`."""
    return side * -(-least // side) if side < least else min(side, most)


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


def save_pictures(
    pictures: Sequence[Image.Image], folder: Path, after: bool = False, texts: Sequence[Mapping[str, str]] | None = None
) -> list[Path]:
    """Writes 00.png, 01.png, ... into `folder`, and returns their paths; `after`: behind the numbers that are there, instead of over them.

    `texts`: of each picture what its file says of it, as text chunks (PNG specification, section 11.3.3), key -> text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    start = next_number(folder) if after else 0
    paths = [folder / f"{number:02d}.png" for number in range(start, start + len(pictures))]
    for path, picture, text in zip(paths, pictures, texts or [{}] * len(pictures), strict=True):
        save_png(picture, path, text)
    return paths


def next_number(folder: Path) -> int:
    """The first behind all numbers that pictures in `folder` have."""
    return 1 + max((int(path.stem) for path in folder.glob("*.png") if path.stem.isdecimal()), default=-1)


def free_path(folder: Path) -> Path:
    """The path of a picture behind those that are in `folder`, taken by an empty file, so that nobody who saves at the same time gets it too."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(next_number(folder)):
        with contextlib.suppress(FileExistsError):
            path = folder / f"{number:02d}.png"
            path.touch(exist_ok=False)
            return path


def save_png(picture: Image.Image, path: Path, texts: Mapping[str, str]) -> None:
    """Writes a PNG with text chunks: tEXt where a text is Latin-1, iTXt where it is not."""
    chunks = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        chunks.add_text(key, text)
    picture.save(path, pnginfo=chunks)


def load_pictures(folder: Path) -> list[Image.Image]:
    """The pictures that `save_pictures` wrote, in order."""
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"), key=lambda path: int(path.stem))]
