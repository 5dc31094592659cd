"""Members of zip archives, read where they lie: a data set need not be extracted, which takes its size a second time.

A member is small, opens its archive anew in every reading, and so may be read by threads and processes at once. Archives are hostile
until checked: a name that leads out, a link, a name that comes twice and a size that cannot be a picture's are refused, and what is
read is held against the size and the checksum that the archive states. Nothing is written.
"""

import os
import re
import stat
import struct
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from t2ilib.config import ConfigError
from t2ilib.data.records import stamp_of_file
from t2ilib.data.sources.files import is_hidden
from t2ilib.text import shown

LARGEST = 2**30
"""Bytes of a member: more are neither a picture nor its captions."""
LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Signature, and the lengths of the name and of the extra field that follow it (APPNOTE 6.3.10, 4.3.7)."""
ENCRYPTED = 1
LEADS_OUT = re.compile(r"/|[A-Za-z]:|.*\\|(.*/)?\.\.(/|$)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a zip. `inside`: its whole name there."""

    archive: Path
    inside: str
    offset: int = field(compare=False)
    packed: int = field(compare=False)
    size: int = field(compare=False)
    checksum: int = field(compare=False)
    deflated: bool = field(compare=False)

    @property
    def name(self) -> str:
        return self.inside.rpartition("/")[2]

    @property
    def parent(self) -> Path:
        return self.archive

    def __str__(self) -> str:
        return f"{self.archive.name}/{self.inside}"

    def stamp(self) -> str | None:
        return stamp_of_file(self.archive, self.inside, self.offset, self.size, self.checksum)

    def read_bytes(self) -> bytes:
        """Raises ValueError where the archive is damaged there, and OSError as opening does."""
        with open(self.archive, "rb") as file:
            file.seek(self.offset)
            header = file.read(LOCAL_HEADER.size)
            if len(header) < LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
                raise ValueError(f"{shown(self.archive.name)} is cut off, or not what it was")
            _, name, extra = LOCAL_HEADER.unpack(header)
            file.seek(name + extra, os.SEEK_CUR)
            data = file.read(self.packed)
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, self.size + 1) if self.deflated else data
        except zlib.error as error:
            raise ValueError(f"it is damaged in {shown(self.archive.name)}: {error}") from None
        if len(data) != self.size or zlib.crc32(data) != self.checksum:
            raise ValueError(f"it is damaged in {shown(self.archive.name)}: its size or checksum differs")
        return data


@dataclass(frozen=True)
class Archive:
    """What lies in a zip: files by their whole names, what systems left there, and what is refused, with the reason."""

    members: dict[str, Member]
    hidden: tuple[Member, ...]
    refused: dict[str, tuple[Member, str]]


def open_zip(path: Path) -> Archive:
    """Its list of contents, in name order. Raises ConfigError for one that is not whole."""
    try:
        with zipfile.ZipFile(path) as file:
            infos = [info for info in file.infolist() if not info.is_dir()]
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise ConfigError(f"{shown(path)} is not a whole zip ({error}): download it again") from None
    except OSError as error:
        raise ConfigError(f"{shown(path)} cannot be read: {error.strerror or error}") from None
    times = Counter(info.filename for info in infos)
    members, hidden, refused = {}, [], {}
    for info in sorted(infos, key=lambda info: info.filename):
        name = info.filename
        deflated = info.compress_type == zipfile.ZIP_DEFLATED
        member = Member(path, name, info.header_offset, info.compress_size, info.file_size, info.CRC, deflated)
        if any(map(is_hidden, name.split("/"))) and not LEADS_OUT.match(name):
            hidden.append(member)
        elif reason := why_refused(info, times[name]):
            refused[name] = (member, reason)
        else:
            members[name] = member
    return Archive(members, tuple(hidden), refused)


def why_refused(info: zipfile.ZipInfo, times: int) -> str | None:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if LEADS_OUT.match(info.filename):
        return "has a name that leads out of its archive"
    if kind == stat.S_IFLNK:
        return "is a link, which is not followed"
    if kind not in (0, stat.S_IFREG):
        return "is not a file"
    if times > 1:
        return f"is in its archive {times} times: keep one"
    if info.flag_bits & ENCRYPTED:
        return "is encrypted"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"is packed in a way that is not read (method {info.compress_type}): deflate it"
    if info.file_size > LARGEST:
        return f"has {info.file_size} bytes, more than a picture or its captions can have"
    return None
