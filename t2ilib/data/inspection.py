"""What a run would train on, as plain data: every picture, what became of everything else, what comes twice, and what would stop the run.

The pictures are listed, decoded, divided and captioned by the functions that a run has, so that both see the same; but nothing stops here:
why a run would is told. Nothing here loads a model or draws (`report.inspection_page` does). Leaves out pictures of the class.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from t2ilib.config import ConfigError, RunConfig
from t2ilib.data.captions.counting import CaptionCounts, count_captions
from t2ilib.data.dataset import (
    Dataset,
    build_datasets,
    build_edits,
    hold_out,
    list_pictures,
)
from t2ilib.data.likeness import THUMBNAIL, Likeness, equal, groups, likeness, near
from t2ilib.data.manifest import Examined, Job, Look, look_at, look_through, too_many
from t2ilib.data.pairs import check_pairs
from t2ilib.data.pictures import Seen
from t2ilib.data.prior import build_order, given_pictures, num_class
from t2ilib.data.records import Listing, Readable, Record, Told
from t2ilib.data.views import Assignment, assign, magnification, share_cut
from t2ilib.text import shown

MANY = 200
"""Pictures that are looked at with a bar, on a terminal."""
SIDES = range(1024, 0, -64)
"""Resolutions to choose from where nobody has chosen: SDXL's, and smaller ones of which each is a multiple of what a UNet halves."""
MOST_ENLARGED = 0.1
"""Of the pictures, at a resolution that they can fill."""
TRAINING, HELD_OUT = "training", "held out"


@dataclass(frozen=True)
class Alike:
    """Pictures, by their numbers, that are the same, or nearly."""

    numbers: tuple[int, ...]
    exact: bool
    parts: frozenset[str]

    @property
    def leaks(self) -> bool:
        """Whether some of them are trained on, and others held out."""
        return len(self.parts) > 1


@dataclass(frozen=True)
class Inspection:
    """`run`: as it was given, but for a resolution that nobody has chosen (`assumed`). `records`, with what was `seen` of each and its
    `parts`: training pictures first, each once. `assigned`: the sizes of their samples. `stops`: why a run would not begin, empty if it would.
    `cut`: captions of which the base's tokenizer drops the end; None where it is not known.
    """

    run: RunConfig
    root: Path | str
    training: Dataset
    held_out: Dataset
    assumed: bool
    assigned: Assignment
    alike: tuple[Alike, ...]
    captions: CaptionCounts
    cut: tuple[str, ...] | None
    stops: tuple[str, ...]

    @cached_property
    def records(self) -> tuple[Record, ...]:
        return (*dict.fromkeys(self.training.records), *dict.fromkeys(self.held_out.records))

    @cached_property
    def seen(self) -> tuple[Seen, ...]:
        return tuple(seen for _, seen in once(self.training, self.held_out))

    @cached_property
    def num_training(self) -> int:
        return len(dict.fromkeys(self.training.records))

    @property
    def num_held_out(self) -> int:
        return len(self.records) - self.num_training

    @property
    def parts(self) -> list[str]:
        return [TRAINING] * self.num_training + [HELD_OUT] * self.num_held_out

    @property
    def rejected(self) -> tuple[Told, ...]:
        return (*self.training.rejected, *self.held_out.rejected)

    @property
    def aside(self) -> tuple[Told, ...]:
        return (*self.training.aside, *self.held_out.aside)

    @property
    def hidden(self) -> tuple[Readable, ...]:
        return (*self.training.hidden, *self.held_out.hidden)

    @cached_property
    def sizes(self) -> np.ndarray:
        """(N, 2): heights and widths, upright."""
        return sizes_of(self.seen)

    @cached_property
    def magnified(self) -> np.ndarray:
        """(N,): above 1, a picture is smaller than its sample."""
        return magnification(self.sizes, self.assigned.targets)

    @cached_property
    def cut_off(self) -> np.ndarray:
        """(N,): the share of each picture that lies outside its crop."""
        return share_cut(self.sizes, self.assigned.targets)


def inspect(
    run: RunConfig,
    multiple: int | None = None,
    cut: Callable[[Sequence[str]], list[str]] | None = None,
    choose_resolution: bool = False,
) -> Inspection:
    """Looks at everything that `run` names. `multiple`: of the sides of buckets, which the base's UNet needs. `cut`: those of captions that
    are too long for the base. `choose_resolution`: what the pictures can fill, in place of the run's.

    Raises ConfigError only where pictures cannot be listed at all.
    """
    patient = run.model_copy(update={"data": run.data.model_copy(update={"on_error": "skip"})})
    listing, apart, stops = list_all(run, patient)
    edits = build_edits(run.data)
    looks: dict[Readable, Likeness] = {}
    examined, of_their_own = look_over(listing, patient, looks), apart and look_over(apart, patient, looks)
    for part, found in ((listing, examined), (apart, of_their_own)):
        stops += [] if found is None else why_enough_is_not_left(part, found, run)
    split = ([*examined.pictures], [*of_their_own.pictures] if of_their_own else [])
    try:
        split = hold_out(run.data, examined, of_their_own) if examined.pictures else split
        check_pairs(run, *split)
    except ConfigError as error:
        stops.append(str(error))
    try:
        training, held_out = build_datasets(patient, examined, of_their_own, split, edits)
    except ConfigError as error:
        stops.append(str(error))
        training, held_out = build_datasets(patient, examined, of_their_own, split, None)
    for dataset, found in ((training, examined), (held_out, of_their_own)):
        stops += why_captions_are_not_left(dataset, found, run)
    pairs = once(training, held_out)
    sizes = sizes_of([seen for _, seen in pairs])
    if choose_resolution:
        update = {"resolution": fillable(sizes)}
        run = run.model_copy(update={"data": run.data.model_copy(update=update)})
    stops += why_no_batch(run, training)
    assigned, wrong = assign_sizes(run, pairs, sizes, multiple)
    parts = [TRAINING] * len(dict.fromkeys(training.records))
    return Inspection(
        run,
        listing.folder,
        training,
        held_out,
        choose_resolution,
        assigned,
        tuple(find_alike(pairs, parts + [HELD_OUT] * (len(pairs) - len(parts)), looks)),
        count_captions([record.captions for record, _ in pairs]),
        None if cut is None else tuple(cut([text for record, _ in pairs for text in record.captions])),
        tuple(dict.fromkeys(stops + wrong)),
    )


def list_all(run: RunConfig, patient: RunConfig) -> tuple[Listing, Listing | None, list[str]]:
    """The listings, and why a run would not list them where `data.on_error` decides about that."""
    try:
        return *list_pictures(run), []
    except ConfigError as error:
        if run.data.on_error == "skip":
            raise
        listing, apart = list_pictures(patient)
        return listing, apart, [str(error)]


def look_over(listing: Listing, run: RunConfig, looks: dict[Readable, Likeness]) -> Examined:
    """Every picture is looked at, those too that are known, for what tells them apart, which goes into `looks`."""
    hidden = None if len(listing) > MANY else True  # None: where there is no terminal
    with tqdm(total=len(listing), desc=shown(listing.folder), unit=" pictures", disable=hidden, leave=False) as bar:

        def look(job: Job) -> Look:
            found = look_at(job, THUMBNAIL)
            bar.update()
            if found.seen is None:
                return found
            looks[job[0].path] = likeness(found.seen.thumbnail)
            return found._replace(seen=replace(found.seen, thumbnail=None))

        return look_through(listing, run.data, look)


def why_enough_is_not_left(listing: Listing, found: Examined, run: RunConfig) -> list[str]:
    used, rejected, data = len(found.pictures), len(found.rejected), run.data
    if not too_many(found.pictures, found.rejected, data):
        return []
    if not used:
        return [f"no picture of {shown(listing.folder)} can be used"]
    share = rejected / (rejected + used)
    return [
        f"{rejected} of {rejected + used} cannot be used, {100 * share:.0f} %, and data.max_rejected is"
        f" {100 * data.max_rejected:g} %: repair or remove them"
    ]


def why_captions_are_not_left(dataset: Dataset, found: Examined | None, run: RunConfig) -> list[str]:
    emptied = dataset.rejected[len(found.rejected) if found else 0 :]
    if not too_many(dataset.records, emptied, run.data):
        return []
    return [
        f"data.captions leaves nothing of the captions of {len(emptied)} pictures, more than data.max_rejected allows"
    ]


def why_no_batch(run: RunConfig, training: Dataset) -> list[str]:
    try:
        if run.training.steps and len(training):
            build_order(run, len(training), num_class(run, given_pictures(run)))
    except ConfigError as error:
        return [str(error)]
    return []


def assign_sizes(
    run: RunConfig, pairs: Sequence[tuple[Record, Seen]], sizes: np.ndarray, multiple: int | None
) -> tuple[Assignment, list[str]]:
    data = run.data
    ask = {"repeats": [record.repeats for record, _ in pairs], "batch_size": run.training.batch_size}
    try:
        return assign(sizes, data.resolution, buckets=data.buckets, multiple=multiple, **ask), []
    except ConfigError as error:
        return assign(sizes, data.resolution, buckets=False, **ask), [str(error)]


def fillable(sizes: np.ndarray) -> int:
    """The largest resolution at which at most a tenth of the pictures is enlarged."""
    return next((side for side in SIDES if share_enlarged(sizes, side) <= MOST_ENLARGED), SIDES[-1])


def share_enlarged(sizes: np.ndarray, side: int) -> float:
    """Of the pictures, those whose shorter side is less."""
    return float((sizes.min(1) < side).mean()) if len(sizes) else 0.0


def find_alike(
    pairs: Sequence[tuple[Record, Seen]], parts: Sequence[str], looks: dict[Readable, Likeness]
) -> list[Alike]:
    """Equal pictures, then near ones; of equal ones the first stands for all among the near. Of preference pairs equal ones alone: pictures
    of one prompt are to be like each other, and one may be in many pairs."""
    same = equal([seen.sha256 + (seen.rejected.sha256 if seen.rejected else b"") for _, seen in pairs])
    again = {number for numbers in same for number in numbers[1:]}
    single = [number for number, (record, _) in enumerate(pairs) if number not in again and record.rejected is None]
    like = groups(near([looks[pairs[number][0].path] for number in single]))
    found = [(numbers, True) for numbers in same] + [([single[i] for i in group], False) for group in like]
    return [Alike(tuple(numbers), exact, frozenset(parts[i] for i in numbers)) for numbers, exact in found]


def once(*datasets: Dataset) -> list[tuple[Record, Seen]]:
    """Each picture of the data sets, however often it is shown, with what was seen of it."""
    return [
        pair for dataset in datasets for pair in dict(zip(dataset.records, dataset.looked_at(), strict=True)).items()
    ]


def sizes_of(seen: Sequence[Seen]) -> np.ndarray:
    return np.array([(one.height, one.width) for one in seen], dtype=np.int64).reshape(-1, 2)
