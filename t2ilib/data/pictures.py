"""A picture file becomes what a viewer shows, as RGB, or is refused by name: the one place that knows Pillow's modes and errors.

Alpha is composed onto a stated ground, for the colours left under it are never meant to be seen. Greys of 16 bits are scaled by
their range, which Pillow's own conversion cuts off at 255. Of an animated picture it is the first frame. Files are hostile until
decoded, so formats are a stated list of raster formats, and whatever Pillow and its plugins raise becomes one `PictureError`.
Leaves out colour profiles and gamma: the numbers of a picture are taken as sRGB.
"""

import contextlib
import functools
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from t2ilib.text import shown

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI")
"""What is read, where the installed Pillow can. Others are documents, icons, textures and scientific data."""
UNREAD_SUFFIXES = frozenset(
    (".avif", ".heic", ".heif", ".hif", ".jxl", ".svg", ".psd", ".xcf", ".ico", ".icns", ".tga", ".dds", ".exr", ".hdr",
     ".pcx", ".eps", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf")
)  # fmt: skip
"""Endings of pictures that are not read, so that a folder that holds some is told so."""
PLAIN = frozenset(("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"))
WITH_ALPHA = frozenset(("LA", "PA", "RGBA", "RGBa"))
SIXTEEN_BIT = frozenset(("I;16", "I;16L", "I;16B", "I;16N"))
WHITE_IS_ZERO, PHOTOMETRIC, BITS_PER_SAMPLE = 0, 262, 258  # of TIFF 6.0


class PictureError(ValueError):
    """A picture that cannot be used: `path` and `reason`."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{shown(path)}: {reason}")
        self.path, self.reason = path, reason


@dataclass(frozen=True)
class Picture:
    """Pixels (H, W, 3) uint8 at the training resolution, and SDXL's micro-conditioning in pixels."""

    pixels: np.ndarray
    original: tuple[int, int]
    crop: tuple[int, int]


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Those of FORMATS that the installed Pillow opens. MPO has no opener: a JPEG may turn out to be one."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@functools.cache
def picture_suffixes() -> frozenset[str]:
    """Endings, in lower case, of files that people mean as pictures; whether one can be read shows when it is decoded."""
    return UNREAD_SUFFIXES | {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}


def open_picture(path: Path, ground: str = "white") -> Image.Image:
    """The picture, fully decoded, upright by its EXIF tag, RGB, what is transparent in it over the colour `ground`.

    Raises PictureError for one that is missing, corrupt, larger than Pillow's limit against decompression bombs, or in a format or
    mode that is not read.
    """
    colour = ImageColor.getrgb(ground)[:3]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=readable_formats()) as image:
                darkest, brightest = grey_range(image)
                mend_transparency(image)
                image.load()
                upright = ImageOps.exif_transpose(image)
                return compose(scale_greys(upright, darkest, brightest), colour)
    except FileNotFoundError:
        raise PictureError(path, "missing") from None
    except UnidentifiedImageError:
        raise PictureError(path, f"cannot be decoded: {unidentified(path)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise PictureError(
            path,
            f"cannot be decoded: it has more than {Image.MAX_IMAGE_PIXELS} pixels, Pillow's limit: make it smaller",
        ) from None
    except Exception as error:  # what a plugin's parser meets: struct.error, EOFError, KeyError, MemoryError
        told = str(error) or type(error).__name__
        raise PictureError(path, f"cannot be decoded: {told}") from error


def grey_range(image: Image.Image) -> tuple[float, float]:
    """The values of black and white of a grey picture of more than 8 bits, which only its file's format tells."""
    if image.mode == "F":
        white = 1.0
    elif image.mode == "I" and image.format != "PPM":
        raise ValueError("32-bit integers (Pillow's mode I) do not say which value is white: save it with 8 or 16 bits")
    else:
        white = 65535.0
    tags = getattr(image, "tag_v2", {})
    if image.mode in SIXTEEN_BIT and BITS_PER_SAMPLE in tags:
        white = 2.0 ** tags[BITS_PER_SAMPLE][0] - 1
    inverted = image.mode in SIXTEEN_BIT | {"F"} and tags.get(PHOTOMETRIC) == WHITE_IS_ZERO
    return (white, 0.0) if inverted else (0.0, white)


def mend_transparency(image: Image.Image) -> None:
    """PNG's transparent colour is told in the file's own depth (PNG 1.2, 4.2.1.1), and Pillow gives 2, 4 and 16 bits as 8."""
    key = image.info.get("transparency")
    depth = image.tile[0].args if image.format == "PNG" and image.tile else None
    if isinstance(key, int) and depth in ("L;2", "L;4"):
        image.info["transparency"] = key * {"L;2": 85, "L;4": 17}[depth]
    elif isinstance(key, tuple) and depth == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in key)


def scale_greys(image: Image.Image, black: float, white: float) -> Image.Image:
    """Greys of more than 8 bits as L, or LA where one of their values is transparent; other pictures as they are."""
    if image.mode not in SIXTEEN_BIT | {"I", "F"}:
        return image
    values = np.asarray(image)
    if image.mode == "F" and not (values.min() >= 0 and values.max() <= 1):
        raise ValueError(
            f"floats (Pillow's mode F) from {values.min():g} to {values.max():g}, and 1 is white: save it with 8 or 16 bits"
        )
    scaled = (values.astype(np.float64) - black) * (255 / (white - black))
    grey = Image.fromarray(np.clip(np.rint(scaled), 0, 255).astype(np.uint8))
    if "transparency" in image.info:
        opaque = np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)
        grey = Image.merge("LA", (grey, Image.fromarray(opaque)))
    return grey


def compose(image: Image.Image, ground: tuple[int, int, int]) -> Image.Image:
    """RGB, over `ground` where the picture is transparent; raises ValueError for a mode that is none of those people see."""
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in WITH_ALPHA or (image.mode in PLAIN and image.has_transparency_data):
        below = Image.new("RGBA", image.size, (*ground, 255))
        return Image.alpha_composite(below, image.convert("RGBA")).convert("RGB")
    if image.mode in PLAIN:
        return image.convert("RGB")
    raise ValueError(f"Pillow's mode {image.mode} is not read: save it as RGB")


def unidentified(path: Path) -> str:
    """What is the matter with a file that none of the readable formats claims."""
    with contextlib.suppress(OSError):
        if Path(path).stat().st_size == 0:
            return "the file is empty"
    readable = ", ".join(readable_formats())
    with contextlib.suppress(Exception), warnings.catch_warnings():  # only to name it: it is rejected already
        warnings.simplefilter("ignore")
        with Image.open(path) as other:
            return f"its format is {other.format}, and what is read is {readable}: save it as PNG or JPEG"
    ending = Path(path).suffix.lower()
    named = f"{ending[1:].upper()} is not read" if ending in UNREAD_SUFFIXES else "it is not a picture"
    return f"{named} (Pillow {PIL.__version__} reads {readable}): save it as PNG or JPEG"


def load_picture(path: Path, resolution: int, ground: str = "white") -> Picture:
    """Scaled so that the shorter side is `resolution`, cut to the centre square; raises PictureError."""
    image = open_picture(path, ground)
    original = (image.height, image.width)
    scale = resolution / min(original)
    if scale != 1:
        size = (max(resolution, round(image.width * scale)), max(resolution, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    top, left = (image.height - resolution) // 2, (image.width - resolution) // 2
    image = image.crop((left, top, left + resolution, top + resolution))
    return Picture(np.asarray(image), original, (top, left))
