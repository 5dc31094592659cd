"""An image folder as people keep them: metadata.jsonl or metadata.csv, or a .txt caption beside each picture.

Hugging Face's `imagefolder` layout, subfolders included, so a data set made for other trainers works as it is. Every file under the
folder is accounted for: a picture that is used, its caption, a hidden file, something else that is left aside, or rejected
with a reason; a table and its folder are compared both ways. What is rejected is told together with the pictures that cannot
be decoded (`manifest`), and `data.on_error` decides about both. Pictures are not opened here.
"""

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from t2ilib.config import ConfigError, DataConfig
from t2ilib.data.pictures import picture_suffixes
from t2ilib.data.sources.table import TABLES, read_table
from t2ilib.seeds import seed_for
from t2ilib.text import read_text, shown

HIDDEN = frozenset(
    ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "$recycle.bin", "system volume information", "@eadir")
)  # fmt: skip
"""What systems leave in folders, besides all whose name begins with a dot; in lower case."""
HALF_A_CHARACTER = re.compile("[\ud800-\udfff]")

Told = tuple[Path, str]


@dataclass(frozen=True)
class Record:
    """One captioned picture on disk. `scene` is what it truly shows, for drawn pictures."""

    path: Path
    caption: str
    scene: dict[str, str] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Listing(Sequence[Record]):
    """The records of a folder, in name order, and what became of every other file in it.

    `texts`: captions and the table. `aside`: neither pictures nor captions that count, each with the reason.
    """

    folder: Path
    records: tuple[Record, ...] = ()
    texts: tuple[Path, ...] = ()
    hidden: tuple[Path, ...] = ()
    aside: tuple[Told, ...] = ()
    rejected: tuple[Told, ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index):
        return self.records[index]


def load(config: DataConfig) -> tuple[Listing, Listing | None]:
    """The pictures of `config.path`, and those of `config.validation_path`; None where a share of the first is held out."""
    if config.path is None:
        raise ConfigError("data.path is missing: give the folder with your pictures and captions")
    if config.validation_path is None:
        return read_folder(config.path, config), None
    held_out = read_folder(config.validation_path, config, apart=config.path)
    return read_folder(config.path, config, apart=config.validation_path), held_out


def hold_out(records: Sequence[Record], share: float) -> tuple[list[Record], list[Record]]:
    """Training and held-out records; held out by their names' hashes, so adding a picture moves no other (unless the share
    holds out none, and the one with the smallest hash stands in). Raises ConfigError where none is left to train on."""
    place = {record: seed_for(0, "held out", address(record.path.name)) / 2**63 for record in records}
    held_out = {record for record in records if place[record] < share}
    if share and not held_out:
        held_out = {min(records, key=place.__getitem__)}
    training = [record for record in records if record not in held_out]
    if not training:
        raise ConfigError(
            f"{shown(records[0].path.parent)}: of {len(records)} picture(s) data.validation_share {share:g} holds out {len(held_out)},"
            " which leave none to train on: set data.validation_share: 0, which trains on all and validates on none, add pictures,"
            " or give held-out pictures of their own by data.validation_path"
        )
    return training, [record for record in records if record in held_out]


def address(name: str) -> str:
    """A name as the same text on every system; Macs decompose letters with accents."""
    return shown(composed(name)).replace("\x1f", "\\x1f")


def composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def read_folder(folder: Path, config: DataConfig, apart: Path | None = None) -> Listing:
    """What lies in one folder, but for what lies in `apart`. Raises ConfigError for one without pictures, and for a table
    that cannot be read."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"data.path {shown(folder)} is not a folder")
    files, hidden, rejected = walk(folder, apart)
    table = next((folder / name for name in TABLES if folder / name in files), None)
    if table is None:
        records, texts, unusable = read_captions(files)
    else:
        records, texts, unusable = read_rows(table, files, config)
    rejected += unusable
    records, inside = [], records
    for record in inside:
        if not record.caption:
            rejected.append((record.path, "has an empty caption: write one"))
        elif half := HALF_A_CHARACTER.search(record.caption):
            what = f"half a character ({shown(half[0])}) at position {half.start()}"
            rejected.append((record.path, f"its caption has {what}: write the whole one, or leave it out"))
        else:
            records.append(record)
    rejected = [*dict(reversed(rejected)).items()][::-1]  # of several reasons the first
    told = {record.path for record in records} | {path for path, _ in rejected} | {*texts}
    aside = [(path, why_aside(path, folder, table)) for path in files if path not in told]
    if not records and not rejected:
        ignored = f" ({len(hidden)} hidden file(s) ignored)" if hidden else ""
        raise ConfigError(f"{shown(table or folder)} lists no picture{ignored}")
    records.sort(key=lambda record: (composed(record.path.name), composed(str(record.path))))
    return Listing(folder, tuple(records), tuple(texts), tuple(hidden), tuple(aside), tuple(rejected))


def walk(folder: Path, apart: Path | None = None) -> tuple[list[Path], list[Path], list[Told]]:
    """All files under a folder, in name order: those to look at, those that are hidden, and those that are none."""

    def unreadable(error: OSError) -> None:
        raise ConfigError(f"{shown(error.filename)} cannot be listed: {error.strerror}") from None

    apart = apart and apart.resolve()
    files, hidden, rejected = [], [], []
    for place, subfolders, names in os.walk(folder, onerror=unreadable):
        here = Path(place)
        links = [name for name in subfolders if (here / name).is_symlink()]
        subfolders[:] = sorted(n for n in subfolders if n not in links and (here / n).resolve() != apart)
        for path in (here / name for name in sorted(names + links)):
            if any(is_hidden(part) for part in path.relative_to(folder).parts):
                hidden.append(path)
            elif path.is_dir():
                rejected.append((path, "is a link to a folder, which is not followed: name that one, or copy it here"))
            elif not path.is_file():
                rejected.append((path, "is a link to nothing" if path.is_symlink() else "is not a file"))
            elif path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
                rejected.append((path, "links to outside: pictures must lie in the folder itself"))
            else:
                files.append(path)
    return files, hidden, rejected


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in HIDDEN


def is_picture(path: Path) -> bool:
    return path.suffix.lower() in picture_suffixes()


def why_aside(path: Path, folder: Path, table: Path | None) -> str:
    if path.name in TABLES and path.parent != folder:
        return "tables of subfolders are not read"
    if table and (path.suffix.lower() == ".txt" or path.name in TABLES):
        return f"the captions are in {table.name}"
    return "neither a picture nor a caption"


def read_captions(files: Sequence[Path]) -> tuple[list[Record], list[Path], list[Told]]:
    """Records of pictures with a .txt of their name beside them, the captions that have a picture, and what lacks the other."""
    captions: dict[str, list[Path]] = defaultdict(list)
    for path in files:
        if path.suffix.lower() == ".txt":
            captions[composed(str(path.with_suffix("")))].append(path)
    records, texts, rejected = [], [], []
    for path in filter(is_picture, files):
        beside = captions.get(composed(str(path.with_suffix(""))), [])
        texts += beside
        if len(beside) != 1:
            several = f"has {len(beside)} captions ({', '.join(shown(p.name) for p in beside)}): keep one"
            bare = f"has no .txt caption beside it, and the folder no {' or '.join(TABLES)}"
            rejected.append((path, several if beside else bare))
            continue
        try:
            text = read_text(beside[0])
        except (ConfigError, OSError) as error:
            rejected.append((path, f"its caption cannot be read: {shown(error)}"))
        else:
            records.append(Record(path, text.replace("\r\n", "\n").replace("\r", "\n").strip()))
    of_pictures = set(texts)
    for path in (path for paths in captions.values() for path in paths if path not in of_pictures):
        beside = sorted(shown(p.name) for p in files if p.stem == path.stem and p.parent == path.parent and p != path)
        other = f" ({', '.join(beside)} is none by its ending)" if beside else ""
        rejected.append((path, f"is a caption without a picture beside it{other}"))
    return records, list(dict.fromkeys(texts)), rejected


def read_rows(table: Path, files: Sequence[Path], config: DataConfig) -> tuple[list[Record], list[Path], list[Told]]:
    """Records of the rows of a table; rejected are rows without a file, rows of one file after the first, and pictures
    without a row."""
    folder, records, rejected, named = table.parent, [], [], {}
    look_up = LookUp(folder, files)
    for number, row in read_table(table, config):
        name = row[config.image_column]
        path = look_up(name)
        if isinstance(path, str):
            rejected.append((folder / name, f"{path} (row {number} of {table.name})"))
        elif path in named:
            rejected.append((path, f"row {number} of {table.name} names it again, after row {named[path]}: keep one"))
        else:
            named[path] = number
            scene = row.get("scene")
            records.append(Record(path, row[config.caption_column].strip(), scene if isinstance(scene, dict) else None))
    rejected += [
        (path, f"no row of {table.name} names it{if_odd(path)}")
        for path in files
        if is_picture(path) and path not in named
    ]
    return records, [table], rejected


def if_odd(path: Path) -> str:
    return "" if shown(path.name) == path.name else ", nor can easily, for its name is not UTF-8: rename it"


class LookUp:
    """Files of a folder by the names that a table gives them: literally, or composed, as most systems write accents."""

    def __init__(self, folder: Path, files: Iterable[Path]) -> None:
        self.folder, self.files = folder, set(files)
        self.composed, self.near = defaultdict(list), {}
        for path in self.files:
            self.composed[composed(str(path))].append(path)
            self.near[near(str(path))] = path

    def __call__(self, name: str) -> Path | str:
        """The file, or the reason why there is none."""
        if not name.strip():
            return "names no picture"
        try:
            if b"\0" in os.fsencode(name):
                return "is no file name"
        except UnicodeEncodeError:
            return "is no file name, for it has half a character"
        root, path = (Path(os.path.abspath(place)) for place in (self.folder, os.path.join(self.folder, name)))
        if not path.is_relative_to(root):
            return "lies outside: pictures must lie in the folder itself"
        path = self.folder / path.relative_to(root)
        if path in self.files:
            return path
        found = self.composed.get(composed(str(path)), [])
        if len(found) == 1:
            return found[0]
        if found:
            return f"may be {' or '.join(sorted(ascii(file.name) for file in found))}: rename one"
        return self.absent(path)

    def absent(self, path: Path) -> str:
        if any(is_hidden(part) for part in path.relative_to(self.folder).parts):
            return "is the name of a hidden file: give it another, or take the row out"
        try:
            if path.exists():
                return "is a folder, or lies in the folder of the held-out pictures"
        except (OSError, ValueError) as error:
            return f"is no file name ({shown(error)})"
        other = self.near.get(near(str(path)))
        return (
            f"missing; there is {shown(other.relative_to(self.folder))}: write its name as it is"
            if other
            else "missing"
        )


def near(name: str) -> str:
    """What names that people take for the same have in common."""
    return composed(name).casefold().replace("\\", "/").strip()
