"""Where shards lie: files, or what stands behind any URL that fsspec knows; and ranges of them, which are read as pictures are.

A path is a folder, a file, a pattern with `*` or one with braces (`shard-{000000..000012}.tar`). Local files are opened for each
read, so threads share no position; remote ranges are asked for singly, three times where an answer fails. An answer of another
length than asked for, or with other bytes than an index promises, is an error, never a picture.
"""

import contextlib
import errno
import glob
import itertools
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from t2ilib.config import ConfigError
from t2ilib.data.records import stamp_of_file
from t2ilib.text import shown

REMOTE = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+(://|::)")  # a drive of Windows has one letter
IN_A_TAR = re.compile(r"\.(tar|t[a-z]z2?)\b", re.IGNORECASE)
BRACES = re.compile(r"\{([^{}]*)\}")
MOST_SHARDS = 1_000_000
TRIES, FIRST_WAIT, LONGEST_WAIT = 3, 0.5, 10.0
MAY_PASS = (408, 425, 429)
"""Answers of HTTP that say: later."""
STAMP = (
    "mtime",
    "created",
    "ETag",
    "etag",
    "LastModified",
    "Last-Modified",
    "last_modified",
    "updated",
    "md5Hash",
    "version_id",
)
"""What file systems tell of a file that changes when it does."""


@dataclass(frozen=True, slots=True)
class Span:
    """A range of a file or URL as a picture's path: what lies at `offset`, `size` bytes long. `member`: its name in a shard, with its
    folders; without one it is the shard itself. `crc`: CRC-32 of its bytes, where an index tells it."""

    url: str
    offset: int
    size: int
    member: str = ""
    crc: int | None = None

    @property
    def name(self) -> str:
        return PurePosixPath(self.member or public(self.url).replace("\\", "/")).name

    @property
    def parent(self) -> str:
        """The shard in which it lies, as messages call it."""
        return public(self.url)

    def __str__(self) -> str:
        return f"{public(self.url)}/{self.member}" if self.member else public(self.url)

    def stamp(self) -> str | None:
        return None if is_remote(self.url) else stamp_of_file(Path(self.url), self.offset, self.size, self.crc)

    def read_bytes(self) -> bytes:
        """Raises OSError, also where the bytes are not those that the index told of."""
        data = read_range(self.url, self.offset, self.size)
        if self.crc is not None and zlib.crc32(data) != self.crc:
            raise failure("its bytes are not those that the index of its shard tells of: delete the index", self.url)
        return data


def failure(reason: str, url: str) -> OSError:
    return OSError(errno.EIO, reason, public(url))


def public(url: str) -> str:
    """A URL without what may be secret in it: passwords, and tokens behind `?`."""
    return re.sub(r"//[^/@]*@", "//", url.partition("?")[0]) if is_remote(url) else url


def is_remote(path: str) -> bool:
    return REMOTE.match(path) is not None


def beside(url: str, ending: str) -> str:
    """The file of the same name with an ending more."""
    path, mark, query = url.partition("?") if is_remote(url) else (url, "", "")
    return f"{path}{ending}{mark}{query}"


def read_range(url: str, offset: int, size: int) -> bytes:
    """`size` bytes from `offset`; raises OSError where there are not so many."""
    data = read_up_to(url, offset, size)
    if len(data) < size:
        raise failure(f"{len(data)} of {size} bytes at {offset}: the shard is shorter than its index says", url)
    return data


def read_up_to(url: str, offset: int, size: int) -> bytes:
    """As `read_range`, but fewer bytes where the file ends."""
    if not is_remote(url):
        with open(url, "rb") as file:
            file.seek(offset)
            return file.read(size)
    if not size:
        return b""
    data = remote_range(url, offset, offset + size)
    if len(data) > size:
        raise failure(f"the server gives {len(data)} bytes where {size} are asked for: it knows no ranges", url)
    return data


def read_whole(url: str) -> bytes:
    """A small file; raises OSError."""
    if is_remote(url):
        return remote_range(url, None, None)
    with open(url, "rb") as file:
        return file.read()


class Unanswered(OSError):
    """What may go well another time."""


def remote_range(url: str, start: int | None, end: int | None) -> bytes:
    """Raises OSError: FileNotFoundError where there is nothing, Unanswered after TRIES."""
    from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

    retrying = Retrying(
        stop=stop_after_attempt(TRIES),
        wait=wait_exponential(FIRST_WAIT, LONGEST_WAIT),
        retry=retry_if_exception_type(Unanswered),
        reraise=True,
    )
    return retrying(ask, url, start, end)


def ask(url: str, start: int | None, end: int | None) -> bytes:
    system, path = file_system(url)
    try:
        return system.cat_file(path, start=start, end=end)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # each backend has errors of its own: aiohttp.ClientError, botocore's, time-outs
        status = getattr(error, "status", None)
        if isinstance(status, int) and 400 <= status < 500 and status not in MAY_PASS:
            raise failure(f"the server refuses it ({reason_of(error)})", url) from error
        raise Unanswered(errno.EIO, f"cannot be read in {TRIES} tries ({reason_of(error)})", public(url)) from error


def reason_of(error: Exception) -> str:
    return shown(str(error) or type(error).__name__)


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it. Raises ConfigError for a protocol that is not known or not installed."""
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except ImportError as error:
        what = f"{url.partition(':')[0]}: needs a package that is not installed"
        raise ConfigError(f"data.path {public(url)}: {what}. {error} (with pip)") from None
    except ValueError as error:
        raise ConfigError(
            f"data.path {public(url)}: {error}. Write a path, or a URL such as https://, s3://, gs://, hf://"
        ) from None


def size_and_stamp(url: str) -> tuple[int, str]:
    """The size in bytes, and a text that changes when the file does. Raises OSError; what has no size cannot be read by ranges."""
    if not is_remote(url):
        told = os.stat(url)
        return told.st_size, f"{told.st_mtime_ns}"
    system, path = file_system(url)
    try:
        info = system.info(path)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise failure(f"nothing is told of it ({reason_of(error)})", url) from error
    if info.get("size") is None:
        raise failure("the server does not tell its size, so it cannot be read by ranges: download it", url)
    return info["size"], " ".join(f"{name}={info[name]}" for name in STAMP if info.get(name))


def find_files(where: str) -> tuple[list[str], list[str], list[str]]:
    """What a path means: the files it names, those it finds (in a folder or by `*`), in order of their names, and subfolders there.

    Raises ConfigError for a folder or pattern where there is nothing.
    """
    if where.startswith("pipe:"):
        raise ConfigError(f"data.path {where}: commands are not run; give the URL itself")
    literal = not is_remote(where) and os.path.exists(where)
    named, found, folders = [], [], []
    for path in [where] if literal else expanded(where):
        if not literal and ("*" in path or (not is_remote(path) and glob.has_magic(path))):
            matching = globbed(path)
            if not matching:
                raise ConfigError(f"data.path {public(path)}: no file fits this pattern")
            found += matching
        elif is_folder(path):
            inside = list(listed(path))
            found += [name for name, folder in inside if not folder]
            folders += [name for name, folder in inside if folder]
        else:
            named.append(path)
    return named, sorted(found), sorted(folders)


def expanded(pattern: str) -> list[str]:
    """A pattern with braces as the names that it stands for, in the order in which a shell writes them."""
    parts, place, count = [], 0, 1
    for match in BRACES.finditer(pattern):
        texts = alternatives(match[1], pattern)
        parts += [[pattern[place : match.start()]], texts]
        place, count = match.end(), count * len(texts)
        if count > MOST_SHARDS:
            raise ConfigError(f"data.path {public(pattern)}: stands for more than {MOST_SHARDS} shards")
    return ["".join(words) for words in itertools.product(*parts, [pattern[place:]])]


def alternatives(text: str, pattern: str) -> list[str]:
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", text):
        first, last = int(numbers[1]), int(numbers[2])
        padded = any(number.startswith("0") and len(number) > 1 for number in numbers.groups())
        width = max(map(len, numbers.groups())) if padded else 0
        if abs(last - first) >= MOST_SHARDS:
            raise ConfigError(f"data.path {public(pattern)}: stands for more than {MOST_SHARDS} shards")
        order = range(first, last + 1) if first <= last else range(first, last - 1, -1)
        return [f"{number:0{width}d}" for number in order]
    if "," in text:
        return text.split(",")
    raise ConfigError(f"data.path {public(pattern)}: write {{000000..000012}} or {{train,more}}, not {{{text}}}")


def globbed(pattern: str) -> list[str]:
    if not is_remote(pattern):
        return [path for path in glob.glob(pattern) if os.path.isfile(path)]
    system, path = file_system(pattern)
    with remote_mistakes(pattern):
        return [system.unstrip_protocol(name) for name in system.glob(path)]


def is_folder(path: str) -> bool:
    if not is_remote(path):
        return os.path.isdir(path)
    return path.endswith("/") or not IN_A_TAR.search(public(path).rpartition("/")[2])


def listed(folder: str) -> Iterator[tuple[str, bool]]:
    """What lies in a folder, each with whether it is one."""
    if not is_remote(folder):
        try:
            with os.scandir(folder) as inside:
                yield from ((entry.path, entry.is_dir()) for entry in inside)
        except OSError as error:
            raise ConfigError(f"data.path {shown(folder)} cannot be listed: {error.strerror}") from None
        return
    system, path = file_system(folder)
    with remote_mistakes(folder):
        inside = system.ls(path, detail=True)
    for info in inside:
        if public(info["name"]).rstrip("/") != public(path).rstrip("/"):  # servers list links that sort the list, too
            yield system.unstrip_protocol(info["name"]), info.get("type") == "directory"


@contextlib.contextmanager
def remote_mistakes(url: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # as in `remote_range`
        raise ConfigError(
            f"data.path {public(url)} cannot be listed ({reason_of(error)}): name the shards, as in"
            " shard-{000000..000012}.tar"
        ) from None
