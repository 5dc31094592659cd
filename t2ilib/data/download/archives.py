"""Zips and tars unpacked so that nothing gets out of the folder, and a killed extraction goes on where it was.

All members are judged before the first is written: regular files alone, each name once, none that leads elsewhere on any system, and
no more bytes than the archive can honestly hold. Each is written under a temporary name, its length and (in zips) CRC checked, and
renamed, so that what has its name and size is whole, and is not written again. A receipt in `.t2ilib` says that an archive was
extracted wholly, and which files that were. Python's own `extractall` is not used: the filters of tarfile are only as safe as the
Python that runs (CVE-2025-4517 and its like), and zipfile of 3.11.7 takes overlapping members (CVE-2024-0450).

Leaves out permissions, times and owners: files get those of whoever extracts.
"""

import bz2
import contextlib
import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

from t2ilib.config import ConfigError
from t2ilib.text import shown

STATE = ".t2ilib"
"""Our folder in a folder of data: receipts and the lock."""
PARTIAL = ".t2ilib-part"
"""The name of the one file that is being written, in its own folder."""
MOST_MEMBERS = 1_000_000
MOST_RATIO, SLACK = 100, 2**24
"""Bytes out of each byte of an archive, beyond the first 16 MiB. Deflate can reach 1,032; JPEGs have 1, JSON of annotations 3 to 20."""
MOST_HEADER = 2**22
"""Bytes of a tar's header, whose long names and extended fields tarfile reads into memory as a whole."""
CHUNK = 2**20
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)
DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    gzip.BadGzipFile,
    EOFError,
    struct.error,
    NotImplementedError,
    ValueError,
    OverflowError,
)
"""What readers of archives raise for one that is."""
TARS: dict[bytes, Callable[[Path], IO[bytes]]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}

Tell = Callable[[str, int, int], None]
"""What is going on, how many bytes are done, of how many."""


class ArchiveError(ValueError):
    """An archive that is damaged or not to be trusted."""

    def __init__(self, archive: Path, reason: str) -> None:
        super().__init__(f"{archive.name.removesuffix('.part')} {reason}")


@dataclass(frozen=True)
class Member:
    """A regular file in an archive: where it goes, its size in bytes as declared, what else tells it from others (its CRC in zips, in
    tars its time), and what opens it."""

    name: str
    size: int
    mark: int
    open: Callable[[], IO[bytes]]


@dataclass(frozen=True)
class Receipt:
    """That an archive of `size` bytes (and `checksum`, where one is known) was extracted: `members` of its files, by name and size, which
    are all of them once it is `complete`. `listing` tells archives apart whose files have the same names and sizes."""

    size: int
    checksum: str | None
    listing: str
    members: dict[str, int]
    complete: bool

    def missing(self, folder: Path) -> list[str]:
        return [name for name, size in self.members.items() if not is_there(folder / name, size)]

    def is_of(self, size: int | None, checksum: str | None) -> bool:
        return self.complete and size in (None, self.size) and checksum in (None, self.checksum)


def extract(
    archive: Path, folder: Path, checksum: str | None, most_bytes: int, tell: Tell, force: bool = False
) -> Receipt:
    """Has `folder` hold every file of `archive`, at most `most_bytes` in all; with `force` those too that are there already.

    Raises ArchiveError for an archive that is damaged or not to be trusted, in the latter case before anything is written; and
    ConfigError where the disk is too small, or a link or file stands where a folder should be.
    """
    with read_archive(archive, most_bytes) as members:
        sizes = {member.name: member.size for member in members}
        total, listing = sum(sizes.values()), listing_of(members)
        begun = Receipt(archive.stat().st_size, checksum, listing, {}, False)
        earlier = read_receipt(folder, archive.name)
        parents = Parents(folder)
        if force or (earlier and earlier.listing != listing):
            # What is there is taken away first, so that what is there after a kill is what was written anew.
            write_receipt(folder, archive.name, replace(begun, listing=""))
            for member in members:
                parents.make(member.name).unlink(missing_ok=True)
        todo = [member for member in members if not is_there(folder / member.name, member.size)]
        done = total - sum(member.size for member in todo)
        require_free(folder, archive, total - done)
        write_receipt(folder, archive.name, begun)
        for member in todo:
            target = parents.make(member.name)
            with damage_told(archive):
                write(member, target)
            done += member.size
            tell(f"extracting {archive.name}", done, total)
        parents.sweep()
    if hasattr(os, "sync"):  # the disk is to have what the receipt speaks of; Windows has no such call
        os.sync()
    receipt = replace(begun, members=sizes, complete=True)
    write_receipt(folder, archive.name, receipt)
    return receipt


def check_archive(archive: Path, most_bytes: int, tell: Tell) -> None:
    """Reads every member to its end, without writing it. Raises ArchiveError as `extract` does."""
    with read_archive(archive, most_bytes) as members:
        done, total = 0, sum(member.size for member in members)
        for member in members:
            with damage_told(archive), member.open() as source:
                for chunk in pieces(source, member):
                    done += len(chunk)
            tell(f"reading {archive.name.removesuffix('.part')}", done, total)


@contextlib.contextmanager
def read_archive(archive: Path, most_bytes: int) -> Iterator[list[Member]]:
    """The regular files of a zip or tar, all of them judged; raises ArchiveError."""
    with contextlib.ExitStack() as stack:
        with damage_told(archive), archive.open("rb") as stream:
            begins = stream.read(6)
        with damage_told(archive):
            if begins.startswith(b"PK"):
                found = zip_members(archive, stack.enter_context(zipfile.ZipFile(archive)))
            else:
                opened = next((opener for magic, opener in TARS.items() if begins.startswith(magic)), None)
                stream = stack.enter_context(opened(archive) if opened else archive.open("rb"))
                tar = stack.enter_context(tarfile.open(fileobj=Bounded(stream), mode="r:"))
                found = tar_members(archive, tar)
            members = judged(archive, found, most_bytes)
        yield members


@contextlib.contextmanager
def damage_told(archive: Path) -> Iterator[None]:
    try:
        yield
    except (ArchiveError, ConfigError):
        raise
    except DAMAGED as error:
        raise ArchiveError(archive, f"is damaged: {str(error) or type(error).__name__}") from error


class Bounded:
    """A stream that nobody reads a lot of at once, for tarfile reads headers whole, however long they say that they are."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.seek, self.tell, self.inner = stream.seek, stream.tell, stream

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MOST_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self.inner.read(size)


def zip_members(archive: Path, opened: zipfile.ZipFile) -> Iterator[Member]:
    end = opened.start_dir
    for info in sorted(opened.infolist(), key=lambda info: info.header_offset, reverse=True):
        if info.header_offset < 0:
            raise ArchiveError(archive, "is damaged: it says that files begin before it does")
        if info.header_offset + zipfile.sizeFileHeader + info.compress_size > end:
            raise ArchiveError(archive, f"holds {info.filename!a} in the same bytes as another file: a bomb")
        end = info.header_offset
    for info in opened.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)
        if info.orig_filename.endswith("/") and kind in (0, stat.S_IFDIR):
            continue
        if kind not in (0, stat.S_IFREG):
            raise ArchiveError(archive, f"holds {info.orig_filename!a}, which is a link or device")
        if info.flag_bits & 1:
            raise ArchiveError(archive, f"holds {info.orig_filename!a}, which is encrypted")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ArchiveError(archive, f"holds {info.orig_filename!a}, which is neither stored nor deflated")
        yield Member(info.orig_filename, info.file_size, info.CRC, lambda info=info: opened.open(info))


def tar_members(archive: Path, opened: tarfile.TarFile) -> Iterator[Member]:
    for info in opened:
        if info.isdir():
            continue
        if not info.isreg() or info.issparse():
            raise ArchiveError(archive, f"holds {info.name!a}, which is a link, device or sparse file")
        yield Member(info.name, info.size, int(info.mtime), lambda info=info: opened.extractfile(info))
    opened.fileobj.seek(opened.offset)  # tarfile takes a header that is none for the end
    if opened.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise ArchiveError(archive, "is damaged: it has no end")


def judged(archive: Path, found: Iterable[Member], most_bytes: int) -> list[Member]:
    """The members under their plain names. Raises ArchiveError at the first that is not to be trusted."""
    most_bytes = min(most_bytes, archive.stat().st_size * MOST_RATIO + SLACK)
    members, files, folders, total = [], set(), set(), 0
    for member in found:
        parts = plain(archive, member.name)
        key = tuple(
            unicodedata.normalize("NFC", part).casefold() for part in parts
        )  # some systems tell these not apart
        above = {key[:length] for length in range(1, len(key))}
        if key in files:
            raise ArchiveError(archive, f"holds {member.name!a} twice")
        if key in folders or above & files:
            raise ArchiveError(archive, f"holds {member.name!a} as a file and as a folder")
        total += member.size
        if total > most_bytes or len(members) == MOST_MEMBERS:
            raise ArchiveError(
                archive, f"holds over {most_bytes:,} bytes or {MOST_MEMBERS:,} files, more than it honestly can: a bomb"
            )
        files.add(key)
        folders |= above
        members.append(replace(member, name="/".join(parts)))
    return members


def plain(archive: Path, name: str) -> list[str]:
    """The parts of a member's name; raises ArchiveError for one that some system would take for something else than a file here."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or not parts:
        wrong = "leads out of the folder"
    elif re.search(r'[\\:\x00-\x1f\x7f<>"|?*]', name):
        wrong = "has a character that some system takes for a path, a drive or a pattern"
    elif any(part.endswith((" ", ".")) or RESERVED.match(part) or len(os.fsencode(part)) > 255 for part in parts):
        wrong = "is no file name on some system"
    elif parts[0].casefold() == STATE or any(part.casefold() == PARTIAL for part in parts):
        wrong = "is one of our own"
    else:
        return parts
    raise ArchiveError(archive, f"holds {name!a}, a name that {wrong}")


class Parents:
    """Makes the folders that members lie in, and goes through no link."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.known = folder, {folder}

    def make(self, name: str) -> Path:
        target = self.folder / name
        for parent in reversed(target.relative_to(self.folder).parents[:-1]):
            place = self.folder / parent
            if place not in self.known:
                if place.is_symlink() or (place.exists() and not place.is_dir()):
                    raise ConfigError(
                        f"{shown(place)} is a link or a file, and a folder is to be there: move it away, or name another folder"
                    )
                place.mkdir(exist_ok=True)
                self.known.add(place)
        if target.is_dir() and not target.is_symlink():
            raise ConfigError(f"{shown(target)} is a folder, and a file is to be there: move it away")
        return target

    def sweep(self) -> None:
        """Removes what a killed extraction was writing."""
        for place in self.known:
            (place / PARTIAL).unlink(missing_ok=True)


def write(member: Member, target: Path) -> None:
    """The member, whole, as `target`; whatever goes wrong leaves nothing under that name but what was there."""
    part = target.with_name(PARTIAL)
    part.unlink(missing_ok=True)
    try:
        with member.open() as source, part.open("xb") as sink:
            for chunk in pieces(source, member):
                sink.write(chunk)
        part.replace(target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def pieces(source: IO[bytes], member: Member) -> Iterator[bytes]:
    """A member's bytes; raises EOFError where they are not as many as declared, and what zipfile raises for a wrong CRC."""
    done = 0
    while chunk := source.read(CHUNK):
        done += len(chunk)
        if done > member.size:
            break
        yield chunk
    if done != member.size:
        raise EOFError(f"{member.name!a} has not the {member.size:,} bytes that it should have")


def is_there(path: Path, size: int) -> bool:
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == size


def require_free(folder: Path, archive: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"{archive.name} holds {needed / 1e6:,.1f} MB more, and {free / 1e6:,.1f} MB are free under {folder}: free some"
        )


def receipt_path(folder: Path, name: str) -> Path:
    return folder / STATE / f"{name}.extracted.json"


def read_receipt(folder: Path, name: str) -> Receipt | None:
    try:
        return Receipt(**json.loads(receipt_path(folder, name).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_receipt(folder: Path, name: str, receipt: Receipt) -> None:
    path = receipt_path(folder, name)
    path.parent.mkdir(exist_ok=True)
    draft = path.with_suffix(".part")
    with draft.open("w", encoding="utf-8") as stream:
        json.dump(asdict(receipt), stream)
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(path)


def listing_of(members: list[Member]) -> str:
    return hashlib.sha256(repr([(member.name, member.size, member.mark) for member in members]).encode()).hexdigest()
