"""A picture file becomes what a viewer shows, as RGB, or is refused by name: the one place that knows Pillow's modes and errors.

Alpha is composed onto a stated ground, for the colours left under it are never meant to be seen. Greys of 16 bits are scaled by
their range, which Pillow's own conversion cuts off at 255. Of an animated picture it is the first frame. Files are hostile until
decoded, so formats are a stated list of raster formats, and whatever Pillow and its plugins raise becomes one `PictureError`. A file
is read once, and threads may do all of this at once: nothing here changes what is global, Python's warning filters among it.

JPEGs are decoded at a half, quarter or eighth of their size where that is enough, which libjpeg does without computing what is left
out; it still reads the whole file, so that what is cut off is found out at any scale. Enough is twice the size that is wanted.
Against decoding in full and scaling with LANCZOS, on three photographs (640 x 427, 512 x 600, to 53 to 256 pixels), twice the size gives
a PSNR of 44 to 54 dB and once the size 33 to 49 dB, where BICUBIC in place of LANCZOS gives 40 to 49 dB. From a JPEG of 12 megapixels to
512 pixels square it takes 52 ms and 38 ms, and in full 160 ms. What is decoded at a scale can reach past the picture by a part of a
pixel (427 rows are 213.5, and 214 are given); taken for the picture's own, that part costs 2 to 12 dB more.

Leaves out colour profiles and gamma: the numbers of a picture are taken as sRGB.
"""

import contextlib
import functools
import hashlib
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

import numpy as np
import PIL
from PIL import ExifTags, Image, ImageColor, ImageOps, UnidentifiedImageError

from t2ilib.data.png import require_all_rows
from t2ilib.data.records import Readable
from t2ilib.data.views import Size, View, view_of
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
SCALABLE = ("JPEG", "MPO")
"""Formats that can be decoded at a part of their size."""
ENOUGH = 2
"""What is decoded at a part of its size is still this many times as large as what is wanted of it."""
ANIMATED = ("GIF", "PNG", "WEBP", "AVIF", "TIFF")
"""Formats with several frames or pages of which the first is meant. The further pictures of an MPO are aids to the first, such as depth."""
TURNED = {
    2: (2, 1, 0, 3),
    3: (2, 3, 0, 1),
    4: (0, 3, 2, 1),
    5: (1, 0, 3, 2),
    6: (3, 0, 1, 2),
    7: (3, 2, 1, 0),
    8: (1, 2, 3, 0),
}
"""EXIF orientation -> which of the stored left, top, right and bottom the upright picture's are. From 5 on height and width change places."""
UPRIGHT = (0, 1, 2, 3)
ASPECT_TOLERANCE = 0.01
WHITE_IS_ZERO, PHOTOMETRIC, BITS_PER_SAMPLE = 0, 262, 258  # of TIFF 6.0


class PictureError(ValueError):
    """A picture that cannot be used: `path` and `reason`."""

    def __init__(self, path: Readable, reason: str) -> None:
        super().__init__(f"{shown(path)}: {reason}")
        self.path, self.reason = path, reason


@dataclass(frozen=True)
class Picture:
    """A sample: pixels (H, W, 3) uint8, SDXL's micro-conditioning in pixels (`original` height and width of the upright picture, `crop` top
    and left in the scaled and, where it is, mirrored one), and in (H, W) uint8 how much the loss counts; None where it does so everywhere."""

    pixels: np.ndarray
    original: Size
    crop: Size
    mask: np.ndarray | None = None


@dataclass(frozen=True)
class Decoded:
    """What a file shows, upright: `image` in RGB, `layer` the same in RGBA before it was composed where something of it may be transparent.

    `original`: the file's height and width, upright. `margins`: how far image and layer reach past the picture to left, top, right
    and bottom, less than a pixel each.
    """

    image: Image.Image
    layer: Image.Image | None
    original: Size
    margins: tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of a picture that can be decoded. `sha256`: of the file's bytes. `height`, `width`: upright. `notes`: what was done
    that people may not expect. `thumbnail`: RGB, where one was asked for. `mask`: SHA-256 of the bytes of its mask, where it has one.
    `rejected`: what is known of the picture that was liked less, of a pair."""

    sha256: bytes
    height: int
    width: int
    notes: tuple[str, ...] = ()
    thumbnail: Image.Image | None = None
    mask: bytes = b""
    rejected: "Seen | None" = None


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Those of FORMATS that the installed Pillow opens. MPO has no opener: a JPEG may turn out to be one."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@functools.cache
def picture_suffixes() -> frozenset[str]:
    """Endings, in lower case, of files that people mean as pictures; whether one can be read shows when it is decoded."""
    return UNREAD_SUFFIXES | {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}


def open_picture(path: Readable, ground: str = "white", at_least: Size | None = None) -> Image.Image:
    """The picture, fully decoded, upright by its EXIF tag, RGB, what is transparent in it over the colour `ground`.

    `at_least`: (height, width) that are enough: a JPEG is then decoded at the smallest of its scales that has them.
    Raises PictureError for one that is missing, corrupt, larger than Pillow's limit against decompression bombs, or in a format or
    mode that is not read.
    """
    return decode(path, read(path), ground, (lambda _: at_least) if at_least else None).image


def examine_picture(path: Readable, ground: str = "white", thumbnail: int | None = None) -> Seen:
    """Whether a picture can be used, and what is to be known of it: all of it is decoded, at the scale at which that is cheapest.

    `thumbnail`: the longer side of one, for comparing pictures. Raises PictureError exactly where `open_picture` does.
    """
    data = read(path)
    decoded = decode(path, data, ground, lambda _: (thumbnail or 1,) * 2)
    small = None
    if thumbnail:
        small = decoded.image.copy()
        small.thumbnail((thumbnail, thumbnail), Image.Resampling.BOX)
    return Seen(hashlib.sha256(data).digest(), *decoded.original, notes_on(data), small)


def notes_on(data: bytes) -> tuple[str, ...]:
    with contextlib.suppress(Exception), Image.open(io.BytesIO(data), formats=readable_formats()) as image:
        frames = getattr(image, "n_frames", 1)  # which a file that is broken behind its first frame cannot say
        if image.format in ANIMATED and frames > 1:
            return (f"the first of {frames} {'pages' if image.format == 'TIFF' else 'frames'}",)
    return ()


def read(path: Readable) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise PictureError(path, "missing") from None
    except Exception as error:  # what archives and remote files meet
        raise PictureError(path, f"cannot be decoded: {error}") from error


def decode(path: Readable, data: bytes, ground: str, at_least: Callable[[Size], Size] | None = None) -> Decoded:
    """What `data`, the bytes of `path`, shows. `at_least`: of the upright size, the size that is enough; it is asked of JPEGs alone."""
    colour = ImageColor.getrgb(ground)[:3]
    with refusing(path, data), Image.open(io.BytesIO(data), formats=readable_formats()) as image:
        if image.width * image.height > (
            Image.MAX_IMAGE_PIXELS or math.inf
        ):  # Pillow warns of it, and refuses from twice that
            raise Image.DecompressionBombError
        darkest, brightest = grey_range(image)
        mend_transparency(image)
        stored, scalable = image.size, image.format in SCALABLE
        past = scale_down(image, at_least) if at_least and scalable else (0.0, 0.0)
        image.load()
        if image.format == "PNG":
            require_all_rows(image, data)
        turn = orientation(image)
        upright = scale_greys(ImageOps.exif_transpose(image) if turn in TURNED else image, darkest, brightest)
        margins = (0.0, 0.0, *past)
        layer = layered(upright)
        return Decoded(
            compose(upright if layer is None else layer, colour),
            layer,
            stored if turn > 4 else stored[::-1],
            tuple(margins[side] for side in TURNED.get(turn, UPRIGHT)),
        )


@contextlib.contextmanager
def refusing(path: Readable, data: bytes) -> Iterator[None]:
    """Whatever is raised in this scope becomes a PictureError."""
    try:
        yield
    except UnidentifiedImageError:
        raise PictureError(path, f"cannot be decoded: {unidentified(path, data)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise PictureError(
            path,
            f"cannot be decoded: it has more than {Image.MAX_IMAGE_PIXELS} pixels, Pillow's limit: make it smaller",
        ) from None
    except Exception as error:  # what a plugin's parser meets: struct.error, EOFError, KeyError, MemoryError
        told = str(error) or type(error).__name__
        raise PictureError(path, f"cannot be decoded: {told}") from error


def orientation(image: Image.Image) -> int:
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def scale_down(image: Image.Image, at_least: Callable[[Size], Size]) -> tuple[float, float]:
    """Has a JPEG decoded at the smallest scale that is large enough, and gives by how much it will be wider and higher than the picture."""
    turned = orientation(image) > 4
    size = at_least(image.size if turned else image.size[::-1])
    chosen = image.draft(None, size if turned else size[::-1])
    return (image.width - chosen[1][2], image.height - chosen[1][3]) if chosen else (0.0, 0.0)


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


def layered(image: Image.Image) -> Image.Image | None:
    """RGBA, of a picture in which something may be transparent."""
    if image.mode == "La":
        image = image.convert("LA")
    see_through = image.mode in WITH_ALPHA or (image.mode in PLAIN and image.has_transparency_data)
    if not see_through:
        return None
    return image if image.mode == "RGBA" else image.convert("RGBA")


def compose(image: Image.Image, ground: tuple[int, int, int]) -> Image.Image:
    """RGB, over `ground` where the picture is transparent; raises ValueError for a mode that is none of those people see."""
    layer = layered(image)
    if layer is not None:
        return Image.alpha_composite(Image.new("RGBA", image.size, (*ground, 255)), layer).convert("RGB")
    if image.mode in PLAIN:
        return image.convert("RGB")
    raise ValueError(f"Pillow's mode {image.mode} is not read: save it as RGB")


def unidentified(path: Readable, data: bytes) -> str:
    """What is the matter with a file that none of the readable formats claims."""
    if not data:
        return "the file is empty"
    readable = ", ".join(readable_formats())
    with (
        contextlib.suppress(Exception),
        Image.open(io.BytesIO(data)) as other,
    ):  # only to name it: it is rejected already
        return f"its format is {other.format}, and what is read is {readable}: save it as PNG or JPEG"
    ending = PurePath(path.name).suffix.lower()
    named = f"{ending[1:].upper()} is not read" if ending in UNREAD_SUFFIXES else "it is not a picture"
    return f"{named} (Pillow {PIL.__version__} reads {readable}): save it as PNG or JPEG"


def load_picture(path: Readable, resolution: int, ground: str = "white") -> Picture:
    """Scaled so that the shorter side is `resolution`, cut to the centre square; raises PictureError."""
    return load_view(path, lambda original: view_of(original, (resolution, resolution)), ground)


def load_view(
    path: Readable,
    view: View | Callable[[Size], View],
    ground: str = "white",
    alpha: Literal["ground", "mask"] = "ground",
    mask: Readable | None = None,
    sha256: bytes | None = None,
) -> Picture:
    """The part of a picture that is a sample: a view of a picture of its size, or what says of its upright size which, and is asked once.

    With `alpha` "mask" the loss does not count where the picture is transparent, and with `mask`, a picture of the same shape and any size,
    where that is black; with both, what counts is the product. Raises PictureError, for a mask too, and for a file that has become a
    picture of another shape than that of `view`, or whose bytes have not the hash `sha256`, where one is given.
    """
    chosen = functools.cache(view if callable(view) else lambda _: view)
    data = read(path)
    if sha256 is not None and hashlib.sha256(data).digest() != sha256:
        raise PictureError(path, "is not what it was when this run looked at it: leave data alone while it is used")
    decoded = decode(path, data, ground, lambda original: enough_for(chosen(original)))
    seen = chosen(decoded.original)
    (rows, columns), (height, width) = decoded.original, seen.scaled
    if min(abs(height - rows * width / columns), abs(width - columns * height / rows)) >= 1:
        raise PictureError(
            path, f"is {columns} x {rows} pixels, which it was not before: leave data alone while it is used"
        )
    counts = None if mask is None else load_mask(mask, path, decoded.original, seen)
    if alpha == "mask" and decoded.layer is not None:
        opaque = taken(decoded.layer.getchannel("A"), decoded.margins, seen, Image.Resampling.BOX)
        counts = opaque if counts is None else np.rint(opaque * (counts / 255)).astype(np.uint8)
    if counts is not None and counts.min() == 255:
        counts = None
    return Picture(taken(decoded.image, decoded.margins, seen), decoded.original, seen.crop, counts)


def enough_for(view: View) -> Size:
    return ENOUGH * view.scaled[0], ENOUGH * view.scaled[1]


def load_mask(mask: Readable, path: Readable, original: Size, view: View) -> np.ndarray:
    """What `view` takes of a mask for the picture `path` of size `original`: its grey (H, W), transparent parts black, and of every
    pixel the mean over what it covers, for a filter like LANCZOS would make the loss count beside an edge."""
    decoded = decode(mask, read(mask), "black", lambda _: enough_for(view))
    require_shape(mask, decoded.original, path, original)
    return taken(decoded.image.convert("L"), decoded.margins, view, Image.Resampling.BOX)


def examine_mask(mask: Readable, path: Readable, original: Size) -> Seen:
    """The same as `examine_picture` for the mask of the picture `path` of size `original`. Raises PictureError for one that is of another
    shape, or black everywhere."""
    data = read(mask)
    decoded = decode(mask, data, "black", lambda _: (1, 1))
    require_shape(mask, decoded.original, path, original)
    if not decoded.image.convert("L").getextrema()[1]:
        raise PictureError(
            mask, f"is black everywhere, so nothing of {shown(path)} would be learned: white is what counts"
        )
    return Seen(hashlib.sha256(data).digest(), *decoded.original)


def require_shape(mask: Readable, size: Size, path: Readable, original: Size) -> None:
    (height, width), (rows, columns) = size, original
    if abs(height * columns / (width * rows) - 1) > ASPECT_TOLERANCE:
        raise PictureError(
            mask,
            f"is {width} x {height} pixels, and {shown(path)}, whose mask it is, {columns} x {rows}: they must have one shape",
        )


def taken(
    image: Image.Image,
    margins: tuple[float, float, float, float],
    view: View,
    filter: Image.Resampling = Image.Resampling.LANCZOS,
) -> np.ndarray:
    """The pixels of `view`. What lies outside of it is not computed, but counts in the pixels at its edges, as if it were cut off later."""
    (rows, columns), (before, above, behind, below) = view.size, margins
    part = view.part_of(image.width - before - behind, image.height - above - below)
    left, top = part[0] + before, part[1] + above
    right, bottom = min(part[2] + before, image.width), min(part[3] + above, image.height)
    if (image.height, image.width) == view.scaled and not any(margins):
        image = image.crop((view.left, view.top, view.left + columns, view.top + rows))
    else:
        image = image.resize((columns, rows), filter, box=(left, top, right, bottom))
    return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flipped else image)
