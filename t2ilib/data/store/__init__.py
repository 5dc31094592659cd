"""Encoded latents and text embeddings on disk: entries by content key, each a few named tensors, in safetensors shards.

A key says all that an entry depends on (model, picture bytes, crop, precision, transform), so what is there under a key is right,
and several runs share one folder. The folder also says what encoded it, and is refused where that is not what is asked for.

What is in the store is read from the headers of its shards into a table of 28 bytes an entry. Memory does not grow with what is
read. A shard is written under a temporary name, synced and renamed, every 32 MiB or 30 seconds, so a kill at any moment costs at
most what was encoded since. One process writes at a time, and the next takes over what it has written. Where a file system has no
locks, two may write at once: their shards have different names, and a key that is in two of them is harmless.

Leaves out: eviction (delete the folder, or any shard of it, and it is encoded again) and compression (noise hardly compresses).
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import platform
import secrets
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import psutil
from filelock import FileLock, Timeout
from torch import Tensor

from t2ilib.data.store.located import Index, Located, MissingEntries, as_keys
from t2ilib.data.store.tensorfile import (
    HEADER_BYTES_PER_ENTRY,
    KEY_BYTES,
    Batch,
    Kind,
    StoreError,
    kind_of,
    write_shard,
)
from t2ilib.memory import require_disk
from t2ilib.text import shown

log = logging.getLogger(__name__)

FORMAT = 1
SHARD_BYTES = 32 * 2**20
"""So much of what is encoded waits in memory. SDXL's text of all of COCO's captions then makes 5,700 shards, which are opened in a second."""
SHARD_ENTRIES = 100_000
"""Many small entries must not make a header longer than safetensors reads."""
SECONDS_BETWEEN_COMMITS = 30.0
SECONDS_UNTIL_ABANDONED = 24 * 3600.0
"""After so long a half-written file is nobody's, also where its process lived on another machine."""
DESCRIPTION, OWNER, LOCK, DRAFT, SHARD = "store.json", ".writer.json", ".lock", ".writing-", ".safetensors"
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
NAMED = 3

Part = bytes | str | int | float | tuple["Part", ...]


def content_key(*parts: Part) -> bytes:
    """16 bytes (BLAKE2b) for `parts`, each with its type and length, so that different parts never read the same.

    Raises TypeError for a part of another type, whose bytes might not be stable.
    """
    return hashlib.blake2b(b"".join(packed(part) for part in parts), digest_size=KEY_BYTES).digest()


def packed(part: Part) -> bytes:
    if isinstance(part, bytes):
        tag, content = b"b", part
    elif isinstance(part, str):
        tag, content = b"s", part.encode("utf-8", "surrogatepass")
    elif isinstance(part, bool):
        tag, content = b"?", str(part).encode()
    elif isinstance(part, int):
        tag, content = b"i", str(part).encode()
    elif isinstance(part, float):
        tag, content = b"f", struct.pack("<d", part)
    elif isinstance(part, tuple):
        tag, content = b"t", b"".join(packed(inner) for inner in part)
    else:
        raise TypeError(
            f"a key is made of bytes, str, int, float and tuples of them, got {type(part).__name__}: {part!r}"
        )
    return tag + len(content).to_bytes(8, "little") + content


@dataclass(frozen=True)
class Share:
    """Of a work that `count` processes do together, every `count`-th piece from the `index`-th on. `meet` waits for all of them."""

    index: int = 0
    count: int = 1
    meet: Callable[[], None] = lambda: None

    def of(self, pieces: Sequence[int]) -> list[int]:
        """Those of `pieces` that are this one's, once every process knows which there are."""
        self.meet()
        return list(pieces[self.index :: self.count])


ALONE = Share()


class TensorStore:
    """Entries in a folder, which need not exist yet. Holds no open file: may be used by threads, forked and pickled.

    `description`: JSON values, what encoded the entries; a folder with another is refused. Raises StoreError for such a folder,
    and ShardError for a shard in it that cannot be used.
    """

    def __init__(self, folder: Path, description: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.description = json.loads(json.dumps(description))  # as it will be read: tuples become lists
        text = json.dumps([FORMAT, self.description], sort_keys=True)
        self.fingerprint = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        self.index = Index.empty()
        self.refresh()

    def __len__(self) -> int:
        return len(self.index.keys)

    def refresh(self) -> None:
        """Takes notice of what others have written or deleted. Costs the listing of the folder where that is nothing."""
        paths = sorted(self.folder.glob(f"[!.]*{SHARD}"))  # not what other systems hide beside a file
        self.check_description(needed=bool(paths))  # after the listing: it is written before the first shard
        known = self.index if self.index.sizes.keys() <= {path.name for path in paths} else Index.empty()
        new = [path for path in paths if path.name not in known.sizes]
        if new or known is not self.index:
            self.index = known.extended(new, self.fingerprint)

    def missing(self, keys: Sequence[bytes] | np.ndarray) -> list[int]:
        """Positions of `keys` that have still to be made, the first of each key."""
        self.refresh()
        asked = as_keys(keys)
        _, first = np.unique(asked, return_index=True)
        first.sort()
        return first[~self.index.find(asked[first])[1]].tolist()

    def locate(self, keys: Sequence[bytes] | np.ndarray) -> Located:
        """Where the entries `keys` (N,) lie. Raises MissingEntries."""
        asked = as_keys(keys)
        index = self.index
        places, there = index.find(asked)
        if not there.all():
            self.refresh()
            index = self.index
            places, there = index.find(asked)
        if not there.all():
            absent = np.flatnonzero(~there)
            named = ", ".join([keys[place].hex() for place in absent[:NAMED]] + ["..."] * (len(absent) > NAMED))
            raise MissingEntries(f"{len(absent):,} of {len(keys):,} entries are not in {shown(self.folder)}: {named}")
        known = index.located
        return Located(known.group[places], known.row[places], known.checksum[places], known.groups)

    @contextlib.contextmanager
    def writing(self, share: Share = ALONE) -> Iterator["Writer"]:
        """Waits until no other process writes, and takes over what one has written: ask for what is `missing` in this scope. With a
        `share` its processes write side by side, under the first one's lock.

        What was added is kept however the scope is left, unless the process is killed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder) if share.index == 0 else contextlib.nullcontext():
            if share.index == 0:
                self.refresh()
                remove_abandoned(self.folder)
                if not (self.folder / DESCRIPTION).exists():
                    text = json.dumps({"format": FORMAT, "description": self.description}, indent=1)
                    commit_file(self.folder / DESCRIPTION, lambda stream: stream.write(text.encode()))
            share.meet()
            self.refresh()
            writer = Writer(self.folder, self.fingerprint)
            try:
                yield writer
            finally:
                writer.commit()
                self.refresh()
            share.meet()
            self.refresh()

    def check_description(self, needed: bool) -> None:
        path, here = self.folder / DESCRIPTION, self.description
        remedy = "choose another folder, or delete this one, and it is encoded again"
        try:
            found = json.loads(path.read_text())
            form, there = found["format"], dict(found["description"])
        except FileNotFoundError:
            if needed:
                raise StoreError(f"{shown(self.folder)} has shards and no {DESCRIPTION}: {remedy}") from None
            return
        except (ValueError, KeyError, TypeError):
            raise StoreError(f"{shown(path)} is damaged: {remedy}") from None
        if form != FORMAT:
            raise StoreError(f"{shown(self.folder)} has format {form!r}, and this version reads {FORMAT}: {remedy}")
        values = {
            name: [json.dumps(told[name], sort_keys=True) if name in told else "nothing" for told in (there, here)]
            for name in {**there, **here}
        }
        differ = "; ".join(f"{name} is {a} there and {b} here" for name, (a, b) in values.items() if a != b)
        if differ:
            raise StoreError(f"{shown(self.folder)} was made with something else ({differ}): {remedy}")

    @property
    def bytes(self) -> int:
        """On disk. (Last, because above it the name is Python's.)"""
        return sum(self.index.sizes.values())


class Writer:
    """Collects entries and commits them, a shard at a time. Made by `TensorStore.writing`."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        self.batches: dict[Kind, list[Batch]] = {}
        self.num_bytes = self.num_entries = 0
        self.last_commit = time.monotonic()

    def require(self, num_entries: int, bytes_per_entry: int) -> None:
        """Raises ConfigError where the disk cannot hold so many more with a tenth to spare."""
        require_disk(
            self.folder,
            num_entries * (bytes_per_entry + HEADER_BYTES_PER_ENTRY),
            f"{num_entries:,} encoded entries",
            "free some, put the folder on another disk, or set data.cache to latents, which needs less (captions are then "
            "encoded in the step), or to off, which needs none",
        )

    def add(self, keys: Sequence[bytes], tensors: Mapping[str, Tensor]) -> None:
        """Entries `keys` (B,) with `tensors`, name -> (B, ...), which are copied. Raises ValueError, and OSError as `commit` does."""
        as_keys(keys)
        if not tensors or any(tensor.shape[:1] != (len(keys),) for tensor in tensors.values()):
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            raise ValueError(f"{len(keys)} keys need tensors whose first dimension is that, got {shapes}")
        kind = kind_of(tensors)
        at_once = max(1, min(SHARD_ENTRIES, SHARD_BYTES // max(1, sum(column.row_bytes for column in kind))))
        for start in range(0, len(keys), at_once):
            part = slice(start, start + at_once)
            batch = Batch.of(keys[part], {name: tensor[part] for name, tensor in tensors.items()})
            self.batches.setdefault(kind, []).append(batch)
            self.num_bytes += sum(values.nbytes for values in batch.values.values())
            self.num_entries += len(batch.keys)
            late = time.monotonic() - self.last_commit >= SECONDS_BETWEEN_COMMITS
            if late or self.num_bytes >= SHARD_BYTES or self.num_entries >= SHARD_ENTRIES:
                self.commit()

    def commit(self) -> None:
        """Writes what was added since the last time, if anything. Raises OSError with nothing lost that was committed."""
        batches = {kind: own for kind, own in self.batches.items() if own}  # an interrupt may have left one empty
        if batches:
            # Older shards come first by name: of a key that is in two, every process takes the same.
            path = self.folder / f"{time.time_ns():016x}-{secrets.token_hex(4)}{SHARD}"
            commit_file(path, lambda stream: write_shard(stream, batches, self.fingerprint))
            log.debug("%s: %d entries, %d bytes", shown(path), self.num_entries, self.num_bytes)
        self.batches, self.num_bytes, self.num_entries = {}, 0, 0
        self.last_commit = time.monotonic()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the right to write into `folder`. The lock is the operating system's own, so it dies with its process."""
    lock = FileLock(folder / LOCK, is_singleton=True)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("%s: waiting for %s, which is writing there", shown(folder), owner(folder))
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        log.warning("%s: there are no locks on this file system, so another process may encode the same", shown(folder))
    try:
        (folder / OWNER).write_text(json.dumps({"process": os.getpid(), "machine": platform.node()}))
        yield
    finally:
        lock.release()


def owner(folder: Path) -> str:
    try:
        found = json.loads((folder / OWNER).read_text())
        return f"process {found['process']} on {found['machine']}"
    except (OSError, ValueError, KeyError):  # it is just being written
        return "another process"


def commit_file(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Has `write` fill a file that bears its name only once the disk holds all of it."""
    draft = path.with_name(f"{DRAFT}{os.getpid()}-{secrets.token_hex(4)}-{platform.node()}")
    try:
        with draft.open("xb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    if os.name != "nt":  # which opens no folders
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_abandoned(folder: Path) -> None:
    """Deletes half-written files of processes that are gone."""
    for path in folder.glob(f"{DRAFT}*"):
        process, _, machine = path.name.removeprefix(DRAFT).split("-", 2)
        with contextlib.suppress(FileNotFoundError):
            # The lock is ours, so our own number is one that a dead process had, as happens in containers.
            gone = machine == platform.node() and (int(process) == os.getpid() or not psutil.pid_exists(int(process)))
            if gone or time.time() - path.stat().st_mtime > SECONDS_UNTIL_ABANDONED:
                path.unlink()
