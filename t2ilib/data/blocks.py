"""A stream cut into blocks of pictures that are known to decode: their bytes in memory, and what became of all else that came by.

A picture is decoded in full when it is met, as everywhere; one that cannot be used is rejected with its reason. With every rejection it is
asked whether there are too many, of all that was met since the front of the stream, so that every run of a stream stops at the same
place, and none reads on for hours through what is no data set.
"""

import itertools
import logging
import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from t2ilib.config import ConfigError, DataConfig
from t2ilib.data.captions import Captions
from t2ilib.data.decoding import decoded
from t2ilib.data.editing import digest_of, edit_captions
from t2ilib.data.manifest import LISTED, listed, look_at
from t2ilib.data.pictures import Seen
from t2ilib.data.records import Cursor, Held, Listing, Readable, Record, Stream
from t2ilib.data.sources import folder
from t2ilib.data.sources.spans import Unanswered
from t2ilib.text import shown

log = logging.getLogger(__name__)

ENOUGH_TO_TELL = 200
"""So many pictures must have been met before a share of them means anything."""

Named = tuple[str, str]
"""What messages call something, and what is to be said of it."""


class Closed(Exception):
    """Nobody reads on."""


@dataclass(frozen=True)
class Found:
    """What one part of a stream is: a picture that can be used, or what became of it; what lay beside it; the place behind it."""

    pair: tuple[Record, Seen] | None
    rejected: tuple[Named, ...]
    aside: tuple[Named, ...]
    hidden: tuple[str, ...]
    cursor: Cursor


@dataclass
class Totals:
    """Pictures met since the front of a stream. `told`: the first that were rejected of those that this object saw."""

    used: int = 0
    rejected: int = 0
    told: list[Named] = field(default_factory=list)

    def add(self, used: int, rejected: Iterable[Named]) -> None:
        self.used += used
        for named in rejected:
            self.rejected += 1
            if len(self.told) < LISTED:
                self.told.append(named)

    def require(self, stream: Stream, config: DataConfig, over: bool = False) -> None:
        """Raises ConfigError where too much of what was met cannot be used. `over`: nothing more will come."""
        met = self.used + self.rejected
        where = shown(stream.folder)
        if over and not met:
            raise ConfigError(f"{where} has no picture in its stream")
        if not self.rejected or not (over or met >= ENOUGH_TO_TELL):
            return
        if self.used and (config.on_error == "skip" or self.rejected <= config.max_rejected * met):
            return
        if not self.used and not over and config.on_error == "skip":
            return
        share = math.ceil(100 * self.rejected / met) / 100
        remedy = f", or set data.max_rejected to {share:g} to train without them" if self.used else ""
        raise ConfigError(
            f"{where}: {self.rejected} of the first {met} pictures of the stream cannot be used, among them:\n"
            f"  {listed(Path(), self.told)}\nRepair or remove them{remedy}. {stream.hint}".rstrip(" .")
        )


@dataclass(frozen=True)
class Block:
    """Pictures that follow each other in a stream. `cursor`: the place behind the last; `last`: there is nothing more. `totals`: of all
    up to here, where they were counted."""

    records: tuple[Record, ...]
    seen: tuple[Seen, ...]
    rejected: tuple[Named, ...]
    aside: tuple[Named, ...]
    hidden: tuple[str, ...]
    cursor: Cursor | None
    last: bool
    totals: Totals | None

    def __len__(self) -> int:
        return len(self.records)

    @property
    def digest(self) -> str:
        return digest_of(zip(self.records, self.seen, strict=True))


class Reading:
    """A stream from a place on, decoded ahead in threads. `held_out`: SHA-256 of pictures that are never trained on, with what each is
    called: they are left out wherever they come."""

    def __init__(
        self,
        stream: Stream,
        cursor: Cursor | None,
        config: DataConfig,
        edits: Captions | None = None,
        held_out: Mapping[bytes, str] | None = None,
        closed: threading.Event | None = None,
    ):
        self.stream, self.config, self.edits = stream, config, edits
        self.held_out = held_out or {}
        self.closed, self.cursor = closed or threading.Event(), cursor
        self.parts = stream.read(cursor)
        self.looked = decoded(self.until_closed(), look, config.workers)
        self.coming: Iterator[Found] = self.looked

    def until_closed(self) -> Iterator[tuple[Listing, Cursor]]:
        for part in self.parts:
            if self.closed.is_set():
                raise Closed
            yield part

    def close(self) -> None:
        """Ends the threads, and lets go of files and connections."""
        self.looked.close()
        self.parts.close()

    def split(self, size: int, share: float) -> list[tuple[Record, Seen]]:
        """Holds out a share of the first `size` pictures, by their names, and gives these; what is not held out is still to come."""
        first, pairs, totals = [], [], Totals()
        while len(pairs) < size and (found := next(self.coming, None)) is not None:
            first.append(found)
            pairs += [found.pair] if found.pair else []
            totals.add(found.pair is not None, found.rejected)
            totals.require(self.stream, self.config)
        totals.require(self.stream, self.config, over=len(pairs) < size)
        seen = dict(pairs)
        _, chosen = folder.hold_out([*seen], share)
        self.held_out = {seen[record].sha256: shown(record.path) for record in chosen}
        self.coming = itertools.chain(first, self.looked)
        return [(record, seen[record]) for record in chosen]

    def block(self, size: int, totals: Totals | None) -> Block:
        """The next `size` pictures, or as many as there are. `totals`: of what lies before, to be counted on; None where this was read
        before. Raises ConfigError where too many cannot be used, and OSError where the stream cannot be read on."""
        records, seen, rejected, aside, hidden = [], [], [], [], []
        while len(records) < size:
            found = next(self.coming, None)
            if found is None:
                if totals:
                    totals.require(self.stream, self.config, over=True)
                return Block(*map(tuple, (records, seen, rejected, aside, hidden)), None, True, totals)
            self.cursor = found.cursor
            bad, pair = list(found.rejected), found.pair
            aside += found.aside
            hidden += found.hidden
            if pair is not None and (name := self.held_out.get(pair[1].sha256)) is not None:
                if shown(pair[0].path) != name:
                    aside.append((shown(pair[0].path), f"is held out, as {name}"))
            elif pair is not None:
                (record,), emptied = edit_captions([pair[0]], *self.edits.split()) if self.edits else ([pair[0]], [])
                bad += named(emptied)
                if record is None:
                    pair = None
                else:
                    records.append(record)
                    seen.append(pair[1])
            rejected += bad
            if totals:
                totals.add(pair is not None, bad)
                if bad:
                    totals.require(self.stream, self.config)
        return Block(*map(tuple, (records, seen, rejected, aside, hidden)), self.cursor, False, totals)


def named(told: Iterable[tuple[Readable, str]]) -> list[Named]:
    return [(shown(path), why) for path, why in told]


def look(part: tuple[Listing, Cursor]) -> Found:
    """What a part of a stream is. Raises OSError where a picture may come another time."""
    listing, cursor = part
    pair, rejected = None, named(listing.rejected)
    for record in listing.records:
        try:
            record = held(record)
            looked = look_at((record, None, None, None))
            wrong = looked.reason
        except Unanswered:
            raise
        except FileNotFoundError:
            wrong = "missing"
        except (OSError, ValueError) as error:
            wrong = f"cannot be read: {getattr(error, 'strerror', None) or error}"
        if wrong:
            rejected.append((shown(record.path), wrong))
        else:
            pair = (record, looked.whole)
    return Found(pair, tuple(rejected), tuple(named(listing.aside)), tuple(map(shown, listing.hidden)), cursor)


def held(record: Record) -> Record:
    """The record with its picture and mask in memory."""
    mask = None if record.mask is None else in_memory(record.mask)
    return replace(record, path=in_memory(record.path), mask=mask)


def in_memory(path: Readable) -> Held:
    if isinstance(path, Held):
        return path
    return Held(path.name, str(path), str(getattr(path, "parent", "")), path.read_bytes())
