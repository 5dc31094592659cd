"""A data set from its server to a folder that a run can name: what is needed is asked first, and what is there already is kept.

    FOLDER/annotations/captions_train2017.json      from annotations_trainval2017.zip
    FOLDER/train2017/*.jpg, FOLDER/val2017/*.jpg    or train2017.zip, val2017.zip as they came
    FOLDER/.t2ilib                                  the lock, and what was extracted

Archives are fetched (`remote`) and unpacked (`archives`) one after the other, so that a disk that keeps no zips needs room for one.
Doing it again costs little: what was extracted, fetched or begun is gone on with.
"""

import contextlib
import errno
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import requests
import yaml

from t2ilib.config import ConfigError, check_choice
from t2ilib.data.download.archives import STATE, Receipt, check_archive, extract, read_archive, read_receipt
from t2ilib.data.download.remote import DATASETS, SERVERS, RemoteFile, Tell, Wrong, fetch, part_of, size_of, verified
from t2ilib.data.download.server import Remote, describe, reached, read_sums
from t2ilib.data.progress import Progress
from t2ilib.locking import held
from t2ilib.memory import require_disk
from t2ilib.text import shown

BY_FORM = {
    "flickr30k": """no program can download flickr30k, which is given to those who fill in a form: see
https://shannon.cs.illinois.edu/DenotationGraph/ (30k Image Caption Corpus). The folder is then to hold
  results.csv                captions: image_name| comment_number| comment
  flickr30k_images/*.jpg     31,783 pictures
and the run config names it: data: {source: flickr30k, path: FOLDER}"""
}
"""Data sets that people have to ask for, and how."""
TERMS = {"coco": "https://cocodataset.org/#termsofuse"}
ALLOWANCE = 2**26
"""Bytes that an archive may hold beyond twice what is expected."""


@dataclass
class Item:
    """An archive on its way: what the table says of it, where it goes, whether it is unpacked there; and its size in bytes, checksum,
    description by the server, receipt and members (name -> size), once they are known."""

    file: RemoteFile
    target: Path
    unpack: bool
    size: int | None = None
    checksum: str | None = None
    remote: Remote | None = None
    receipt: Receipt | None = None
    members: dict[str, int] | None = None


def obtain(
    name: str,
    folder: Path,
    server: str | None = None,
    parts: tuple[str, ...] = (),
    skip_download: bool = False,
    force_extract: bool = False,
    keep_zips: bool = True,
    unpack: bool = True,
) -> list[str]:
    """Has `folder` hold the data set `name`, or `parts` of it, and gives lines that say what lies where and how a run names it.

    `server`: another than the official one, whose sizes, and checksums where it has SHA256SUMS or MD5SUMS, then count; or a folder in which
    the files lie as a server has them. `unpack`: false leaves pictures in their zips. Raises ConfigError for what the user can mend, DownloadError and ArchiveError for what came.
    """
    if not (unpack or keep_zips):
        raise ConfigError(
            "--no-extract leaves the pictures in their zips, and --delete-zips deletes them: leave out one"
        )
    table = files_of(name, parts)
    if skip_download and not folder.is_dir():
        raise ConfigError(f"{shown(folder)} is not there: with --skip-download it is the folder in which the zips lie")
    with (
        reached(server or SERVERS[name][0]) as (server, session),
        owned(folder),
        Progress() as tell,
        full_disk_told(folder),
    ):
        official = server in SERVERS[name]
        items = find_items(table, folder, official, unpack, force_extract)
        todo = [item for item in items if item.receipt is None]
        if skip_download:
            require_there(todo, server)
        elif todo:
            ask(session, todo, server, official)
        require_room(folder, todo, keep_zips)
        for item in items:
            if item.receipt is None:
                proven = check(item, tell) if skip_download else get(session, item, server, tell)
                require_holds(item)
                if item.unpack:
                    most = most_bytes(item.file, item.target)
                    item.receipt = extract(item.target, folder, proven, most, tell, force_extract)
            if item.receipt and not keep_zips:
                item.target.unlink(missing_ok=True)
        return told(name, folder, items)


def files_of(name: str, parts: tuple[str, ...]) -> list[RemoteFile]:
    """The archives of a data set, or of `parts` of it. Raises ConfigError for names that do not exist."""
    if name in BY_FORM:
        raise ConfigError(BY_FORM[name])
    table = DATASETS[check_choice(name, DATASETS, "data set")]
    for part in parts:
        check_choice(part, [file.part for file in table], "--part")
    return [file for file in table if file.part in parts or not parts]


def find_items(
    table: list[RemoteFile], folder: Path, official: bool, unpack: bool, force_extract: bool = False
) -> list[Item]:
    """The archives, each with its receipt where it was extracted wholly and is there; with the published sizes where the server is the
    `official` one."""
    items = [Item(file, folder / file.name, unpack or file.part == "annotations") for file in table]
    for item in items:
        if official:
            item.size, item.checksum = item.file.size, item.file.checksum
        receipt = None if force_extract else read_receipt(folder, item.file.name)
        if receipt and receipt.is_of(item.size, item.checksum) and not receipt.missing(folder):
            item.receipt, item.members = receipt, receipt.members
    return items


def owned(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Holds the folder; raises ConfigError where another process does."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{shown(folder)} is not a folder")
    told = f"another process is downloading into {shown(folder)}: wait for it, or stop it"
    return held(folder / STATE / "lock", told)


@contextlib.contextmanager
def full_disk_told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ConfigError(
            f"the disk under {shown(folder)} is full: free some, and run the command again, which goes on where it was"
        ) from error


def require_there(items: list[Item], server: str) -> None:
    missing = [item for item in items if not item.target.is_file()]
    if missing:
        lines = "".join(f"\n  {shown(item.target)}  ({server}/{item.file.path})" for item in missing)
        raise ConfigError(f"not there, with --skip-download:{lines}\nPut them there, or leave --skip-download out")


def ask(session: requests.Session, items: list[Item], server: str, official: bool) -> None:
    """What the server says of its files, before any is fetched. Raises ConfigError for another one than the published."""
    sums = {} if official else read_sums(session, server)
    for item in items:
        if official and size_of(item.target) == item.size:  # perhaps there: then nobody needs to be asked
            item.remote = Remote(item.size)
            continue
        item.remote = describe(session, f"{server}/{item.file.path}")
        if official and item.remote.size != item.size:
            raise ConfigError(
                f"{server}/{item.file.path} has {item.remote.size:,} bytes, and the published file has {item.size:,}: name another"
                " by --server"
            )
        item.size, item.checksum = item.remote.size, item.checksum or sums.get(item.file.name)


@dataclass(frozen=True)
class Foreseen:
    """What obtaining a data set will take, in bytes, as far as it is known without asking a server: to fetch, and of the disk, at the worst
    moment. None where a server of one's own knows the sizes. `there`: everything is there, and nothing is to be done."""

    to_fetch: int | None
    of_disk: int | None
    there: bool


def foresee(
    name: str,
    folder: Path,
    server: str | None,
    parts: tuple[str, ...],
    keep_zips: bool,
    unpack: bool,
    force: bool = False,
) -> Foreseen:
    """What `obtain` would do with these; asks nobody, and writes nothing. Raises ConfigError for names that do not exist."""
    official = server is None or server.rstrip("/") in SERVERS[name]
    items = find_items(files_of(name, parts), folder, official, unpack, force)
    todo = [item for item in items if item.receipt is None]
    if not todo or not official:
        there = not todo or all(not item.unpack and item.target.is_file() for item in todo)
        return Foreseen(0, 0, True) if there else Foreseen(None, None, False)
    left = sum(max(0, item.size - size_of(item.target) - size_of(part_of(item.target))) for item in todo)
    return Foreseen(left, room_needed(folder, todo, keep_zips), left == 0 and not any(item.unpack for item in todo))


def marks_of(name: str, folder: Path, parts: tuple[str, ...]) -> dict[str, list]:
    """What tells the content of each archive from other content: size, checksum where it was known, and a digest of its listing; of one that
    was not extracted, its size. Raises ConfigError for names that do not exist."""
    found = {}
    for file in files_of(name, parts):
        receipt = read_receipt(folder, file.name)
        found[file.name] = (
            [receipt.size, receipt.checksum, receipt.listing] if receipt else [size_of(folder / file.name)]
        )
    return found


def require_room(folder: Path, items: list[Item], keep_zips: bool) -> None:
    """Raises ConfigError where the disk cannot hold what is still to come, at its worst moment."""
    require_disk(
        folder,
        room_needed(folder, items, keep_zips),
        f"download and extraction of {', '.join(item.file.name for item in items)}",
        "free some, name a folder on another disk, take less by --part, keep one zip at a time by --delete-zips, or leave the pictures"
        " in their zips by --no-extract",
    )


def room_needed(folder: Path, items: list[Item], keep_zips: bool) -> int:
    """Bytes that the disk must hold of what is still to come, at its worst moment."""
    now = worst = 0
    for item in items:
        size = item.size or size_of(item.target)
        now += max(0, size - size_of(item.target) - size_of(part_of(item.target)))
        worst = max(worst, now)
        if item.unpack:
            places = {held.partition("/")[0] for held in item.file.holds}
            there = sum(
                path.stat().st_size for place in places for path in (folder / place).glob("*") if path.is_file()
            )
            now += max(0, int(size * item.file.expansion) - there)
            worst = max(worst, now)
            now -= 0 if keep_zips else size
    return worst


def get(session: requests.Session, item: Item, server: str, tell: Tell) -> str | None:
    """Fetches an archive, and gives its checksum where one is known."""
    url = f"{server}/{item.file.path}"
    return fetch(session, url, item.target, item.remote, item.checksum, tell, lambda path: read_whole(item, path, tell))


def check(item: Item, tell: Tell) -> str | None:
    """Sees to it that an archive that the user brought is the published one, or where it is not unpacked anyway, whole."""
    if item.checksum or not item.unpack:
        there = Remote(item.size or size_of(item.target))
        try:
            verified(item.target, there, item.checksum, tell, lambda path: read_whole(item, path, tell))
        except Wrong as error:
            raise ConfigError(
                f"{shown(item.target)} is not the published file, or not whole: {error}. Bring it again, or leave --skip-download out"
            ) from None
    return item.checksum


def read_whole(item: Item, path: Path, tell: Tell) -> None:
    check_archive(path, most_bytes(item.file, path), tell)


def most_bytes(file: RemoteFile, archive: Path) -> int:
    return int(2 * size_of(archive) * file.expansion) + ALLOWANCE


def require_holds(item: Item) -> None:
    """Notes what is in an archive; raises ConfigError where it is not what a run looks for."""
    with read_archive(item.target, most_bytes(item.file, item.target)) as members:
        item.members = {member.name: member.size for member in members}
    for kept in item.file.holds:
        if not any(name == kept or (kept.endswith("/") and name.startswith(kept)) for name in item.members):
            found = ", ".join(shown(name) for name in list(item.members)[:3]) or "nothing"
            raise ConfigError(f"{shown(item.target)} holds no {kept}, but {found}: it is another archive")


def told(name: str, folder: Path, items: list[Item]) -> list[str]:
    """What lies where, and the line of a run config that names it."""
    lines = [f"{name} in {shown(folder)} (terms of use: {TERMS[name]})"]
    for item in items:
        for kept in item.file.holds:
            if not kept.endswith("/"):
                lines.append(f"  {kept}")
            else:
                count = sum(member.startswith(kept) for member in item.members)
                lines.append(f"  {kept if item.receipt else item.file.name:36s}{count:,} pictures")
    kept = [item.file.name for item in items if item.receipt and item.target.exists()]
    if kept:
        lines.append(f"  {', '.join(kept)}: extracted, can be deleted (--delete-zips)")
    for split in ("train", "val"):
        pictures = (folder / f"{split}2017").is_dir() or (folder / f"{split}2017.zip").is_file()
        if pictures and (folder / "annotations" / f"captions_{split}2017.json").is_file():
            section = {"source": name, "path": str(folder), "split": split}
            section = yaml.safe_dump(
                section, default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True
            )
            return [*lines, "in a run config:", f"  data: {section.strip()}"]
    return [*lines, "a run needs pictures (--part train or val) and captions (--part annotations)"]
