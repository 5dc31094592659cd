"""What a run drew while it learned, as animated files: one for each prompt, and one of all of them.

Made of the pictures that lie in the run's folder, so that what is shown is the whole run, however often it was interrupted. GIF plays
everywhere and has 256 colours, which here are one palette for all frames: with one for each, areas that stand still would flicker.
WebP has all colours.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from t2ilib.evaluation.sampling import make_grid, shown_side

log = logging.getLogger(__name__)

MOST_FRAMES = 60
SECONDS, FASTEST, SLOWEST, HELD = 12.0, 0.1, 0.6, 2.5
"""An animation takes so long, where frames then stay neither less than FASTEST nor more than SLOWEST; the last is HELD."""
GRID_SIDE, SINGLE_SIDE, LARGEST_SIDE = 128, 256, 512
"""Pixels of a picture in the grid, and alone: small ones are enlarged to at least these, large ones alone are LARGEST_SIDE at most."""
PAD, LINE, BAR = 6, 15, 4
PALETTE_PIXELS = 2**18
"""Of all frames together that the colours of a GIF are chosen from."""


def animate(drawn: Mapping[int, Path], prompts: Sequence[str], folder: Path, kind: str) -> list[Path]:
    """Writes `grid` and `00`, `01`, ... (a file each prompt) into `folder`, as `kind` ("gif" or "webp"); returns their paths.

    `drawn`: step -> folder with `00.png`, ... of these prompts. Of more than MOST_FRAMES steps some are left out, evenly.
    """
    steps = thinned(sorted(drawn))
    if len(steps) < len(drawn):
        log.info("the animation shows %d of %d sampled steps, evenly", len(steps), len(drawn))
    folder.mkdir(parents=True, exist_ok=True)
    for path in (*folder.glob("*.gif"), *folder.glob("*.webp")):
        path.unlink()

    def picture(step: int, number: int) -> Image.Image:
        with Image.open(drawn[step] / f"{number:02d}.png") as found:
            return found.convert("RGB")

    def grid(step: int) -> Image.Image:
        pictures = [picture(step, number) for number in range(len(prompts))]
        cell = shown_side(pictures[0].width, GRID_SIDE, GRID_SIDE)
        return make_grid([pictures], [""], prompts, cell, most_columns=4)

    def single(step: int, number: int) -> Image.Image:
        found = picture(step, number)
        cell = shown_side(found.width, SINGLE_SIDE, LARGEST_SIDE)
        return make_grid([[found]], [""], [prompts[number]], cell)

    written = [folder / f"grid.{kind}"]
    write_animation([with_step(grid(step), step, steps[-1]) for step in steps], written[0])
    for number in range(len(prompts)):
        written.append(folder / f"{number:02d}.{kind}")
        write_animation([with_step(single(step, number), step, steps[-1]) for step in steps], written[-1])
    return written


def thinned(steps: Sequence[int], most: int = MOST_FRAMES) -> list[int]:
    """At most so many of the steps, evenly; the first and the last are kept."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def with_step(frame: Image.Image, step: int, last: int) -> Image.Image:
    """`frame` with the step written above it, and a bar that says how far that is."""
    head = LINE + 2 * PAD
    sheet = Image.new("RGB", (frame.width, frame.height + head + BAR), "white")
    sheet.paste(frame, (0, head + BAR))
    pen = ImageDraw.Draw(sheet)
    pen.text((2 * PAD, PAD), f"step {step}", "black", ImageFont.load_default(13))
    pen.rectangle((0, head, frame.width, head + BAR - 1), fill="#dddddd")
    if step:
        pen.rectangle((0, head, round((frame.width - 1) * step / last), head + BAR - 1), fill="#3366cc")
    return sheet


def write_animation(frames: Sequence[Image.Image], path: Path) -> None:
    """Writes frames of one size (RGB) as an animation without end, whose last frame is held."""
    pause = min(max(SECONDS / len(frames), FASTEST), SLOWEST)
    seconds = [pause] * (len(frames) - 1) + [HELD]
    told = {"save_all": True, "duration": [round(1000 * s) for s in seconds], "loop": 0}
    if path.suffix == ".gif":
        palette = shared_palette(frames)
        frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
        frames[0].save(path, append_images=frames[1:], optimize=False, **told)
    else:
        frames[0].save(path, append_images=frames[1:], quality=90, **told)


def shared_palette(frames: Sequence[Image.Image]) -> Image.Image:
    """A picture whose palette of 256 colours is chosen for all frames together."""
    pixels = sum(frame.width * frame.height for frame in frames)
    shrink = max(1.0, (pixels / PALETTE_PIXELS) ** 0.5)
    size = round(frames[0].width / shrink), round(frames[0].height / shrink)
    sheet = Image.new("RGB", (size[0], size[1] * len(frames)))
    for number, frame in enumerate(frames):
        sheet.paste(frame.resize(size, Image.Resampling.NEAREST), (0, number * size[1]))
    return sheet.quantize(256)
