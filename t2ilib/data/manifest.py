"""What a run was trained on: every picture decoded once in full, every file of its folder accounted for, one digest over it all.

`Image.verify` passes half a JPEG, so each picture is really decoded. Whether a file that cannot be used stops the run or is
rejected is the user's choice (`data.on_error`); in both cases the message names them. Pictures are decoded before a share of
them is held out, so that a bad one is never the whole of what is held out.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from pathlib import Path

from t2ilib.config import ConfigError, DataConfig, RunConfig
from t2ilib.data.pictures import PictureError, open_picture
from t2ilib.data.sources import folder
from t2ilib.data.sources.folder import Listing, Record, Told
from t2ilib.shapes import source as shapes
from t2ilib.text import shown

log = logging.getLogger(__name__)

SOURCES: dict[str, Callable[[RunConfig], tuple[Listing, Listing | None]]] = {
    "folder": lambda run: folder.load(run.data),
    "shapes": lambda run: shapes.load(run.shapes),
}
"""`data.source` -> what a run is trained on, and what is held out; None where it is a share of the first."""
LISTED = 10
NAMED = 8
"""Held-out pictures that are told by name."""
FEW_HELD_OUT = 8
"""Fewer held-out pictures than this are warned about. Pictures differ far more than trainings do: of 48 in the drawn world, whose
mean loss a training had lowered by a third, single ones said the opposite in 27 of 100 cases, means of two in 15, of four in 5,
of eight in under 1."""


@dataclass(frozen=True)
class Dataset:
    """Records whose pictures are known to decode. `digest` covers the bytes of pictures and captions, in order; `ground` is what
    their transparent parts are laid over; `rejected` are the files that cannot be used, with reasons."""

    name: str
    records: tuple[Record, ...]
    digest: str
    rejected: tuple[Told, ...] = ()
    ground: str = "white"

    def __len__(self) -> int:
        return len(self.records)

    def captions(self) -> list[str]:
        return [record.caption for record in self.records]


@dataclass(frozen=True)
class Examined:
    """Each record whose picture decodes, with the SHA-256 of its file; what is rejected, by the folder or by decoding."""

    pictures: dict[Record, bytes]
    rejected: tuple[Told, ...]

    def dataset(self, name: str, ground: str, records: Iterable[Record], rejected: tuple[Told, ...] = ()) -> Dataset:
        records, digest = tuple(records), hashlib.sha256()
        for record in records:
            digest.update(self.pictures[record] + record.caption.encode() + b"\0")
        return Dataset(name, records, digest.hexdigest(), rejected, ground)


def examine(listing: Listing, config: DataConfig) -> Examined:
    """Decodes every picture and logs what became of each file. Raises ConfigError that lists what cannot be used, with
    `config.on_error` "stop" or where nothing is left."""
    pictures, rejected = {}, list(listing.rejected)
    for record in listing:
        try:
            open_picture(record.path, config.ground)
            pictures[record] = hashlib.sha256(record.path.read_bytes()).digest()
        except PictureError as error:
            rejected.append((record.path, error.reason))
        except OSError as error:
            rejected.append((record.path, f"cannot be read: {error.strerror}"))
    where, skips = shown(listing.folder), config.on_error == "skip"
    if rejected and not (skips and pictures):
        remedy = "" if skips else ", or set data.on_error to skip to train without them"
        raise ConfigError(
            f"{where}: {counted(rejected, 'file')} cannot be used, {counted(pictures, 'picture')} can:\n"
            f"  {listed(listing.folder, rejected)}\nRepair or remove them{remedy}"
        )
    counts = [f"{counted(pictures, 'picture')} used"]
    counts += [f"{counted(listing.hidden, 'hidden file')} ignored"] if listing.hidden else []
    counts += [f"{len(listing.aside)} left aside ({reasons(listing)})"] if listing.aside else []
    counts += [f"{len(rejected)} rejected:\n  {listed(listing.folder, rejected)}"] if rejected else []
    log.log(logging.WARNING if rejected else logging.INFO, "%s: %s", where, ", ".join(counts))
    return Examined(pictures, tuple(rejected))


def counted(things: Sized, name: str) -> str:
    return f"{len(things)} {name}{'s' * (len(things) != 1)}"


def listed(root: Path, told: Iterable[Told]) -> str:
    """A line a file, the first ten."""
    lines = [f"{shown(path.relative_to(root) if path.is_relative_to(root) else path)}: {why}" for path, why in told]
    return "\n  ".join(lines[:LISTED] + [f"... and {len(lines) - LISTED} more"] * (len(lines) > LISTED))


def reasons(listing: Listing) -> str:
    """What is left aside, by reason, with one name for each."""
    by_reason: dict[str, list[Path]] = {}
    for path, why in listing.aside:
        by_reason.setdefault(why, []).append(path)
    return "; ".join(
        f"{why}: {shown(paths[0].relative_to(listing.folder))}{f' and {len(paths) - 1} more' * (len(paths) > 1)}"
        for why, paths in by_reason.items()
    )


def tell_held_out(training: list[Record], held_out: list[Record]) -> None:
    """Logs which pictures are held out, and warns where they are few."""
    total = len(training) + len(held_out)
    if not held_out:
        log.info("held out: none of %d, so there is no held-out loss", total)
        return
    names = [shown(record.path.name) for record in held_out]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    log.info("held out: %s%s (%d of %d)", ", ".join(names[:NAMED]), more, len(names), total)
    if len(held_out) < FEW_HELD_OUT:
        log.warning(
            "only %s held out, and single pictures often say the opposite of many: trust no held-out loss before %d are (more"
            " pictures, data.validation_share, or data.validation_path)",
            f"{counted(held_out, 'picture')} {'is' if len(held_out) == 1 else 'are'}",
            FEW_HELD_OUT,
        )


def load_datasets(run: RunConfig) -> tuple[Dataset, Dataset]:
    """The training and the held-out pictures of a run, the second of which may be empty, and logs the split. Raises ConfigError as `examine`, `hold_out` and
    the sources do."""
    data = run.data
    listing, apart = SOURCES[data.source](run)
    name = shown(Path(data.path).name) if data.path else "-".join((data.source, *run.shapes.scenes))
    examined = examine(listing, data)
    if apart is None:
        training, held_out = folder.hold_out([*examined.pictures], data.validation_share)
        from_which, rejected = examined, ()
    else:
        from_which = examine(apart, data)
        training, held_out, rejected = examined.pictures, from_which.pictures, from_which.rejected
    if data.source == "folder":  # the drawn world holds out what it drew for that
        tell_held_out(list(training), list(held_out))
    return (
        examined.dataset(name, data.ground, training, examined.rejected),
        from_which.dataset(f"{name}-held-out", data.ground, held_out, rejected),
    )
