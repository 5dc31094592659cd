"""Text files as people bring them, and names as they can be printed: the one place where bytes become text.

UTF-8 with or without its mark, UTF-16 and UTF-32 by their mark. Anything else is told with file, byte and remedy, never guessed:
text read in a wrong encoding would be trained on without a word. Leaves out line ends, which stay as they are in the file.
"""

import codecs
from pathlib import Path

from t2ilib.config import ConfigError

MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
REMEDY = "save it as UTF-8 (in an editor: Save as, encoding UTF-8; in a spreadsheet: CSV UTF-8)"


def read_text(path: Path) -> str:
    """The text of a file. Raises ConfigError, with the offset of the byte, for one that is not UTF-8 and has no mark, and
    OSError as opening does."""
    return decoded(Path(path).read_bytes(), path)


def decoded(data: bytes, path: object) -> str:
    """The text of what lies at `path`, which messages name; raises ConfigError as `read_text`."""
    mark, encoding = next(((mark, name) for mark, name in MARKS if data.startswith(mark)), (b"", "utf-8"))
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        place = len(mark) + error.start
        said = f", which its mark says it is: {REMEDY}" if mark else f". {likely(data, place)}"
        raise ConfigError(f"{shown(path)}: {at(data, place)} is not {encoding.upper()}{said}") from None
    if "\0" in text:
        place = data.find(b"\0") if encoding == "utf-8" else len(mark)
        raise ConfigError(f"{shown(path)}: {at(data, place)} is no text. Perhaps UTF-16 without its mark: {REMEDY}")
    return text


def write_whole(path: Path, text: str) -> None:
    """Writes a text file that a kill leaves as it was or as it is to be, never half of it."""
    draft = path.with_name(f".{path.name}.part")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def at(data: bytes, place: int) -> str:
    line = data.count(b"\n", 0, place) + 1
    return f"byte {place} (0x{data[place]:02x}, line {line})" if place < len(data) else f"byte {place} (the end)"


def likely(data: bytes, place: int) -> str:
    """What a file that is not UTF-8 may be, shown by the words around its byte `place`, and the remedy."""
    try:
        data.decode("cp1252")
    except UnicodeDecodeError:
        return f"Its encoding is unknown: {REMEDY}"
    around = data[max(0, place - 10) : place + 10].decode("cp1252")
    return f"It may be Windows-1252 (there: {around!r}): {REMEDY}, or convert it (iconv -f CP1252 -t UTF-8)"


def shown(name: object) -> str:
    """A name or path as it can be printed, written and hashed: bytes that are not UTF-8 become escapes such as \\xfc."""
    text = str(name)
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a character, from JSON
        data = text.encode("utf-8", "backslashreplace")
    return data.decode("utf-8", "backslashreplace")
