"""What part of a picture, at what size, is a sample: sizes of about equal area, which picture gets which of them, crop and flip.

Sizes are (height, width) in pixels throughout. Nothing here opens a picture, so it is known before anything is decoded what will be
asked of it, for a hundred thousand pictures at once.

Buckets. The geometry is SDXL's (arXiv 2307.01952, app. I), which diffusers has as tables (`ASPECT_RATIO_*_BIN` of its PixArt
pipelines) for 256, 512 and 1024; here it is a rule, for any resolution. `diffusers.training_utils.generate_aspect_ratio_buckets` is not
taken: only new versions have it, it has eleven aspect ratios at any resolution, it rounds sides to the nearest multiple, so that at 512 a
bucket needs 3 % more memory than the square that was planned for, and it takes torch to import. The nearest bucket is the nearest
in the logarithm of the aspect ratio. `find_nearest_bucket` compares h * W - w * H, which grows with the bucket, and gives the same
order only as far as all have one area (of 3,001 ratios from 1:2 to 2:1 at 1024, 8 fall otherwise), a picture at a time;
`VaeImageProcessor.classify_height_width_bin` compares h / w itself, for which 1:2 is nearer to the square than 2:1 is.

Leaves out: padding. A picture always covers its target.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from t2ilib.config import ConfigError

Size = tuple[int, int]
"""(height, width)"""
MULTIPLE = 64
"""Of the sides of buckets, from 512 pixels on. SDXL was trained on multiples of 64, and SD1.5's UNet halves latents of an eighth thrice."""
STEPS = 8
"""Smaller pictures have smaller multiples, so that a side has this many, and none under 8, a pixel of the latents."""
LONGEST = 2
"""The longer side of a bucket, in shorter ones."""
SMALLEST = 0.9
"""The least area of a bucket, in squares of the resolution; none is larger than the square."""


def default_multiple(resolution: int) -> int:
    """The largest power of two from 8 to 64 that divides `resolution` at least eight times, and 8 without one."""
    fitting = [m for m in (64, 32, 16, 8) if resolution % m == 0 and resolution // m >= STEPS]
    return min(MULTIPLE, fitting[0]) if fitting else 8


def bucket_sizes(resolution: int, multiple: int | None = None) -> list[Size]:
    """Sizes from 1:2 to 2:1 of 0.9 to 1 times `resolution` squared pixels, widest first, the square among them.

    `multiple`: of both sides; what the model needs is 8 times 2 for each of the UNet's downsamplings (32 for SDXL, 64 for SD1.5).
    None: `default_multiple`. At 1024 they are SDXL's own (arXiv 2307.01952, app. I), of each height the one with the most pixels, and
    the nearest cuts off at most 9 % of a picture from 1:2 to 2:1. Raises ConfigError where the square is no multiple.
    """
    step = multiple or default_multiple(resolution)
    if resolution % step:
        below = resolution // step * step
        raise ConfigError(
            f"data.resolution: with data.buckets this model needs a multiple of {step}, and {resolution} is none: set it to"
            f" {f'{below} or ' * (below > 0)}{below + step}"
        )
    area, sizes = resolution**2, {(resolution, resolution)}
    for short in range(step, resolution, step):
        long = min(area // short, LONGEST * short) // step * step
        if short * long >= SMALLEST * area:
            sizes |= {(short, long), (long, short)}
    return sorted(sizes, key=lambda size: size[0] / size[1])


@dataclass(frozen=True)
class Assignment:
    """`targets`: (N, 2), the size of each picture's samples. `moved`: (N,) bool, pictures that would have had another, of which there
    were fewer than a batch, and which are cropped more."""

    targets: np.ndarray
    moved: np.ndarray


def assign(
    sizes: np.ndarray | Sequence[Size],
    resolution: int,
    batch_size: int,
    buckets: bool,
    multiple: int | None = None,
    repeats: np.ndarray | Sequence[int] | None = None,
) -> Assignment:
    """What size the samples of each picture have. `sizes`: (N, 2), heights and widths of the upright pictures.

    Without `buckets` all are squares of `resolution`. With them each has the nearest of `bucket_sizes` in the logarithm of height by
    width; sizes with fewer than `batch_size` pictures, each counted as often as `repeats` says, are dissolved: their pictures go to the
    nearest of the sizes that have enough, and where none has, all go to that of most pictures.
    """
    sizes = np.asarray(sizes, dtype=np.int64).reshape(-1, 2)
    if not buckets or not len(sizes):
        return Assignment(np.full_like(sizes, resolution), np.zeros(len(sizes), bool))
    ladder = np.array(bucket_sizes(resolution, multiple))
    ratios, steps = (np.log(values[:, 0] / values[:, 1]) for values in (sizes, ladder))
    first = nearest(ratios, steps)
    counts = np.bincount(first, weights=repeats, minlength=len(ladder))
    kept = np.flatnonzero(counts >= batch_size)
    if not len(kept):
        kept = np.lexsort((np.abs(steps), -counts))[:1]  # of equally many, the one nearest to the square
    final = kept[nearest(ratios, steps[kept])]
    return Assignment(ladder[final], final != first)


def nearest(values: np.ndarray, points: np.ndarray) -> np.ndarray:
    """For each value the index of the nearest of `points`, which ascend."""
    return np.searchsorted((points[1:] + points[:-1]) / 2, values)


def magnification(sizes: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(N,): by how much each picture (N, 2) is scaled to cover its target (N, 2). Above 1 it is smaller than its sample."""
    return (np.asarray(targets) / np.asarray(sizes)).max(axis=1)


def share_cut(sizes: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(N,): what share of each picture (N, 2) lies outside its crop."""
    scale = np.asarray(targets) / np.asarray(sizes)
    return 1 - scale.min(axis=1) / scale.max(axis=1)


@dataclass(frozen=True)
class View:
    """A picture is scaled to `scaled`, of which the part at `top` and `left` of `size` is taken, and mirrored if `flipped`."""

    scaled: Size
    top: int
    left: int
    size: Size
    flipped: bool = False

    @property
    def crop(self) -> Size:
        """SDXL's crop conditioning (top, left) of what the network sees: in scaled pixels, and in the mirrored picture where it is mirrored.

        The paper (arXiv 2307.01952, sec. 2.2) resizes, then draws the crop, and conditions on the pixels cut off at top and
        left; neither it nor Stability's published loader (datapipelines' AddOriginalImageSizeAsTupleAndCropToSquare) mirrors. What is cut
        off at the left of a mirrored picture was cut off at its right. So do diffusers' train_text_to_image_sdxl.py, its LoRA form and
        train_dreambooth_lora_sdxl.py, which mirror before they crop. Its older versions and train_lcm_distill_lora_sdxl.py cropped
        first and took `width of the crop - left`, which is neither edge. Kohya's sd-scripts mirror the edge too, but it is that
        of the picture fitted into the bucket, not of the crop, and random crops do not change it.
        """
        return self.top, self.scaled[1] - self.left - self.size[1] if self.flipped else self.left

    def part_of(self, width: float, height: float) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of what is taken, in a picture that is `width` x `height` pixels large before it is scaled."""
        across, down = width / self.scaled[1], height / self.scaled[0]
        bottom, right = self.top + self.size[0], self.left + self.size[1]
        return self.left * across, self.top * down, right * across, bottom * down


def view_of(
    original: Size,
    target: Size,
    crop: Literal["center", "random"] = "center",
    flip: float = 0.0,
    generator: np.random.Generator | None = None,
) -> View:
    """The part of a picture of size `original` (upright) that is a sample of size `target`: scaled until it covers the target.

    Three numbers are drawn from `generator`, whatever is asked for: where the crop lies from top and left, among all pixels at which it
    can, and whether it is mirrored, with probability `flip`. Raises ValueError where chance is asked for without a generator.
    """
    if generator is None and (crop == "random" or 0 < flip < 1):
        raise ValueError("random crops and flips need a generator")
    (height, width), (rows, columns) = original, target
    scale = max(rows / height, columns / width)
    scaled = max(rows, round(height * scale)), max(columns, round(width * scale))
    free = scaled[0] - rows, scaled[1] - columns
    down, across, mirror = generator.random(3) if generator is not None else (0.5, 0.5, 0.5)
    if crop == "random":
        top, left = int(down * (free[0] + 1)), int(across * (free[1] + 1))
    else:
        top, left = free[0] // 2, free[1] // 2
    return View(scaled, top, left, (rows, columns), bool(mirror < flip))
