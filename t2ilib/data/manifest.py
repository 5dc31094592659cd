"""What was found in a source, decoded once in full, and every file of it accounted for.

`Image.verify` passes half a JPEG, so each picture is really decoded, whatever the source. Whether what cannot be used stops the run or
is rejected is the user's choice (`data.max_rejected`, `data.on_error`); in both cases the message names it. What became of everything is
kept with the run, a row a file (`manifest.csv`).
"""

import csv
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from t2ilib.config import ConfigError, DataConfig
from t2ilib.data.decoding import decoded
from t2ilib.data.known import key_of, recall, remember
from t2ilib.data.pictures import PictureError, Seen, examine_mask, examine_picture, require_shape
from t2ilib.data.records import Listing, Readable, Record, Told
from t2ilib.data.sources import coco, flickr30k, folder, huggingface, preferences, webdataset
from t2ilib.pyfile import module_at
from t2ilib.text import shown

log = logging.getLogger(__name__)

SOURCES: dict[str, Callable[[DataConfig], Listing]] = {
    "folder": folder.load,
    "coco": coco.load,
    "flickr30k": flickr30k.load,
    "huggingface": huggingface.load,
    "webdataset": webdataset.load,
    "preferences": preferences.load,
}
"""`data.source` -> a function that gives what `path` and `split` of a data section say, without what lies in `validation_path`. The drawn
world has a section of its own."""
LISTED = 10
BRACKETS = re.compile(r"\s*\([^()]*\)")
OWN_TO_ONE = re.compile(r"'[^']*'|\"[^\"]*\"|\S*[\d/\\.]\S*")
"""In a reason: what stands in quotes, numbers, paths and names of files."""
OWN_TO_TRAINING = {"weights": {}, "repeats": {}, "folder_repeats": False, "weight_column": None, "repeat_column": None}
"""What says how training pictures are shown is not asked of pictures that are only measured."""
COLUMNS = ("part", "name", "reason", "height", "width", "captions", "caption", "weight", "repeats", "sha256")


@dataclass(frozen=True)
class Examined:
    """Each record whose picture decodes, with what was seen; and what became of everything else."""

    pictures: dict[Record, Seen]
    rejected: tuple[Told, ...] = ()
    aside: tuple[Told, ...] = ()
    hidden: tuple[Readable, ...] = ()


def examine(listing: Listing, config: DataConfig) -> Examined:
    """Decodes every picture, mask, and picture that was liked less, that nobody has looked at since it was written, and logs what became of each file. Raises
    ConfigError as `require_enough` does."""
    examined = look_through(listing, config)
    pictures, rejected, where = examined.pictures, examined.rejected, shown(listing.folder)
    require_enough(where, listing.folder, pictures, rejected, config)
    counts = [f"{counted(pictures, 'picture')} used"]
    counts += [f"{counted(listing.hidden, 'hidden file')} ignored"] if listing.hidden else []
    counts += [f"{len(listing.aside)} left aside ({reasons(listing)})"] if listing.aside else []
    counts += [f"{len(rejected)} rejected:\n  {listed(listing.folder, rejected)}"] if rejected else []
    log.log(logging.WARNING if rejected else logging.INFO, "%s: %s", where, ", ".join(counts))
    noted = {record.path: "; ".join(seen.notes) for record, seen in pictures.items() if seen.notes}
    if noted:
        log.info("%s: %d with notes:\n  %s", where, len(noted), listed(listing.folder, noted.items()))
    return examined


Job = tuple[Record, Seen | None, Seen | None, Seen | None]
"""A record, and what was seen before of its picture, its mask and the picture that was liked less."""


class Look(NamedTuple):
    """What was seen of a picture, of its mask and of the picture that was liked less, why they cannot be used, and whether anything of it
    is new."""

    seen: Seen | None
    mask: Seen | None
    rejected: Seen | None
    reason: str
    new: bool

    @property
    def whole(self) -> Seen:
        """All that is to be known of a record's pictures."""
        return replace(self.seen, mask=self.mask.sha256 if self.mask else b"", rejected=self.rejected)


def look_through(listing: Listing, config: DataConfig, look: Callable[[Job], Look] | None = None) -> Examined:
    """The same without a word, whatever it finds. `look`: in place of `look_at`, for who wants to see more."""
    pictures, rejected = {}, list(listing.rejected)
    keys = [key_of(record.path) for record in listing]
    mask_keys = [record.mask and key_of(record.mask, "mask") for record in listing]
    rejected_keys = [record.rejected and key_of(record.rejected) for record in listing]
    known = zip(recall(keys), recall(mask_keys), recall(rejected_keys), strict=True)
    jobs = ((record, *before) for record, before in zip(listing, known, strict=True))
    looked: dict[bytes | None, Seen] = {}
    for record, key, mask_key, rejected_key, found in zip(
        listing, keys, mask_keys, rejected_keys, decoded(jobs, look or look_at, config.workers), strict=True
    ):
        if found.reason:
            rejected.append((record.path, found.reason))
            continue
        pictures[record] = found.whole
        if found.new:
            parts = {key: found.seen, mask_key: found.mask, rejected_key: found.rejected}
            looked |= {own: seen for own, seen in parts.items() if seen is not None}
    remember(looked.items())
    return Examined(pictures, tuple(rejected), listing.aside, listing.hidden)


def look_at(job: Job, thumbnail: int | None = None) -> Look:
    """What is seen of a record's pictures, where that is not known. `thumbnail`: as `examine_picture` has it; it is looked at again for one."""
    record, seen, mask, less = job
    new = seen is None or (mask is None and record.mask is not None) or (less is None and record.rejected is not None)
    try:
        seen = examine_picture(record.path, thumbnail=thumbnail) if thumbnail or seen is None else seen
        size = (seen.height, seen.width)
        if mask is not None:
            require_shape(record.mask, (mask.height, mask.width), record.path, size)
        elif record.mask is not None:
            mask = examine_mask(record.mask, record.path, size)
        if less is None and record.rejected is not None:
            less = examine_picture(record.rejected)
        if less is not None and less.sha256 == seen.sha256:
            return unusable(
                f"is the same picture as {shown(record.rejected)}, of which it was chosen: take the pair out", new
            )
        return Look(seen, mask, less, "", new)
    except PictureError as error:
        whose = {
            record.rejected: f"its rejected picture {shown(error.path)}: ",
            record.mask: f"its mask {shown(error.path)} ",
        }
        return unusable(f"{(whose | {record.path: ''})[error.path]}{error.reason}", new)
    except OSError as error:
        return unusable(f"cannot be read: {error.strerror or error}", new)


def unusable(reason: str, new: bool) -> Look:
    return Look(None, None, None, reason, new)


def too_many(used: Sized, rejected: Sized, config: DataConfig) -> bool:
    """Whether a run stops: nothing is left, or with `config.on_error` "stop" more than a share of `config.max_rejected` is rejected."""
    share = len(rejected) / max(1, len(rejected) + len(used))
    return bool(rejected) and not (used and (config.on_error == "skip" or share <= config.max_rejected))


def enough_to_allow(used: Sized, rejected: Sized) -> float:
    """The least `max_rejected` with two decimals by which a run does not stop."""
    return math.ceil(100 * len(rejected) / max(1, len(rejected) + len(used))) / 100


def require_enough(where: str, root: Path, used: Sized, rejected: Sequence[Told], config: DataConfig) -> None:
    """Raises ConfigError that lists what cannot be used, where that is `too_many`."""
    if not too_many(used, rejected, config):
        return
    remedy = f", or set data.max_rejected to {enough_to_allow(used, rejected):g} to train without them" if used else ""
    raise ConfigError(
        f"{where}: {counted(rejected, 'file')} cannot be used, {counted(used, 'picture')} can:\n"
        f"  {listed(root, rejected)}\nRepair or remove them{remedy}"
    )


def counted(things: Sized, name: str) -> str:
    return f"{len(things)} {name}{'s' * (len(things) != 1)}"


def listed(root: Path, told: Iterable[Told]) -> str:
    """A line a file, the first ten."""
    lines = [f"{within(root, path)}: {why}" for path, why in told]
    return "\n  ".join(lines[:LISTED] + [f"... and {len(lines) - LISTED} more"] * (len(lines) > LISTED))


def within(root: Path, path: Readable) -> str:
    """What messages call something that lies in `root`."""
    inside = isinstance(path, Path) and path.is_relative_to(root)
    return shown(path.relative_to(root) if inside else path)


def reasons(listing: Listing) -> str:
    """What is left aside, by reason, with one name for each."""
    by_reason: dict[str, list[Path]] = {}
    for path, why in listing.aside:
        by_reason.setdefault(why, []).append(path)
    return "; ".join(
        f"{why}: {within(listing.folder, paths[0])}{f' and {len(paths) - 1} more' * (len(paths) > 1)}"
        for why, paths in by_reason.items()
    )


def load_listings(data: DataConfig) -> tuple[Listing, Listing | None]:
    """What is trained on, and what is held out; None where it is a share of the first."""
    load = SOURCES.get(data.source) or own_source(data.source)
    apart = held_out_section(data)
    return load(data), None if apart is None else load(apart)


def held_out_section(data: DataConfig) -> DataConfig | None:
    """What says where the pictures that are held out lie; None where they are a share of the others."""
    if data.validation_path is None and data.validation_split is None:
        return None
    held_out = {
        "path": data.validation_path or data.path,
        "split": data.validation_split or data.split,
        "validation_path": data.path if data.validation_path else None,
        "validation_split": data.split,
        **OWN_TO_TRAINING,
    }
    return data.model_copy(update=held_out)


def own_source(name: str) -> Callable[[DataConfig], Listing]:
    """The function that `my_source.py:load` names; raises ConfigError where it is not there."""
    path, _, attribute = name.rpartition(":")
    function = getattr(module_at(Path(path), "data.source"), attribute, None)
    if not callable(function):
        raise ConfigError(f"data.source: {path} has no function {attribute}")
    return function


def by_kind(told: Iterable[Told]) -> dict[str, list[Readable]]:
    """What a reason says, without what stands in brackets -> what it is said of. Reasons that differ by numbers, names and quotations
    alone are of one kind, which the first of them stands for; most frequent first."""
    kinds: dict[str, tuple[str, list[Readable]]] = {}
    for path, why in told:
        kind, text = kind_of(why)
        kinds.setdefault(kind, (text, []))[1].append(path)
    return dict(sorted(kinds.values(), key=lambda kind: -len(kind[1])))


def kind_of(reason: str) -> tuple[str, str]:
    """What reasons of one kind have in common, and the reason in short."""
    short = in_short(reason)
    return OWN_TO_ONE.sub("", short), short


def in_short(reason: str) -> str:
    """A reason on one line, without what stands in brackets."""
    while reason != (reason := BRACKETS.sub("", reason)):
        pass
    return " ".join(reason.split())


def write_manifest(path: Path, rows: Iterable[tuple]) -> None:
    """A CSV of COLUMNS."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(rows)


def used_rows(part: str, records: Iterable[Record], seen: Iterable[Seen]) -> Iterator[tuple]:
    """A row a picture, and of a pair a second one; one that is shown several times lies there as often, together."""
    before = None
    for record, picture in zip(records, seen, strict=True):
        if record is before:
            continue
        before = record
        size = (picture.height, picture.width)
        what = (len(record.captions), record.caption, record.weight, record.repeats)
        yield (part, shown(record.path), "; ".join(picture.notes), *size, *what, picture.sha256.hex())
        if (less := picture.rejected) is not None:
            notes = "; ".join((f"liked less than {shown(record.path)}", *less.notes))
            yield (part, shown(record.rejected), notes, less.height, less.width, *what, less.sha256.hex())


def other_rows(rejected: Iterable[Told], aside: Iterable[Told], hidden: Iterable[Readable]) -> Iterator[tuple]:
    nothing = ("",) * (len(COLUMNS) - 3)
    for part, told in (("rejected", rejected), ("left aside", aside), ("hidden", ((path, "") for path in hidden))):
        for path, why in told:
            yield (part, shown(path), why, *nothing)
