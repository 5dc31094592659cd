"""Files of data sets over HTTP, however often the connection breaks: resumed, checked, and under their name only when they are right.

A file grows as `NAME.part`, with what its server said of it (size, ETag, Last-Modified) beside it in `NAME.part.json`, so that a killed
download goes on where it was, by Range and If-Range (RFC 9110, 13.1.5 and 14.2). Where the server ignores ranges, or has another
file by now, it begins again. It gets its name once size and checksum hold and the disk has it.

COCO publishes no checksums. Its SHA-256 are those in pytorch/vision (torchvision/prototype/datasets/_builtin/coco.py), which many other
projects' scripts repeat; they go with the MD5 in PaddlePaddle/PaddleDetection (ppdet/utils/download.py) and with the sizes that the server
tells wget. images.cocodataset.org has no certificate for its own name; the bucket behind it is reached under Amazon's.

Leaves out how much disk is needed and what becomes of the files (the package).
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import requests

from t2ilib.data.download.server import ANOTHER, DownloadError, Interrupted, Remote, answered, described, persistently

log = logging.getLogger(__name__)

CHUNK = 2**20

Tell = Callable[[str, int, int], None]
"""What is going on, how many bytes are done, of how many."""
Check = Callable[[Path], None]
"""Reads a file and raises ValueError for a damaged one."""


@dataclass(frozen=True)
class RemoteFile:
    """An archive of a data set: its path on the server, its size in bytes and its checksum, how many bytes come out of each of its
    own, and what has to be in it: files, or folders with a slash at the end."""

    part: str
    path: str
    size: int
    checksum: str
    expansion: float
    holds: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


SERVERS = {"coco": ("https://s3.amazonaws.com/images.cocodataset.org", "http://images.cocodataset.org")}
"""Where the official files lie, the first asked unless told otherwise: whose sizes and checksums DATASETS has."""
DATASETS: dict[str, tuple[RemoteFile, ...]] = {
    "coco": (
        RemoteFile(
            "annotations",
            "annotations/annotations_trainval2017.zip",
            252_907_541,
            "sha256:113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
            3.5,
            ("annotations/captions_train2017.json", "annotations/captions_val2017.json"),
        ),
        RemoteFile(
            "val",
            "zips/val2017.zip",
            815_585_330,
            "sha256:4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
            1.02,
            ("val2017/",),
        ),
        RemoteFile(
            "train",
            "zips/train2017.zip",
            19_336_861_798,
            "sha256:69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
            1.02,
            ("train2017/",),
        ),
    )
}
"""Small ones first, so that what goes wrong does so early."""


class Wrong(ValueError):
    """A file that is not what it should be."""


def fetch(
    session: requests.Session, url: str, target: Path, remote: Remote, checksum: str | None, tell: Tell, check: Check
) -> str | None:
    """Has `target` hold the file at `url`, and gives the checksum that was found right, where one is known (`verified`).

    Raises DownloadError when nothing helps; what has arrived by then is kept, unless it is wrong.
    """
    part = part_of(target)
    if target.exists():
        try:
            return verified(target, remote, checksum, tell, check)
        except Wrong as error:
            log.warning("%s is there, but %s: it is fetched", target, error)
        if checksum and not part.exists() and size_of(target) < remote.size:
            target.replace(part)  # what another program began; its checksum tells whether it was a beginning
    for again in (False, True):
        remote, in_pieces = grow(session, url, part, remote, checksum, tell)
        try:
            proven = verified(part, remote, checksum, tell, check)
            break
        except Wrong as error:
            forget(part)
            if again or not in_pieces:
                raise DownloadError(f"{url}: {error}. It was removed: run the command again, or {ANOTHER}") from None
            log.warning("%s, which came in pieces: %s; once more from the beginning", target.name, error)
    part.replace(target)
    forget(part)
    return proven


def grow(
    session: requests.Session, url: str, part: Path, remote: Remote, checksum: str | None, tell: Tell
) -> tuple[Remote, bool]:
    """Fetches what `part` has not yet. Gives the file as the server described it when it sent it, and whether it came in pieces."""
    known = read_note(part)
    resumable = checksum if known is None else not remote.is_other_than(known) and (checksum or known.validator)
    if size_of(part) and (not resumable or size_of(part) > remote.size):
        log.info("%s: it has changed on the server, and is fetched from the beginning", url)
        forget(part)
    write_note(part, remote)
    in_pieces = size_of(part) > 0
    connections = 0

    def attempt() -> None:
        nonlocal connections, remote
        connections += 1
        if size_of(part) < remote.size:
            remote = receive(session, url, part, remote, checksum, tell)

    persistently(attempt, url, lambda: size_of(part))
    return remote, in_pieces or connections > 1


def receive(
    session: requests.Session, url: str, part: Path, remote: Remote, checksum: str | None, tell: Tell
) -> Remote:
    """One connection's share of the file. Raises Interrupted with what arrived kept, and DownloadError for another file than that
    whose checksum is known."""
    offset = size_of(part)
    headers = {"Range": f"bytes={offset}-"} if offset else {}
    if offset and remote.validator:
        headers["If-Range"] = remote.validator
    with answered(session, "GET", url, **headers) as response:
        if offset and (response.status_code in (412, 416) or not continues(response, remote, offset)):
            forget(part)
            raise Interrupted("the server does not go on with what is there")
        if response.status_code != 206:
            now, offset = described(response, url), 0
            if checksum and now.size != remote.size:
                raise DownloadError(
                    f"{url}: it has {now.size:,} bytes now, and had {remote.size:,}: run the command again"
                )
            if now.is_other_than(remote):
                log.info("%s: it has changed on the server, and is fetched from the beginning", url)
            remote = now
            write_note(part, remote)
        with part.open("ab" if offset else "wb") as sink:
            while chunk := response.raw.read1(CHUNK, decode_content=False):
                offset += sink.write(chunk)
                tell(f"downloading {part.stem}", offset, remote.size)
            sink.flush()
            os.fsync(sink.fileno())
    if offset > remote.size:
        forget(part)
        raise Interrupted(f"the server gave {offset:,} bytes of {remote.size:,}")
    if offset < remote.size:
        raise Interrupted(f"the connection ended after {offset:,} of {remote.size:,} bytes")
    return remote


def continues(response: requests.Response, remote: Remote, offset: int) -> bool:
    """False for a part of a file that is not exactly what is missing of the one that was begun."""
    if response.status_code != 206:
        return True
    there = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    etag = response.headers.get("ETag")
    same = not (etag and remote.etag) or etag == remote.etag
    return bool(there) and int(there[1]) == offset and there[2] in ("*", str(remote.size)) and same


def verified(path: Path, remote: Remote, checksum: str | None, tell: Tell, check: Check) -> str | None:
    """The checksum of a file, proven: `checksum`, or an ETag that is one. Without either `check` reads the file, and it is None.

    Raises Wrong for another size or checksum, and for what `check` finds.
    """
    if size_of(path) != remote.size:
        raise Wrong(f"it has {size_of(path):,} bytes, and should have {remote.size:,}")
    known = checksum or remote.maybe_md5
    if known:
        algorithm, _, wanted = known.partition(":")
        found = digest_of(path, algorithm, tell)
        if found == wanted:
            return known
        if checksum:
            raise Wrong(f"its {algorithm.upper()} is {found}, and should be {wanted}")
    try:
        check(path)
    except ValueError as error:
        raise Wrong(str(error)) from error
    return None


def digest_of(path: Path, algorithm: str, tell: Tell) -> str:
    digest, done, total = hashlib.new(algorithm, usedforsecurity=False), 0, size_of(path)
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
            done += len(chunk)
            tell(f"checking {path.name.removesuffix('.part')}", done, total)
    return digest.hexdigest()


def part_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


def note_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def read_note(part: Path) -> Remote | None:
    """What the server said of the file that `part` is a beginning of."""
    try:
        return Remote(**json.loads(note_of(part).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def write_note(part: Path, remote: Remote) -> None:
    note_of(part).write_text(json.dumps(asdict(remote)))


def forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    note_of(part).unlink(missing_ok=True)


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
