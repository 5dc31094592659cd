"""What a picture's file says of how it was drawn: twice, as text chunks of the PNG.

`parameters` is what AUTOMATIC1111's web UI writes and reads (`infotext`); people and other programs know it. `t2ilib` is JSON of our own,
from which DrawSettings come back exactly:

    {"version": 1, "program": "t2ilib 0.1.0", "settings": {every field of DrawSettings, of this one picture},
     "drawn": {"sampler": "DDIM", "width": 64, "height": 64}}

`drawn` is what "auto" and null were in the end; of a grid there is `grid` too, its axes as they were written (`grid`). Text is read
without decoding the picture, and nothing that it names is loaded. Leaves out other formats' metadata (JPEG's and WebP's EXIF).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from t2ilib import __version__
from t2ilib.config import ConfigError
from t2ilib.drawing.infotext import read_infotext, settings_of, write_infotext
from t2ilib.drawing.settings import DrawSettings, build_settings
from t2ilib.text import shown

A1111, OWN = "parameters", "t2ilib"
"""Keys of the text chunks."""
VERSION = 1
"""Of our own JSON; raised where an older t2ilib could not read it."""


@dataclass(frozen=True)
class Restored:
    """What a picture says. `source`: which text said it, "t2ilib" or "A1111"; with "t2ilib" the settings are the picture's exactly.
    `unknown`: fields of A1111's text that mean nothing here, as they stand; `notes`: what could not be taken as it stands, a sentence each,
    to be shown. `grid`: of a sheet its axes, {"x": text, "y": text}."""

    settings: DrawSettings
    source: str
    unknown: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    grid: dict[str, str] = field(default_factory=dict)


def texts_of(
    settings: DrawSettings,
    sampler: str,
    size: tuple[int, int],
    *,
    more: Mapping[str, Any] | None = None,
    grid: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Key -> text for one picture's file. `settings`: of this one; `sampler`, `size`: what "auto" and None were in the end; `more`: further
    fields of A1111's text; `grid`: of a sheet its axes."""
    own = {
        "version": VERSION,
        "program": f"t2ilib {__version__}",
        "settings": settings.model_dump(mode="json"),
        "drawn": {"sampler": sampler, "width": size[0], "height": size[1]},
        **({"grid": dict(grid)} if grid else {}),
    }
    version = {"Version": f"t2ilib {__version__}"}
    return {A1111: write_infotext(settings, sampler, size, {**(more or {}), **version}), OWN: json.dumps(own)}


def read_picture(file: Path | str | BinaryIO) -> Restored:
    """The settings that a PNG carries: by our own JSON, else by A1111's text.

    Raises ConfigError for a file that is no PNG or is damaged, for a picture without any such text, and for settings that no one
    means (`settings.MOST_STEPS` and the like).
    """
    name = shown(Path(file).name) if isinstance(file, Path | str) else "the picture"
    texts = read_texts(file, name)
    notes: list[str] = []
    if OWN in texts:
        own = read_own(texts[OWN], notes)
        if own is not None:
            grid = own.get("grid") if isinstance(own.get("grid"), dict) else {}
            settings = build_settings(own["settings"], f"what {name} says")
            return Restored(settings, "t2ilib", grid={str(axis): str(text) for axis, text in grid.items()})
    if A1111 not in texts:
        said = f": {notes[0]}" if notes else ", as programs that edit or shrink pictures leave them"
        raise ConfigError(f"{name} carries no settings{said}: take the file as t2ilib or A1111's web UI wrote it")
    settings, unknown, more = settings_of(read_infotext(texts[A1111]))
    if "t2ilib" not in unknown.get("Version", ""):
        more.append("another program drew it, from other noise: the same seed gives another picture here")
    return Restored(settings, "A1111", unknown, (*notes, *more))


def read_texts(file: Path | str | BinaryIO, name: str) -> dict[str, str]:
    """Key -> text of a PNG's chunks; raises ConfigError for what is no PNG, damaged, or has text that fills the memory."""
    try:
        with Image.open(file, formats=["PNG"]) as picture:
            return {
                key: value for key, value in picture.info.items() if isinstance(key, str) and isinstance(value, str)
            }
    except FileNotFoundError:
        raise ConfigError(f"{name} does not exist: give the path of a picture") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{name} cannot be read as a PNG ({' '.join(str(error).split())[:200]})") from None


def read_own(text: str, notes: list[str]) -> dict[str, Any] | None:
    """Our own JSON, or None, with a note, where it is damaged or of a later t2ilib."""
    try:
        own = json.loads(text)
    except (ValueError, RecursionError):
        own = None
    if not isinstance(own, dict) or not isinstance(own.get("settings"), dict):
        notes.append("its own settings are damaged")
        return None
    if own.get("version") != VERSION:
        notes.append(f"its own settings are of version {own.get('version')!r}, which a later t2ilib wrote")
        return None
    return own
