"""WebDataset shards from front to back: what a sample needs is read as it passes by, and no shard is ever held.

Files of one sample lie together in its shard, as WebDataset's own writers leave them; those that do not are told and rejected, where
`webdataset`, which sees whole shards, brings them together. What a sample is and says is decided there. A place is a shard's number and
the byte of a header in it. Remote shards are read in ranges where the server knows them, so that a pause of hours breaks nothing and a
run resumes without what came before; else in one long answer, which is asked for again, and passed over as far as it is known, where it
breaks.
"""

import contextlib
import errno
import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from t2ilib.config import ConfigError, DataConfig
from t2ilib.data.records import Cursor, Held, Listing, Readable, Record
from t2ilib.data.sources.archived import LARGEST
from t2ilib.data.sources.files import is_hidden
from t2ilib.data.sources.places import refuse
from t2ilib.data.sources.sample import is_picture, parts_of
from t2ilib.data.sources.shardindex import Index, Member, as_member, in_blocks
from t2ilib.data.sources.spans import (
    FIRST_WAIT,
    MAY_PASS,
    TRIES,
    Span,
    Unanswered,
    failure,
    file_system,
    is_remote,
    public,
    reason_of,
)
from t2ilib.data.sources.tar import BLOCK, BrokenTar, Entry, Read, entries
from t2ilib.data.sources.webdataset import Account, file_of, reason

log = logging.getLogger(__name__)

Result = TypeVar("Result")
CHECKED = 200
"""Samples after which a column must have been seen."""
PIECE = 2**20
HINT = "The files of a sample must lie together in a shard that is read from front to back; without data.streaming they need not"


class Passing(Account):
    """An account of samples whose pictures' bytes have been read."""

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config)
        self.bodies: dict[int, bytes] = {}

    def place(self, url: str, member: Member) -> Readable:
        span = Span(url, member.offset, member.size, member.name)
        body = self.bodies.get(member.offset)
        return span if body is None else Held(span.name, str(span), span.parent, body)

    def take(self, url: str, together: list[tuple[Member, bytes | None]]) -> Listing:
        """What members that lie together, each with its bytes where it is a picture, are."""
        for told in (self.records, self.texts, self.hidden, self.aside, self.rejected):
            told.clear()
        self.bodies = {member.offset: body for member, body in together if body is not None}
        self.add(url, Index(0, tuple(member for member, _ in together)))
        return Listing(
            public(url), tuple(self.records), (), tuple(self.hidden), tuple(self.aside), tuple(self.rejected)
        )


class ShardStream:
    """The samples of shards, one shard after another."""

    hint = HINT

    def __init__(self, config: DataConfig) -> None:
        refuse(
            config, ("weights", "repeats", "folder_repeats"), "and data.streaming (data.weight_column names a field)"
        )
        self.config = config
        self.folder = public(config.path or "")
        self.shards = Account(config).own_shards()
        log.info("%s: a stream of %d shard(s)", self.folder, len(self.shards))

    def read(self, cursor: Cursor | None = None) -> Iterator[tuple[Listing, Cursor]]:
        first, offset = (cursor["shard"], cursor["byte"]) if cursor else (0, 0)
        account, checked = Passing(self.config), []
        for number in range(first, len(self.shards)):
            for listing, byte in self.samples(account, self.shards[number], offset if number == first else 0):
                if cursor is None and len(checked) < CHECKED:
                    checked += listing.records
                    if len(checked) == CHECKED:
                        require_columns(account, checked)
                after = {"shard": number, "byte": byte} if byte is not None else {"shard": number + 1, "byte": 0}
                yield listing, after
        if cursor is None and len(checked) < CHECKED:
            require_columns(account, checked)

    def samples(self, account: Passing, url: str, start: int) -> Iterator[tuple[Listing, int | None]]:
        """Each with the byte of the header behind it; None where the shard is over."""
        together: list[tuple[Member, bytes | None]] = []
        key, end, broken = None, start, None
        with contextlib.ExitStack() as stack:
            try:
                read, size = stack.enter_context(opened(url, start))
            except FileNotFoundError as error:
                raise ConfigError(f"data.path: {public(url)} {reason(error)}") from None
            try:
                for entry in entries(read, size, start):
                    if not entry.name:
                        broken = entry.fault
                        break
                    member = passed(entry, read)
                    if not any(is_hidden(part) for part in entry.name.split("/") if part != "."):
                        mine = parts_of(entry.name)[0]
                        if key not in (None, mine):
                            yield account.take(url, together), end
                            together = []
                        key = mine
                    together.append(member)
                    end = entry.offset + -(-entry.size // BLOCK) * BLOCK
            except BrokenTar as error:
                broken = str(error)
                if self.config.on_error == "stop":
                    raise ConfigError(
                        f"data.path: {public(url)} cannot be read to its end: it {broken}. Download or write it anew, or set"
                        " data.on_error to skip to use what lies before"
                    ) from None
        if together:
            yield account.take(url, together), end
        if broken:
            yield Listing(self.folder, rejected=((file_of(url), broken),)), None


def require_columns(account: Account, records: list[Record]) -> None:
    account.records = list(records)
    account.require_columns()


def passed(entry: Entry, read: Read) -> tuple[Member, bytes | None]:
    """A member as it passes by, and its bytes where it is a picture."""
    member = as_member(entry, read)
    if member.fault or entry.size > LARGEST or not is_picture(parts_of(entry.name)[1]):
        return member, None
    data = read(entry.offset, entry.size)
    if len(data) < entry.size:
        raise BrokenTar(f"is cut off in {entry.name}: it is to have {entry.size} bytes, and {len(data)} came")
    return member, data


@contextlib.contextmanager
def opened(url: str, start: int) -> Iterator[tuple[Read, int]]:
    """What reads a shard from byte `start` on, and its size; the largest number where nobody tells it. Raises OSError."""
    if not is_remote(url):
        with open(url, "rb") as file:

            def read(offset: int, length: int) -> bytes:
                file.seek(offset)
                return file.read(length)

            yield read, file.seek(0, 2)
        return
    size, ranges = told_of(url)
    if ranges and size is not None:
        yield in_blocks(url, size), size
        return
    with contextlib.closing(LongAnswer(url)) as answer:
        yield answer.read, sys.maxsize if size is None else size


def told_of(url: str) -> tuple[int | None, bool]:
    """A remote file's size, None where it is not told, and whether ranges of it can be asked for."""

    def ask() -> tuple[int | None, bool]:
        system, path = file_system(url)
        size = system.info(path).get("size")
        if not public(url).startswith(("http://", "https://")):
            return size, True
        with contextlib.closing(system.open(path, "rb", block_size=0, size=1, headers={"Range": "bytes=0-0"})) as probe:
            return size, probe.r.status == 206

    return persistently(url, ask)


class LongAnswer:
    """A file behind HTTP that is read in one answer, of which nothing is asked twice unless it breaks."""

    def __init__(self, url: str) -> None:
        self.url, self.file, self.at = url, None, 0

    def read(self, offset: int, size: int) -> bytes:
        return persistently(self.url, lambda: self.pass_to(offset, size), self.close)

    def pass_to(self, offset: int, size: int) -> bytes:
        if self.file is None or offset < self.at:
            self.close()
            system, path = file_system(self.url)
            self.file, self.at = system.open(path, "rb", block_size=0, size=1), 0
        while self.at < offset:
            if not self.take(min(PIECE, offset - self.at)):
                return b""
        parts = []
        while size and (part := self.take(size)):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def take(self, size: int) -> bytes:
        part = self.file.read(size)
        self.at += len(part)
        return part

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        self.file = None


def persistently(url: str, ask: Callable[[], Result], after: Callable[[], None] = lambda: None) -> Result:
    """What `ask` gives, in `TRIES` tries, between which `after` is called. Raises OSError: FileNotFoundError where there is nothing."""
    for attempt in range(1, TRIES + 1):
        try:
            return ask()
        except (FileNotFoundError, PermissionError, ConfigError):
            raise
        except Exception as error:  # as in `spans.ask`
            after()
            status = getattr(error, "status", None)
            if isinstance(status, int) and 400 <= status < 500 and status not in MAY_PASS:
                raise failure(f"the server refuses it ({reason_of(error)})", url) from error
            if attempt == TRIES:
                told = f"cannot be read in {TRIES} tries ({reason_of(error)})"
                raise Unanswered(errno.EIO, told, public(url)) from error
            time.sleep(FIRST_WAIT * 2**attempt)
    raise AssertionError
