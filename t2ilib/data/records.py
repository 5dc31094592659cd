"""What every source gives: captioned pictures, and what became of everything else that was there. Pictures are not opened here.

A picture's `path` is a file's, or something that has what is asked of one: a `name`, `read_bytes()`, and a text for messages. So members
of archives, rows of tables and ranges of remote files go through everything that files do.
"""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

JUST_NOW = 2 * 10**9
"""Nanoseconds in which file systems may give two writings one time."""


class Readable(Protocol):
    """Where a picture's bytes lie. `Path` is one. `str()` is what messages call it; threads may read several at once."""

    @property
    def name(self) -> str: ...

    @property
    def parent(self) -> object:
        """What it lies in: a folder, an archive, a table."""

    def read_bytes(self) -> bytes: ...


def stamp(path: Readable) -> str | None:
    """What changes when a picture's bytes may have: place, size and time of its file. None where nothing is known to, or where the file was
    written just now, so that another writing might leave the same."""
    if isinstance(path, Path):
        return stamp_of_file(path)
    own = getattr(path, "stamp", None)
    return own() if own else None


def stamp_of_file(file: Path, *inside: object) -> str | None:
    """`inside`: where in the file."""
    try:
        stat = file.stat()
    except OSError:
        return None
    if time.time_ns() - stat.st_mtime_ns < JUST_NOW:
        return None
    return "\0".join(map(str, (os.path.abspath(file), stat.st_size, stat.st_mtime_ns, *inside)))


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A picture whose bytes are in memory. `told`: what messages call it; `parent`: what it came from."""

    name: str
    told: str
    parent: str
    data: bytes = field(repr=False)

    def __str__(self) -> str:
        return self.told

    def read_bytes(self) -> bytes:
        return self.data


Told = tuple[Readable, str]
"""Something that was there, and what is to be said of it."""


@dataclass(frozen=True, slots=True)
class Record:
    """One captioned picture, or two of one caption of which people, or a measure, preferred one.

    `more`: its other captions. `mask`: a picture of where the loss counts (white) and where it does not (black). `weight`: of its
    loss. `repeats`: how often an epoch shows it. `scene`: what it truly shows, for drawn pictures. `rejected`: a second picture of the same
    caption that was liked less than `path` (Diffusion-DPO, arXiv 2311.12908); a data set has such pairs alone, or none (`data.pairs`).
    """

    path: Readable
    caption: str
    scene: dict[str, str] | None = field(default=None, compare=False)
    more: tuple[str, ...] = ()
    mask: Readable | None = None
    weight: float = 1.0
    repeats: int = 1
    rejected: Readable | None = None

    @property
    def captions(self) -> tuple[str, ...]:
        return (self.caption, *self.more)


@dataclass(frozen=True)
class Listing(Sequence[Record]):
    """The records of a source, in an order that does not depend on the machine, and what became of everything else in it.

    `folder`: what messages call the source. `texts`: captions and tables. `aside`: neither pictures nor captions that count, each with the
    reason. `rejected`: what was meant to be used and cannot be.
    """

    folder: Path | str
    records: tuple[Record, ...] = ()
    texts: tuple[Readable, ...] = ()
    hidden: tuple[Readable, ...] = ()
    aside: tuple[Told, ...] = ()
    rejected: tuple[Told, ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index):
        return self.records[index]


Cursor = dict[str, Any]
"""A place in a stream, in what JSON can hold."""


class Stream(Protocol):
    """A source that is read from front to back. `folder`: what messages call it; `hint`: what to say where much of it cannot be used."""

    folder: Path | str
    hint: str

    def read(self, cursor: Cursor | None = None) -> Iterator[tuple[Listing, Cursor]]:
        """What comes from `cursor` on (None: from the front), at most one record at a time, each with the place behind it. Raises OSError
        where it cannot be read on."""
        ...
