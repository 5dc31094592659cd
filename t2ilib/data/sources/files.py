"""What lies under a folder, and the files that tables mean by the names they write.

Systems write accents in two ways, leave files of their own in every folder, and take for one name what others take for two. A name
that leads out of its folder is refused, and so are links that do. Leaves out what the files are: each source judges that.
"""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from t2ilib.config import ConfigError
from t2ilib.data.pictures import picture_suffixes
from t2ilib.data.records import Told
from t2ilib.text import shown

HIDDEN = frozenset(
    ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "$recycle.bin", "system volume information", "@eadir")
)  # fmt: skip
"""What systems leave in folders, besides all whose name begins with a dot; in lower case."""
OUTSIDE = "lies outside: pictures must lie in the folder itself"


def walk(folder: Path, apart: Path | None = None) -> tuple[list[Path], list[Path], list[Told]]:
    """All files under a folder, in name order: those to look at, those that are hidden, and those that are none."""

    def unreadable(error: OSError) -> None:
        raise ConfigError(f"{shown(error.filename)} cannot be listed: {error.strerror}") from None

    apart, root = apart and apart.resolve(), folder.resolve()
    files, hidden, rejected = [], [], []
    for place, subfolders, names in os.walk(folder, onerror=unreadable):
        here = Path(place)
        links = [name for name in subfolders if (here / name).is_symlink()]
        subfolders[:] = sorted(n for n in subfolders if n not in links and (here / n).resolve() != apart)
        in_hidden = any(is_hidden(part) for part in here.relative_to(folder).parts)
        for name in sorted(names + links):
            path = here / name
            linked = path.is_symlink()
            if in_hidden or is_hidden(name):
                hidden.append(path)
            elif name in links:
                rejected.append((path, "is a link to a folder, which is not followed: name that one, or copy it here"))
            elif not path.is_file():
                rejected.append((path, "is a link to nothing" if linked else "is not a file"))
            elif linked and not path.resolve().is_relative_to(root):
                rejected.append((path, "links to outside: pictures must lie in the folder itself"))
            else:
                files.append(path)
    return files, hidden, rejected


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in HIDDEN


def is_picture(path: Path) -> bool:
    """Whether people mean it as one, by its ending."""
    return path.suffix.lower() in picture_suffixes()


def composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def near(name: str) -> str:
    """What names that people take for the same have in common."""
    return composed(name).casefold().replace("\\", "/").strip()


class LookUp:
    """Files of a folder by the names that a table gives them: literally, or composed, as most systems write accents."""

    def __init__(self, folder: Path, files: Iterable[Path]) -> None:
        self.folder, self.files = folder, {path: path for path in files}
        self.root = os.path.abspath(folder)

    @cached_property
    def composed(self) -> dict[str, list[Path]]:
        found = defaultdict(list)
        for path in self.files:
            found[composed(str(path))].append(path)
        return found

    @cached_property
    def near(self) -> dict[str, Path]:
        return {near(str(path)): path for path in self.files}

    def __call__(self, name: str) -> Path | str:
        """The file, or the reason why there is none."""
        if not name.strip():
            return "names no picture"
        try:
            if b"\0" in os.fsencode(name):
                return "is no file name"
        except UnicodeEncodeError:
            return "is no file name, for it has half a character"
        path = Path(os.path.abspath(os.path.join(self.root, name)))
        if not path.is_relative_to(self.root):
            return OUTSIDE
        path = self.folder / path.relative_to(self.root)
        if path in self.files:
            return self.files[path]  # the one that is there: tables of many rows need no path of their own for each
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
