"""A folder as people bring them: fifteen pictures that can be used, and fifteen things that cannot, each in its own way."""

import io
import os
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

GOOD = 15


def write_thirty(folder: Path) -> dict[str, str]:
    """Writes good00.png to good14.png with captions, and gives the names of the others with a part of why each cannot be used. Of the good
    ones good01 and good02 are the same file, good04 is good03 in another format and size, and good05 is animated."""
    folder.mkdir(parents=True)
    for number in range(GOOD):
        image = scenery(number)
        if number == 5:
            image.save(folder / "good05.gif", save_all=True, append_images=[scenery(99), scenery(98)])
        elif number == 4:
            scenery(3).resize((60, 45), Image.Resampling.LANCZOS).save(folder / "good04.jpg", quality=90)
        else:
            image.save(folder / f"good{number:02d}.png")
        caption(folder, f"good{number:02d}", f"a plain caption, number {number}")
    (folder / "good02.png").write_bytes((folder / "good01.png").read_bytes())

    whole_jpeg, whole_png = encoded(scenery(50), "JPEG"), encoded(scenery(50), "PNG")
    broken = {
        "cut.jpg": (whole_jpeg[: len(whole_jpeg) // 2], "truncated"),
        "half.png": (whole_png[: len(whole_png) // 2], "cannot be decoded"),
        "zero.png": (b"", "the file is empty"),
        "text.jpg": (b"not a picture but words\n", "it is not a picture"),
        "page.png": (b"<html><body>404</body></html>", "it is not a picture"),
        "noise.webp": (np.random.default_rng(0).bytes(400), "it is not a picture"),
        "phone.heic": (b"\0\0\0\x18ftypheic" + bytes(40), "HEIC is not read"),
        "icon.png": (encoded(scenery(51), "ICO"), "its format is ICO"),
        "bomb.png": (bomb(), "Pillow's limit"),
        "depth.tiff": (encoded(Image.fromarray(np.full((9, 9), 70_000, np.int32)), "TIFF"), "do not say which value is white"),
    }  # fmt: skip
    for name, (data, _) in broken.items():
        (folder / name).write_bytes(data)
        caption(folder, Path(name).stem, "a caption")
    scenery(52).save(folder / "bare.png")
    scenery(53).save(folder / "blank.png")
    caption(folder, "blank", " \n\t\n")
    scenery(54).save(folder / "latin.png")
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    caption(folder, "alone", "a caption without its picture")
    os.symlink(folder / "gone", folder / "link.png")
    return {name: why for name, (_, why) in broken.items()} | {
        "bare.png": "has no .txt caption",
        "blank.png": "has an empty caption",
        "latin.png": "its caption cannot be read",
        "alone.txt": "is a caption without a picture",
        "link.png": "is a link to nothing",
    }


def caption(folder: Path, name: str, text: str) -> None:
    (folder / f"{name}.txt").write_text(text)


def scenery(seed: int, size: tuple[int, int] = (96, 72)) -> Image.Image:
    """Large patches of colour, which no two seeds have alike."""
    patches = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format)
    return stream.getvalue()


def bomb(side: int = 20_000) -> bytes:
    """A PNG of 400 megapixels in a few hundred bytes."""
    header = side.to_bytes(4, "big") * 2 + bytes((1, 0, 0, 0, 0))
    data = zlib.compress(bytes(10_000), 9)
    chunks = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    told = [
        len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big") for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(told)
