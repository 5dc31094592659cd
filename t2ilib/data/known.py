"""What was seen of pictures whose files have not changed since. Decoding a hundred thousand takes minutes, and each run of a study looks at
the same.

Kept in an SQLite file in the cache folder, under a hash of each file's place, size and time and of what reads it. What could not be read
is not kept: it is looked at again. A file that cannot be used is no reason to stop: then everything is looked at.
"""

import contextlib
import hashlib
import json
import logging
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import PIL

from t2ilib.cachefolder import cache_folder
from t2ilib.data.pictures import Seen
from t2ilib.data.records import Readable, stamp

log = logging.getLogger(__name__)

READER = f"1 {PIL.__version__}"
"""Another number where pictures are read otherwise than before."""
AT_ONCE = 500
SECONDS = 60
"""To wait for another process that writes."""
TABLE = "CREATE TABLE IF NOT EXISTS seen (stamp BLOB PRIMARY KEY, sha256 BLOB, height INT, width INT, notes TEXT) WITHOUT ROWID"


def key_of(path: Readable, use: str = "picture") -> bytes | None:
    """What a file is known by, as it is now; ask before it is read, or what was seen might be kept under what it became meanwhile. None
    where that is not known, or the file was written just now. `use`: what it is looked at as."""
    told = stamp(path)
    return (
        told and hashlib.blake2b(f"{READER} {use}\0{told}".encode("utf-8", "surrogateescape"), digest_size=16).digest()
    )


def recall(keys: Sequence[bytes | None]) -> list[Seen | None]:
    """What was seen of each, None where nobody has looked."""
    found: dict[bytes, Seen] = {}
    asked = [key for key in keys if key]
    with forgiving(), opened() as database:
        for start in range(0, len(asked), AT_ONCE):
            part = asked[start : start + AT_ONCE]
            places = ",".join("?" * len(part))
            rows = database.execute(f"SELECT * FROM seen WHERE stamp IN ({places})", part)
            found |= {
                key: Seen(sha256, height, width, tuple(json.loads(notes))) for key, sha256, height, width, notes in rows
            }
    return [key and found.get(key) for key in keys]


def remember(seen: Iterable[tuple[bytes | None, Seen]]) -> None:
    """What was seen, each with its key from before it was."""
    rows = [
        (key, picture.sha256, picture.height, picture.width, json.dumps(picture.notes)) for key, picture in seen if key
    ]
    if rows:
        with forgiving(), opened() as database:
            database.executemany("INSERT OR REPLACE INTO seen VALUES (?, ?, ?, ?, ?)", rows)


@contextlib.contextmanager
def opened() -> Iterator[sqlite3.Connection]:
    """The database; what was changed is kept at the end."""
    place().parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(sqlite3.connect(place(), timeout=SECONDS)) as database, database:
        database.execute(TABLE)
        yield database


@contextlib.contextmanager
def forgiving() -> Iterator[None]:
    """Where the database cannot be used, what this scope asks of it is left out."""
    try:
        yield
    except (OSError, ValueError, sqlite3.Error) as error:
        log.warning(
            "%s cannot be used, so pictures are looked at again: %s. If that stays so, delete it", place(), error
        )


def place() -> Path:
    return cache_folder() / "seen.sqlite"
