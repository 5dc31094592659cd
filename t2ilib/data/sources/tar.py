"""What lies in a tar, header by header, from ranges of its bytes: nothing is extracted, and bodies are passed over.

Python's `tarfile` ends in silence at a header that is broken, as if the tar ended there, and keeps every member in memory; here
`TarInfo` reads single headers (ustar, GNU, pax) and what is wrong has a name. Tars are hostile: a member is a plain file with a name
inside the tar and a body inside its bytes, or it has a fault. Leaves out compressed tars, which have no ranges.
"""

import tarfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

from t2ilib.text import shown

BLOCK = 512
NOTHING = bytes(BLOCK)
MOST_EXTENDED = 2**20
"""Bytes of a long name or of pax records. Real ones have some hundreds."""
PADDING = 2**16
"""Bytes behind the end mark that are looked at: tars are padded to some kilobytes."""
WITHOUT_BODY = frozenset(
    (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)
)
LONG_NAMES = frozenset((tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK))
PAX = frozenset((tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE))
PLAIN = frozenset((tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE))

Read = Callable[[int, int], bytes]
"""`read(offset, size)` gives these bytes, fewer where the tar ends."""


class BrokenTar(ValueError):
    """A tar that cannot be read on from some byte."""


class Entry(NamedTuple):
    """A file in a tar: its name, and where its body lies. `fault`: why it cannot be used. Without a name it is the tar itself."""

    name: str
    offset: int
    size: int
    fault: str | None = None


def entries(read: Read, size: int, at: int = 0) -> Iterator[Entry]:
    """Everything in a tar of `size` bytes but folders, in order, from a header at byte `at` on. Raises BrokenTar, after what lies before
    the break."""
    everywhere, extended, long_name = {}, {}, None
    while True:
        block = read(at, BLOCK)
        if not block and at:
            yield Entry("", at, 0, "ends without an end mark: perhaps it is cut off")
            return
        if len(block) < BLOCK:
            raise BrokenTar(f"is cut off in a header (byte {at})" if at else "is no tar: it is too short")
        if block == NOTHING:
            if read(at + BLOCK, PADDING).strip(b"\0"):
                yield Entry("", at, 0, f"has more behind its end mark (byte {at}), which is not read: make it anew")
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            raise BrokenTar(f"has no header at byte {at}, where one must be" if at else "is no tar") from None
        body, length = at + BLOCK, 0 if header.type in WITHOUT_BODY else header.size
        if header.type in LONG_NAMES | PAX:
            require_inside(header.name, body, length, size)
            if length > MOST_EXTENDED:
                raise BrokenTar(f"has {length} bytes of names for one file at byte {at}")
            data = read(body, length)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                long_name = data.partition(b"\0")[0].decode("utf-8", "surrogateescape")
            elif header.type in PAX:
                (everywhere if header.type == tarfile.XGLTYPE else extended).update(pax_records(data, at))
        else:
            told = everywhere | extended
            name = told.get("path") or long_name or header.name
            if "size" in told and header.type not in WITHOUT_BODY:
                length = as_size(told["size"], at)
            sparse = header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in told)
            if header.type == tarfile.GNUTYPE_SPARSE:
                body = after_sparse_map(read, block, body)
            require_inside(name, body, length, size)
            if header.type != tarfile.DIRTYPE:
                yield Entry(name, body, length, fault_of(name, header, sparse))
            extended, long_name = {}, None
        at = body + -(-length // BLOCK) * BLOCK


def require_inside(name: str, body: int, length: int, size: int) -> None:
    if length < 0:
        raise BrokenTar(f"has a header at byte {body - BLOCK} with a size below zero")
    if body + length > size:
        raise BrokenTar(f"is cut off: {shown(name)} is to have {length} bytes, and {max(0, size - body)} are left")


def fault_of(name: str, header: tarfile.TarInfo, sparse: bool) -> str | None:
    if sparse:
        return "is a sparse file, which is not read: write the tar without --sparse"
    if header.type in (tarfile.LNKTYPE, tarfile.SYMTYPE):
        return f"is a link (to {shown(header.linkname)}), which is not followed: write the file itself into the tar"
    if header.type not in PLAIN:
        return "is a device or a pipe" if header.type in WITHOUT_BODY else f"is of tar's type {header.type!r}: no file"
    return leads_out(name)


def leads_out(name: str) -> str | None:
    """What to say of a name that lies nowhere in its tar."""
    path = name.replace("\\", "/")
    if not path.strip() or "\0" in path:
        return "has no name that can be used"
    if path.startswith("/") or path[1:3] == ":/":
        return "has an absolute name: names must lie in the tar"
    return "has a name that leads out of the tar" if ".." in path.split("/") else None


def pax_records(data: bytes, at: int) -> dict[str, str]:
    """`length key=value\\n` records (POSIX pax, "Extended Header")."""
    found, place, end = {}, 0, len(data.rstrip(b"\0"))
    while place < end:
        space = data.find(b" ", place, place + 20)
        digits = data[place : max(place, space)]
        length = int(digits) if digits.isdigit() else 0
        record = data[space + 1 : place + length]
        key, equals, value = record.partition(b"=")
        if not equals or not record.endswith(b"\n") or place + length > len(data):
            raise BrokenTar(f"has a pax header at byte {at} that cannot be read")
        found[key.decode("utf-8", "surrogateescape")] = value[:-1].decode("utf-8", "surrogateescape")
        place += length
    return found


def as_size(text: str, at: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise BrokenTar(f"has a pax header at byte {at} with the size {shown(text)!r}")
    return int(text)


def after_sparse_map(read: Read, header: bytes, body: int) -> int:
    """Where the body begins behind the blocks of GNU's old sparse map: a byte in each says whether another follows."""
    more = header[482]
    while more:
        block = read(body, BLOCK)
        if len(block) < BLOCK:
            raise BrokenTar(f"is cut off in a sparse file (byte {body})")
        more, body = block[504], body + BLOCK
    return body
