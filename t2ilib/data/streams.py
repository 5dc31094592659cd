"""Pictures of a stream, which has no length and no random access: by position, in an order that is a function of the seed and the step.

A stream is cut into blocks of so many usable pictures. A step sees the next places of the order; of a block's pictures the order is a
permutation addressed by (seed, pass, block). So what a step sees depends on seed, step and what the stream holds, on nothing else, and one
block or two are held, however long the stream is. While one is trained on, the next is fetched by a thread. Where the stream ends it
begins again: positions go on, a pass shows each picture once, and from then on the length is known.

What was met is kept in the run's folder (`journal`), so that a resumed run goes on at the block of its step. The first block is read by
every start; whether it, and every block that is met again, is what it was is told by a digest. A stream that has changed is refused.

Exact: with the same rows or bytes in the same order, all steps, whatever the number of workers, kills and resumes. Not known: whether
what has not been met yet is what it was; so duplicates across blocks are not looked for.
"""

import contextlib
import functools
import logging
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from t2ilib.data.blocks import Block, Named, Reading, Totals
from t2ilib.data.journal import Entry, Journal
from t2ilib.data.manifest import listed, other_rows, used_rows
from t2ilib.data.pictures import Seen
from t2ilib.data.records import Record
from t2ilib.seeds import numpy_generator_for
from t2ilib.text import shown

log = logging.getLogger(__name__)

PATIENCE = 30.0
"""Seconds that the end of a run waits for a thread that reads."""


class StreamError(ValueError):
    """A stream that is not what it was."""


@functools.lru_cache(maxsize=8)
def block_order(seed: int, passes: int, number: int, size: int) -> np.ndarray:
    return numpy_generator_for(seed, "order of a block", passes, number).permutation(size)


class Streamed:
    """The training pictures of a stream. `first`: its first block, as `reading` gave it; `journal`: what earlier starts of the run met."""

    def __init__(self, reading: Reading, first: Block, size: int, journal: Journal):
        self.stream, self.config, self.edits = reading.stream, reading.config, reading.edits
        self.held_out, self.size, self.journal = reading.held_out, size, journal
        self.num_first, self.digest = len(first), first.digest
        self.entries: list[Entry] = [entry_of(first)]
        if journal.known and journal.known[0].digest == first.digest:
            self.entries = list(journal.known)
        elif journal.known:
            log.warning(
                "%s has changed since this run met it: its first pictures are others", shown(self.stream.folder)
            )
            journal.forget()
        self.blocks: dict[int, Block] = {0: first}
        self.wanted: tuple[int, ...] = ()
        self.rows: dict[int, list[tuple]] = {} if journal.known else {0: rows_of(first)}
        self.told: dict[int, tuple[Named, ...]] = {0: first.rejected}
        self.writing = False
        self.reading: Reading | None = None
        self.at = -1
        self.ahead: tuple[int, Future, threading.Thread] | None = None
        self.closed = threading.Event()
        self.closing = contextlib.ExitStack()

    @property
    def length(self) -> int | None:
        """The pictures of a pass; None while its end has not been met."""
        last = self.entries[-1]
        return (len(self.entries) - 1) * self.size + last.size if last.last else None

    def place(self, place: int) -> tuple[int, int, int]:
        """Pass, block and place in the block of a place in the order, or of a position; reads as far as it must to know."""
        while True:
            passes, within = divmod(place, self.length) if self.length else (0, place)
            number, slot = divmod(within, self.size)
            if number < len(self.entries):
                return passes, number, slot
            self.get(len(self.entries))

    def position(self, seed: int, place: int) -> int:
        """Which picture, counted through all passes, comes at a place of the order."""
        passes, number, slot = self.place(place)
        self.get(number)  # so that blocks are read in their order
        order = block_order(seed, passes, number, self.entries[number].size)
        return passes * (self.length or 0) + number * self.size + int(order[slot])

    def pair(self, position: int) -> tuple[Record, Seen]:
        """The picture at a position, of a block that is held or read again."""
        _, number, slot = self.place(position)
        block = self.get(number)
        return block.records[slot], block.seen[slot]

    def arrive(self, positions: Sequence[int], until: int) -> None:
        """The run is at a step that sees these; its last sees the place before `until`. Blocks that it does not need are let go, the
        next one is begun, and what is met for the first time is written down."""
        places = [self.place(position) for position in positions]
        passes, first, _ = places[0]
        needed = list(dict.fromkeys(number for _, number, _ in places))
        following = self.after(passes, first, until)
        self.wanted = tuple(dict.fromkeys([*needed, *([] if following is None else [following])]))
        for number in [*self.blocks]:
            if number not in self.wanted:
                del self.blocks[number]
        for number in needed:
            self.get(number)
        self.write(len(self.entries) if any(p for p, _, _ in places) else max(needed) + 1)
        if following is not None and following not in self.blocks and self.ahead is None:
            self.begin_reading(following)

    def after(self, passes: int, number: int, until: int) -> int | None:
        """The block that follows, where the run will come to it."""
        if self.length is None:
            return number + 1 if (number + 1) * self.size < until else None
        more = passes * self.length + min((number + 1) * self.size, self.length) < until
        return (number + 1) % -(-self.length // self.size) if more else None

    def get(self, number: int) -> Block | None:
        """A block: held, being read, or read now, together with all before it of which nothing is known. None for one that turned
        out not to be there."""
        while number not in self.blocks:
            if self.length is not None and number * self.size >= self.length:
                return None
            wanted = min(number, len(self.entries))
            if self.ahead is None or self.ahead[0] != wanted:
                self.finish_reading()
                self.begin_reading(wanted)
            self.take(*self.finish_reading())
        return self.blocks[number]

    def begin_reading(self, number: int) -> None:
        """In a thread of its own, which a signal does not interrupt and which no end of the process waits for."""
        future: Future = Future()

        def work() -> None:
            try:
                future.set_result(self.read(number))
            except BaseException as error:  # whoever asks for the block is told
                future.set_exception(error)

        thread = threading.Thread(target=work, name="t2ilib-stream", daemon=True)
        self.ahead = number, future, thread
        thread.start()

    def finish_reading(self) -> tuple[int, Block] | None:
        """What is being read, once it is; raises what reading it did."""
        if self.ahead is None:
            return None
        number, future, thread = self.ahead
        try:
            block = future.result()
        finally:
            if future.done():
                thread.join()
                self.ahead = None
        return number, block

    def read(self, number: int) -> Block:
        before = self.entries[number - 1] if number else None
        if self.reading is None or self.at != number:
            self.stop_reading()
            cursor = before and before.cursor
            self.reading = Reading(self.stream, cursor, self.config, self.edits, self.held_out, self.closed)
        known = number < len(self.entries)
        try:
            block = self.reading.block(self.size, None if known else Totals(before.used, before.rejected))
        except BaseException:
            self.stop_reading()
            raise
        self.at = number + 1
        if block.last:
            self.stop_reading()
        return block

    def stop_reading(self) -> None:
        if self.reading is not None:
            self.reading.close()
        self.reading = None

    def take(self, number: int, block: Block) -> None:
        """Holds a block that was read and the one before it, of others what is wanted. Raises StreamError where it has changed."""
        if number == len(self.entries):
            self.entries.append(entry_of(block))
            self.rows[number], self.told[number] = rows_of(block), block.rejected
            if self.writing:
                self.write(number)  # what a run without its files passes by on its way to its step
            if block.last:
                log.info("%s: a pass has %s pictures", shown(self.stream.folder), f"{self.length:,}")
        else:
            entry = self.entries[number]
            if (block.digest, block.last) != (entry.digest, entry.last):
                first = number * self.size
                raise StreamError(
                    f"{shown(self.stream.folder)} has changed since this run met its pictures {first + 1} to {first + entry.size}:"
                    " put it back as it was, or choose another output folder"
                )
        for other in [*self.blocks]:
            if other not in (*self.wanted, number - 1):
                del self.blocks[other]
        if len(block):
            self.blocks[number] = block

    def begin(self, rows: Iterable[tuple], summary: dict[str, Any]) -> None:
        """From here on what is met is written down; `rows`: what the manifest begins with, `summary`: what is known from the start."""
        self.journal.begin(rows, summary)
        self.writing = True

    def write(self, until: int) -> None:
        """Writes down, and tells, the blocks before `until`."""
        for number in sorted(self.rows):
            if number < until:
                rows, entry = self.rows.pop(number), self.entries[number]
                if self.writing:
                    self.journal.add(entry, rows)
                self.tell(number, entry, self.told.pop(number))

    def tell(self, number: int, entry: Entry, rejected: Sequence[Named]) -> None:
        first, where = number * self.size, shown(self.stream.folder)
        which = f"pictures {first + 1:,} to {first + entry.size:,}" if entry.size else "behind the last picture"
        if rejected:
            log.warning("%s, %s: %d rejected:\n  %s", where, which, len(rejected), listed(Path(), rejected))
        elif entry.size:
            log.info("%s, %s: none rejected", where, which)

    def close(self) -> None:
        """Ends what reads and decodes, and tells the totals."""
        if self.closed.is_set():
            return
        self.closed.set()
        self.closing.close()
        if self.ahead is not None:
            thread = self.ahead[2]
            thread.join(PATIENCE)
            if thread.is_alive():
                log.warning("%s: an answer that does not come is given up", shown(self.stream.folder))
                return
        self.ahead = None
        self.stop_reading()
        met = [entry for number, entry in enumerate(self.entries) if number not in self.rows]
        if met:
            log.info(
                "%s: %s pictures of the stream were met: %s can be used, %s rejected",
                shown(self.stream.folder),
                f"{met[-1].used + met[-1].rejected:,}",
                f"{met[-1].used:,}",
                f"{met[-1].rejected:,}",
            )


def entry_of(block: Block) -> Entry:
    totals = block.totals
    return Entry(len(block), block.digest, block.cursor, block.last, totals.used, totals.rejected)


def rows_of(block: Block) -> list[tuple]:
    """Rows of the manifest, without the pictures' bytes."""
    used = used_rows("training", block.records, block.seen)
    return [*used, *other_rows(block.rejected, block.aside, block.hidden)]
