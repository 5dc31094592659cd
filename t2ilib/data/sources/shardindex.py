"""What lies where in a shard, and its captions: read from the index beside it, else from the tar's headers, once.

`shard-000000.tar.idx.json` beside a shard makes it known without reading any of it. It counts while the shard has the size that the
index tells of and, where that can be seen, was not written after it; a picture's own bytes are checked against it when they are
read. Another shard's headers are read through: over local bodies by seeking, of remote shards in blocks, which is most of them.
What comes of that is kept in the user's cache under the shard's name, size and time.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from t2ilib.cachefolder import cache_folder
from t2ilib.config import ConfigError
from t2ilib.data.sources.spans import beside, is_remote, public, read_up_to, read_whole, size_and_stamp
from t2ilib.data.sources.tar import BrokenTar, Entry, Read, entries
from t2ilib.text import decoded, shown

log = logging.getLogger(__name__)

ENDING = ".idx.json"
VERSION = 1
TEXTS = ("txt", "caption", "text", "json")
"""Endings of the files that hold what is said of a picture."""
LONGEST_TEXT = 2**20
REMOTE_BLOCK = 2**22
AT_ONCE = 8
"""Shards that are asked about at the same time."""


class Member(NamedTuple):
    """A file in a shard. `crc`: of its bytes. `text`: what a caption file says. `fault`: why it cannot be used. Without a name it is
    the shard itself, of which `fault` tells something."""

    name: str
    offset: int
    size: int
    crc: int | None = None
    text: str | None = None
    fault: str | None = None


@dataclass(frozen=True)
class Index:
    """The members of a shard of `size` bytes, in their order. `broken`: why it could be read no further. `origin`: where this was
    read (its index, the cache, its headers). `sha256` of the shard, and `contents`, which only its own index tells."""

    size: int
    members: tuple[Member, ...]
    broken: str | None = None
    origin: str = ""
    sha256: str | None = None
    contents: str | None = None

    def pack(self, **more: Any) -> bytes:
        rows = [trimmed(member) for member in self.members]
        told = {"sha256": self.sha256, "contents": self.contents, "broken": self.broken}
        kept = {name: value for name, value in told.items() if value is not None}
        values = {"t2ilib": VERSION, "size": self.size, **kept, **more, "members": rows}
        return json.dumps(values, separators=(",", ":")).encode()


def trimmed(member: Member) -> list[Any]:
    row = list(member)
    while row[-1] is None:
        row.pop()
    return row


def unpacked(data: bytes, origin: str) -> tuple[Index, dict[str, Any]]:
    """An index and whatever else stands in its file; raises ValueError for another file, or one that does not hold together."""
    values = json.loads(data)
    if not isinstance(values, dict) or values.get("t2ilib") != VERSION:
        raise ValueError("it is none of this version of t2ilib")
    try:
        members = tuple(Member(*row) for row in values.pop("members"))
        index = Index(
            values["size"], members, values.get("broken"), origin, values.get("sha256"), values.get("contents")
        )
        whole = all(
            isinstance(m.name, str)
            and isinstance(m.offset, int)
            and isinstance(m.size, int)
            and 0 <= m.offset <= m.offset + m.size <= index.size
            and is_text(m.text, m.fault)
            for m in members
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is not whole: {error}") from None
    if not whole:
        raise ValueError("it tells of bytes that its shard has not")
    return index, values


def is_text(*values: Any) -> bool:
    return all(value is None or isinstance(value, str) for value in values)


def indexes_of(shards: Iterable[str]) -> Iterator[Index | OSError]:
    """The index of each shard, or why there is none. Some are asked for ahead, and none is held on to."""
    shards, ahead = iter(shards), deque()
    with ThreadPoolExecutor(AT_ONCE) as threads:
        for url in itertools.islice(shards, AT_ONCE):
            ahead.append(threads.submit(index_or_error, url))
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(threads.submit(index_or_error, url) for url in itertools.islice(shards, 1))


def index_or_error(url: str) -> Index | OSError:
    try:
        return index_of(url)
    except OSError as error:
        return error


def index_of(url: str) -> Index:
    """Raises OSError for a shard that is not there or cannot be read."""
    size, stamp = size_and_stamp(url)
    own = own_index(url, size)
    if own is not None and not written_after(url, beside(url, ENDING)):
        return own
    seen = kept_index(url, size, stamp) or keep(url, stamp, scan(url, size))
    if own is not None and [m._replace(crc=None) for m in own.members] == list(seen.members):
        return own  # as when both were copied, the index first
    if own is not None:
        log.warning(
            "%s is stale and not used: the shard was written after it, with other members", shown(public(url)) + ENDING
        )
    return seen


def written_after(url: str, index: str) -> bool:
    return not is_remote(url) and os.stat(url).st_mtime_ns > os.stat(index).st_mtime_ns


def own_index(url: str, size: int) -> Index | None:
    """What lies beside a shard of this size; logs why it does not count."""
    place = beside(url, ENDING)
    try:
        index, _ = unpacked(read_whole(place), "its index")
    except OSError:
        return None
    except (ValueError, RecursionError) as error:
        log.warning("%s is not used: %s", shown(public(place)), error)
        return None
    if index.size == size:
        return index
    log.warning(
        "%s is stale and not used, for the shard has %d bytes, and it tells of %d: its headers are read instead",
        shown(public(place)),
        size,
        index.size,
    )
    return None


def cached(url: str) -> Path:
    absolute = url if is_remote(url) else os.path.abspath(url)
    return (
        cache_folder()
        / "shards"
        / f"{hashlib.sha256(absolute.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.json"
    )


def kept_index(url: str, size: int, stamp: str) -> Index | None:
    try:
        index, values = unpacked(cached(url).read_bytes(), "the cache")
    except (OSError, ValueError, RecursionError):
        return None
    return index if stamp and (index.size, values.get("stamp")) == (size, stamp) else None


def keep(url: str, stamp: str, index: Index) -> Index:
    """Keeps what was read in the user's cache, whole or not at all; a cache that takes nothing costs only time. Without a `stamp`, which
    few servers do not give, it could never be told to be stale."""
    if not stamp:
        return index
    target = cached(url)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".part", delete=False) as draft:
            draft.write(index.pack(stamp=stamp))
        os.replace(draft.name, target)
    except OSError as error:
        log.warning("%s cannot keep the index of %s: %s", target.parent, shown(public(url)), error.strerror)
        with contextlib.suppress(OSError, NameError):
            os.unlink(draft.name)
    return index


def scan(url: str, size: int) -> Index:
    """Reads the headers and captions of a shard."""
    if is_remote(url):
        log.info("%s has no index: %.0f MiB pass by once, to see what lies where", public(url), size / 2**20)
        return read_members(in_blocks(url, size), size)
    with open(url, "rb") as file:

        def read(offset: int, length: int) -> bytes:
            file.seek(offset)
            return file.read(length)

        return read_members(read, size)


def in_blocks(url: str, size: int) -> Read:
    """Ranges of a remote file out of blocks of it, the last of which is held."""
    held: dict[int, bytes] = {}

    def read(offset: int, length: int) -> bytes:
        parts = []
        end = min(offset + length, size)
        while offset < end:
            number, inside = divmod(offset, REMOTE_BLOCK)
            if number not in held:
                block = read_up_to(url, number * REMOTE_BLOCK, min(REMOTE_BLOCK, size - number * REMOTE_BLOCK))
                held.clear()
                held[number] = block
            part = held[number][inside : inside + end - offset]
            if not part:
                break
            parts.append(part)
            offset += len(part)
        return b"".join(parts)

    return read


def read_members(read: Read, size: int) -> Index:
    members, broken = [], None
    try:
        for entry in entries(read, size):
            members.append(as_member(entry, read))
    except BrokenTar as error:
        broken = str(error)
    return Index(size, tuple(members), broken, "its headers")


def as_member(entry: Entry, read: Read) -> Member:
    """A member with its text, if it is a caption."""
    member = Member(entry.name, entry.offset, entry.size, fault=entry.fault)
    if entry.fault or entry.name.rpartition(".")[2].lower() not in TEXTS:
        return member
    if entry.size > LONGEST_TEXT:
        return member._replace(fault=f"has {entry.size} bytes, and what is said of a picture at most {LONGEST_TEXT}")
    try:
        return member._replace(text=decoded(read(entry.offset, entry.size), entry.name))
    except ConfigError as error:
        return member._replace(fault=str(error))
