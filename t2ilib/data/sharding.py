"""Shards of captioned pictures, written from any source: plain tars by WebDataset's naming rule, each with its index.

Pictures are written as they are, byte for byte, and captions as a .txt, or a .json where there is more to say than one caption.
What a shard holds is decided before anything is written, by the records, their order and the largest size alone, so a command
that was killed goes on at the shard that it was writing. A shard stands under its name when it is whole on the disk and has been read
back. Leaves out samples that `manifest.examine` rejects.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from PIL import Image

from t2ilib.config import ConfigError, DataConfig
from t2ilib.data.manifest import examine
from t2ilib.data.pairs import have_pairs
from t2ilib.data.pictures import picture_suffixes, readable_formats
from t2ilib.data.records import Listing, Readable, Record
from t2ilib.data.sources.sample import JSON, plain_text
from t2ilib.data.sources.shardindex import ENDING, Index, Member, unpacked
from t2ilib.data.sources.spans import Span
from t2ilib.locking import held
from t2ilib.memory import require_disk
from t2ilib.seeds import numpy_generator_for
from t2ilib.text import decoded, shown

log = logging.getLogger(__name__)

MB = 10**6
BLOCK, END = 512, 10_240
"""Bytes of a tar's block, and of what its end is padded to."""
LOCK, DRAFT = ".writing.lock", ".part"
WEIGHT, REPEATS = "weight", "repeats"


class File(NamedTuple):
    """A file of a shard: its name there, where its bytes come from, how many they are, and their SHA-256."""

    name: str
    source: Readable | bytes
    size: int
    sha256: bytes

    def read(self) -> bytes:
        """Raises ConfigError where it is no longer what it was."""
        data = self.source if isinstance(self.source, bytes) else self.source.read_bytes()
        if hashlib.sha256(data).digest() != self.sha256:
            raise ConfigError(f"{shown(self.source)} was changed while shards were written: start again")
        return data


@dataclass(frozen=True)
class Shard:
    name: str
    files: tuple[File, ...]

    @property
    def size(self) -> int:
        return with_end(sum(map(size_in_tar, self.files)))

    @property
    def contents(self) -> str:
        """What tells a shard from one of other pictures or captions."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(b"%s\0%d\0%s" % (file.name.encode(), file.size, file.sha256))
        return digest.hexdigest()


@dataclass(frozen=True)
class Written:
    """What was written. `kept`: shards that were there. `columns`: fields of a data section that reading them needs."""

    pictures: int
    captions: int
    shards: int
    kept: int
    bytes: int
    columns: dict[str, str]


def write_shards(
    listing: Listing, config: DataConfig, out: Path, most_bytes: int, shuffle: int | None = None
) -> Written:
    """The records of `listing` that can be used as shards in `out`, each of at most `most_bytes` unless one sample is larger. In the
    order of the listing, or with `shuffle` in one that this seed decides. Raises ConfigError as `examine`, and for a folder that
    holds other shards or has no space."""
    if have_pairs(listing):
        raise ConfigError(
            f"{shown(listing.folder)} has pairs of a chosen and a rejected picture, and a sample of a shard is one picture: train on it as it is"
        )
    records = list(examine(listing, config).pictures)
    if shuffle is not None:
        records = [records[i] for i in numpy_generator_for(shuffle, "order of shards").permutation(len(records))]
    log.info("%d pictures are read, to decide which shard each lies in", len(records))
    shards = plan(records, listing.folder, most_bytes)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        kept = standing(out, shards)
        missing = [shard for shard in shards if shard.name not in kept]
        require_disk(out, sum(shard.size for shard in missing), "the shards", "free some, or write them elsewhere")
        for shard in missing:
            size = write_shard(out, shard)
            log.info("%s: %.1f MB (%d of %d)", shown(out / shard.name), size / MB, shards.index(shard) + 1, len(shards))
    columns = {"weight_column": WEIGHT} if any(record.weight != 1 for record in records) else {}
    columns |= {"repeat_column": REPEATS} if any(record.repeats != 1 for record in records) else {}
    total = sum((out / shard.name).stat().st_size for shard in shards)
    captions = sum(len(record.captions) for record in records)
    return Written(len(records), captions, len(shards), len(kept), total, columns)


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """One process writes to a folder at a time; what a killed one left of a shard is removed."""
    with held(out / LOCK, f"{out}: another process writes shards there"):
        try:
            for draft in out.glob(f".*{DRAFT}"):
                draft.unlink()
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows removes no file that is open
                (out / LOCK).unlink()


def plan(records: Sequence[Record], folder: Path | str, most_bytes: int) -> list[Shard]:
    """Which files lie in which shard; reads every picture."""
    shards, files, size = [], [], 0
    for key, record in zip(keys_of(records, folder), records, strict=True):
        sample = files_of(key, record)
        more = sum(map(size_in_tar, sample))
        if files and with_end(size + more) > most_bytes:
            shards.append(Shard(f"shard-{len(shards):06d}.tar", tuple(files)))
            files, size = [], 0
        files += sample
        size += more
    return [*shards, Shard(f"shard-{len(shards):06d}.tar", tuple(files))]


def size_in_tar(file: File) -> int:
    return len(header(file).tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")) + -(-file.size // BLOCK) * BLOCK


def with_end(size: int) -> int:
    return -(-(size + 2 * BLOCK) // END) * END


def header(file: File) -> tarfile.TarInfo:
    """The same for the same file, whoever writes it and when."""
    info = tarfile.TarInfo(file.name)
    info.size = file.size
    return info


def keys_of(records: Iterable[Record], folder: Path | str) -> Iterator[str]:
    """What each picture is called in the shards, without its ending: as before, folders included, but for the dots at which readers
    would cut its name, and a number where another has that name."""
    taken: Counter[str] = Counter()
    for record in records:
        path = record.path
        if isinstance(path, Path) and isinstance(folder, Path) and path.is_relative_to(folder):
            name = path.relative_to(folder).as_posix()
        else:
            name = path.member if isinstance(path, Span) else path.name
        *folders, file = shown(name).replace("\\", "_").split("/")
        stem, suffix = os.path.splitext(file)
        key = "/".join([*folders, (stem if suffix.lower() in picture_suffixes() else file).replace(".", "_")])
        taken[key] += 1
        while taken[key] > 1:
            key = f"{key}-{taken[key]}"
            taken[key] += 1
        yield key


def files_of(key: str, record: Record) -> list[File]:
    ending, text = said(record)
    data = record.path.read_bytes()
    files = [file(key + ending_of(record.path, data), record.path, data), file(f"{key}.{ending}", text, text)]
    if record.mask is not None:
        data = record.mask.read_bytes()
        files.append(file(f"{key}.mask{ending_of(record.mask, data)}", record.mask, data))
    return files


def file(name: str, source: Readable | bytes, data: bytes) -> File:
    return File(name, source, len(data), hashlib.sha256(data).digest())


def ending_of(path: Readable, data: bytes) -> str:
    """As in its name, or, where that says nothing, as its format is called."""
    suffix = PurePosixPath(shown(path.name)).suffix
    if suffix.lower() in picture_suffixes():
        return suffix
    with Image.open(io.BytesIO(data), formats=readable_formats()) as image:
        return {"JPEG": ".jpg", "MPO": ".jpg", "JPEG2000": ".jp2", "TIFF": ".tif"}.get(
            image.format, f".{image.format.lower()}"
        )


def said(record: Record) -> tuple[str, bytes]:
    """Ending and content of the file that says what is known of a picture."""
    fields = {"caption": list(record.captions) if record.more else record.caption}
    fields |= {WEIGHT: record.weight} if record.weight != 1 else {}
    fields |= {REPEATS: record.repeats} if record.repeats != 1 else {}
    fields |= {"scene": record.scene} if record.scene is not None else {}
    data = record.caption.encode()
    if len(fields) == 1 and not record.more and reads_as(data, record.caption):
        return "txt", data
    return JSON, json.dumps(fields).encode()


def reads_as(data: bytes, caption: str) -> bool:
    """Not so where it holds what text files mean otherwise, such as a mark of the encoding."""
    try:
        return plain_text(decoded(data, "")) == caption
    except ConfigError:
        return False


def standing(out: Path, shards: Sequence[Shard]) -> set[str]:
    """Those of the shards that are there, whole. Raises ConfigError where the folder holds others."""
    wanted, kept = {shard.name: shard for shard in shards}, set()
    for path in sorted(out.glob("*.tar")):
        try:
            index, _ = unpacked((path.parent / (path.name + ENDING)).read_bytes(), "its index")
        except (OSError, ValueError):
            index = None
        if index is None or path.name not in wanted or index.contents != wanted[path.name].contents:
            raise ConfigError(
                f"{shown(path)} is there, of other pictures or captions, or with another --max-mb or --shuffle: remove it, or"
                " write to another folder"
            )
        if path.stat().st_size == index.size and sha256_of(path) == index.sha256:
            kept.add(path.name)
        else:
            log.warning("%s is damaged, and written anew", shown(path))
    if kept:
        log.info("%s: %d of %d shards are there", shown(out), len(kept), len(shards))
    return kept


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_shard(out: Path, shard: Shard) -> int:
    """Writes a shard and its index; returns its size. The index is named first: a tar that stands alone is another's."""
    target, draft = out / shard.name, out / f".{shard.name}{DRAFT}"
    members = []
    with draft.open("wb") as written:
        with tarfile.open(fileobj=written, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8") as tar:
            for file in shard.files:
                data, info = file.read(), header(file)
                place = tar.offset + len(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict"))
                tar.addfile(info, io.BytesIO(data))
                text = decoded(file.source, file.name) if isinstance(file.source, bytes) else None
                members.append(Member(file.name, place, len(data), zlib.crc32(data), text))
        written.flush()
        os.fsync(written.fileno())
    index = Index(draft.stat().st_size, tuple(members), sha256=sha256_of(draft), contents=shard.contents)
    commit(index.pack(), out / (shard.name + ENDING))
    os.replace(draft, target)
    sync_folder(out)
    return index.size


def commit(data: bytes, target: Path) -> None:
    draft = target.with_name(f".{target.name}{DRAFT}")
    with draft.open("wb") as written:
        written.write(data)
        written.flush()
        os.fsync(written.fileno())
    os.replace(draft, target)


def sync_folder(folder: Path) -> None:
    """Has the disk hold the names of what was written; Windows opens no folders."""
    if os.name != "nt":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
