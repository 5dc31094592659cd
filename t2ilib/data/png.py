"""Whether a PNG holds all the rows that its header says it has.

Pillow takes one whose compressed data end early, in good order, and leaves the rows that are not there black: a broken export would be
trained on as a picture with a black part. Data that are cut off in the middle Pillow finds by itself.
"""

import struct
import zlib

import numpy as np
from PIL import Image

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
ADAM7 = ((0, 8, 0, 8), (4, 8, 0, 8), (0, 4, 4, 8), (2, 4, 0, 4), (0, 2, 2, 4), (1, 2, 0, 2), (0, 1, 1, 2))
"""First column, step, first row and step of each pass of an interlaced picture (PNG 1.2, 2.6)."""
AT_ONCE = 2**20


def require_all_rows(image: Image.Image, data: bytes) -> None:
    """Raises ValueError where `data`, of which `image` was decoded, hold less than the header says.

    It takes as long as decoding did, so only pictures with a row of zeros at their end are looked into, as every one has whose data end
    early: interlaced ones come in passes, and the last of them fills the odd rows.
    """
    ends = (image.crop((0, row, image.width, row + 1)) for row in range(max(0, image.height - 2), image.height))
    if all(np.asarray(end).any() for end in ends):
        return
    held, stated = held_bytes(data), stated_bytes(data)
    if held < stated:
        raise ValueError(f"image file is truncated (its data end after {held} of {stated} bytes)")


def stated_bytes(data: bytes) -> int:
    """How many bytes the rows of a PNG have before they are compressed, each with the byte that names its filter."""
    width, height, bits, kind, _, _, interlaced = struct.unpack(">IIBBBBB", data[16:29])
    total = 0
    for left, across, top, down in ADAM7 if interlaced else ((0, 1, 0, 1),):
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        if columns > 0:
            total += max(0, rows) * (1 + (columns * bits * CHANNELS[kind] + 7) // 8)
    return total


def held_bytes(data: bytes) -> int:
    """How many bytes its data hold, counted no further than the header says."""
    stated, held, place, inflate = stated_bytes(data), 0, 8, zlib.decompressobj()
    while place + 8 <= len(data) and held < stated:
        length, name = struct.unpack(">I4s", data[place : place + 8])
        rest = data[place + 8 : place + 8 + length] if name == b"IDAT" else b""
        while rest and held < stated:
            held += len(inflate.decompress(rest, AT_ONCE))
            rest = inflate.unconsumed_tail
        place += length + 12
    return held
