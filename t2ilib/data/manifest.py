"""What a run was trained on: every picture decoded once in full, every rejection counted, one digest over it all.

`Image.verify` passes half a JPEG, so each picture is really decoded. Whether a bad picture stops the run or is rejected is
the user's choice (`data.on_error`); in both cases the message names all of them.
"""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from t2ilib.config import ConfigError, RunConfig
from t2ilib.data.sources import folder
from t2ilib.data.sources.folder import Record
from t2ilib.shapes import source as shapes

log = logging.getLogger(__name__)

SOURCES: dict[str, Callable[[RunConfig], tuple[list[Record], list[Record]]]] = {
    "folder": lambda run: folder.load(run.data),
    "shapes": lambda run: shapes.load(run.shapes),
}
"""`data.source` -> the training and the held-out records of a run."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")


@dataclass(frozen=True)
class Dataset:
    """Records whose pictures are known to decode. `digest` covers the bytes of pictures and captions, in order."""

    name: str
    records: tuple[Record, ...]
    digest: str
    rejected: tuple[tuple[Path, str], ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    def captions(self) -> list[str]:
        return [record.caption for record in self.records]


@dataclass(frozen=True)
class Picture:
    """Pixels (H, W, 3) uint8 at the training resolution, and SDXL's micro-conditioning in pixels."""

    pixels: np.ndarray
    original: tuple[int, int]
    crop: tuple[int, int]


def open_picture(path: Path) -> Image.Image:
    """The picture, fully decoded, upright by its EXIF tag, RGB. Raises OSError for a missing or corrupt one."""
    with Image.open(path, formats=FORMATS) as image:
        image.load()
        return ImageOps.exif_transpose(image).convert("RGB")


def load_picture(path: Path, resolution: int) -> Picture:
    """Scaled so that the shorter side is `resolution`, cut to the centre square."""
    image = open_picture(path)
    original = (image.height, image.width)
    scale = resolution / min(original)
    if scale != 1:
        size = (max(resolution, round(image.width * scale)), max(resolution, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    top, left = (image.height - resolution) // 2, (image.width - resolution) // 2
    image = image.crop((left, top, left + resolution, top + resolution))
    return Picture(np.asarray(image), original, (top, left))


def examine(name: str, records: list[Record], on_error: str) -> Dataset:
    """Decodes every picture; raises ConfigError that lists the bad ones, or rejects them with `on_error` "skip"."""
    good, bad = [], []
    digest = hashlib.sha256()
    for record in records:
        try:
            open_picture(record.path)
        except FileNotFoundError:
            bad.append((record.path, "missing"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            bad.append((record.path, f"cannot be decoded: {error}"))
        else:
            good.append(record)
            digest.update(hashlib.sha256(record.path.read_bytes()).digest() + record.caption.encode() + b"\0")
    if bad:
        listed = "\n  ".join(f"{path}: {reason}" for path, reason in bad[:10]) + ("\n  ..." if len(bad) > 10 else "")
        if on_error == "stop" or not good:
            raise ConfigError(
                f"{len(bad)} of {len(records)} pictures cannot be used:\n  {listed}\n"
                "Repair or remove them, or set data.on_error to skip to train without them"
            )
        log.warning("%d of %d pictures rejected:\n  %s", len(bad), len(records), listed)
    return Dataset(name, tuple(good), digest.hexdigest(), tuple(bad))


def load_datasets(run: RunConfig) -> tuple[Dataset, Dataset]:
    """The training and the held-out pictures of a run; the second may be empty. Raises ConfigError as the sources do."""
    training, held_out = SOURCES[run.data.source](run)
    name = Path(run.data.path).name if run.data.path else "-".join((run.data.source, *run.shapes.scenes))
    on_error = run.data.on_error
    return examine(name, training, on_error), examine(f"{name}-held-out", held_out, on_error)
