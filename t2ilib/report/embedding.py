"""Pictures and figures as part of a page that needs no other file: data URIs, small enough for a page of hundreds."""

import base64
import io
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from PIL import Image

SMALL, SIDE = 160, 320
"""Pixels of the longer side: up to SMALL a picture is embedded as it is, larger ones are shrunk to SIDE and stored as JPEG."""
QUALITY = 88


def picture_uri(file: Path, side: int = SIDE) -> str:
    """A picture file as a data URI, without what its file says of it."""
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    stream = io.BytesIO()
    if max(image.size) <= SMALL:
        image.save(stream, "PNG", optimize=True)
        return data_uri("image/png", stream.getvalue())
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    image.save(stream, "JPEG", quality=QUALITY)
    return data_uri("image/jpeg", stream.getvalue())


def figure_uri(figure: Figure) -> str:
    """A figure as SVG in a data URI, the same bytes for the same figure."""
    stream = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "t2ilib"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return data_uri("image/svg+xml", stream.getvalue())


def data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
