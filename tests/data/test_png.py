import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from t2ilib.data.pictures import PictureError, examine_picture, load_picture, open_picture
from t2ilib.data.png import held_bytes, stated_bytes

SIGNATURE = b"\x89PNG\r\n\x1a\n"
STARTS_AND_STEPS = [((0, 0), (8, 8)), ((0, 4), (8, 8)), ((4, 0), (8, 4)), ((0, 2), (4, 4)), ((2, 0), (4, 2)), ((0, 1), (2, 2)), ((1, 0), (2, 1))]  # fmt: skip


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(pixels, interlaced=False, keep=None, parts=1):
    """An RGB picture (H, W, 3) as a PNG, of whose rows' bytes `keep` are there, in `parts` IDAT chunks; and how many there should be."""
    passes = [pixels[y::down, x::across] for (y, x), (down, across) in STARTS_AND_STEPS] if interlaced else [pixels]
    rows = b"".join(b"\0" + row.tobytes() for part in passes if part.size for row in part)
    packed = zlib.compress(rows[:keep])
    size = -(-len(packed) // parts)
    data = b"".join(chunk(b"IDAT", packed[start : start + size]) for start in range(0, len(packed), size))
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 2, 0, 0, int(interlaced))
    return SIGNATURE + chunk(b"IHDR", header) + data + chunk(b"IEND", b""), len(rows)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 2), (9, 17), (16, 16), (33, 20)])
def test_a_png_whose_data_end_early_is_refused(tmp_path, interlaced, size):
    pixels = np.random.default_rng(0).integers(1, 256, (*size, 3), dtype=np.uint8)
    for parts in (1, 3):
        whole, length = png(pixels, interlaced, parts=parts)
        assert stated_bytes(whole) == held_bytes(whole) == length
        (tmp_path / "x.png").write_bytes(whole)
        assert np.array_equal(np.asarray(open_picture(tmp_path / "x.png")), pixels)
        for keep in {0, 1, length // 3, length // 2, length - 1 - 3 * size[1], length - 1} - {-1, length}:
            short, _ = png(pixels, interlaced, max(0, keep), parts)
            (tmp_path / "x.png").write_bytes(short)
            for function in (open_picture, examine_picture, lambda path: load_picture(path, 8)):
                with pytest.raises(PictureError, match="truncated"):
                    function(tmp_path / "x.png")


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
def test_pictures_with_black_ends_are_taken(tmp_path, mode):
    image = Image.new(mode, (37, 21))
    if mode == "P":
        image.putpalette([0, 0, 0, 255, 255, 255])
    image.save(tmp_path / "x.png")
    data = (tmp_path / "x.png").read_bytes()
    bits = {"1": 1, "P": 1, "L": 8, "RGB": 24, "RGBA": 32, "LA": 16, "I;16": 16}[mode]
    assert stated_bytes(data) == held_bytes(data) == 21 * (1 + (37 * bits + 7) // 8)
    assert open_picture(tmp_path / "x.png").size == (37, 21)
