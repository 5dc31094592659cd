"""What a run is trained on and measured by: pictures that are known to decode, a share of them held out, their captions edited.

Pictures are decoded before a share of them is held out, so that a bad one is never the whole of what is held out. Captions are edited
after that, so that which pictures are held out does not depend on the edits.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path, PurePath
from typing import Any

from t2ilib.config import ConfigError, DataConfig, RunConfig
from t2ilib.data.captions import Captions, build_captions
from t2ilib.data.captions.counting import count_captions
from t2ilib.data.editing import digest_of, edit_captions
from t2ilib.data.manifest import (
    Examined,
    by_kind,
    counted,
    examine,
    load_listings,
    other_rows,
    require_enough,
    used_rows,
    write_manifest,
)
from t2ilib.data.opening import Column, open_streamed
from t2ilib.data.pairs import check_pairs
from t2ilib.data.pictures import Seen, examine_picture
from t2ilib.data.records import Listing, Readable, Record, Told
from t2ilib.data.sources import folder
from t2ilib.data.sources.spans import public
from t2ilib.data.streams import Streamed
from t2ilib.seeds import numpy_generator_for
from t2ilib.shapes import source as shapes
from t2ilib.text import shown

log = logging.getLogger(__name__)

NAMED = 8
"""Held-out pictures that are told by name."""
GRID_PROMPTS = 8
"""Captions that make the prompts of the sample grids where `evaluation.prompts` is empty."""
TUNING = "held out while tuning"
"""What decides which training pictures these are, apart from what decides which final runs hold out."""
FEW_HELD_OUT = 8
"""Fewer held-out pictures than this are warned about. Pictures differ far more than trainings do: of 48 in the drawn world, whose
mean loss a training had lowered by a third, single ones said the opposite in 27 of 100 cases, means of two in 15, of four in 5,
of eight in under 1."""


@dataclass(frozen=True)
class Dataset:
    """Records whose pictures are known to decode, each as often as an epoch shows it. `digest` covers the bytes of pictures and
    captions, in order; `ground` is what their transparent parts are laid over.

    `seen`: what was seen of each picture. `rejected`, `aside`, `hidden`: what became of everything else that was there. `edits`: what is
    done to captions in every step, where it is not the same each time. `edited`: what was or is done to them in any case. `parts`: one's
    own pictures and those of the class, where these records are both, in this order. `stream`: where there are more pictures than these:
    `records` and `seen` then give any by its position, reading it where it is not at hand.
    """

    name: str
    records: Sequence[Record]
    digest: str
    rejected: tuple[Told, ...] = ()
    ground: str = "white"
    seen: Sequence[Seen] = ()
    aside: tuple[Told, ...] = ()
    hidden: tuple[Readable, ...] = ()
    edits: Captions | None = None
    edited: Captions | None = None
    parts: tuple["Dataset", ...] = ()
    stream: Streamed | None = None

    def __len__(self) -> int:
        return len(self.records)

    @property
    def own(self) -> "Dataset":
        """What is there without pictures of the class."""
        return self.parts[0] if self.parts else self

    @property
    def num_class(self) -> int:
        """How many of the records, the last ones, are pictures of the class."""
        return len(self) - len(self.own)

    def looked_at(self) -> tuple[Seen, ...]:
        """What was seen of each picture; looks where nobody has."""
        if len(self.seen) != len(self.records):
            seen = tuple(examine_picture(record.path, self.ground) for record in self.records)
            object.__setattr__(self, "seen", seen)
        return self.seen

    def close(self) -> None:
        """Ends what reads a stream."""
        if self.stream is not None:
            self.stream.close()

    def captions(self) -> list[str]:
        """The first caption of each picture."""
        return [record.caption for record in self.records]

    def part(self, which: Sequence[int]) -> "Dataset":
        """Some of the pictures, by number, of a data set without pictures of the class."""
        return replace(
            self,
            records=tuple(self.records[i] for i in which),
            seen=tuple(self.seen[i] for i in which) if self.seen else (),
        )

    def joined(self, of_class: "Dataset") -> "Dataset":
        """These, and after them pictures of the class."""
        return replace(
            self,
            records=self.records + of_class.records,
            seen=self.looked_at() + of_class.looked_at(),
            digest=hashlib.sha256(f"{self.digest} {of_class.digest}".encode()).hexdigest(),
            parts=(self, of_class),
        )


def build_dataset(
    name: str,
    examined: Examined,
    records: Iterable[Record],
    config: DataConfig,
    rest: bool,
    edits: Captions | None = None,
    measured: bool = False,
) -> Dataset:
    """These of the examined records as a data set; with `rest` it also tells what became of everything else. `measured`: pictures that are
    not trained on count once each, and alike."""
    kept = [(record, examined.pictures[record]) for record in records]
    if measured:
        kept = [(replace(record, weight=1.0, repeats=1), seen) for record, seen in kept]
    others = {"rejected": examined.rejected, "aside": examined.aside, "hidden": examined.hidden} if rest else {}
    once, varying = edits.split() if edits is not None else (None, None)
    if edits is not None:
        edited, emptied = edit_captions([record for record, _ in kept], once, varying)
        if emptied:
            require_enough(name, Path(), [record for record in edited if record], emptied, config)
            log.warning("%s: %s left out, of whose captions the edits leave nothing", name, counted(emptied, "picture"))
            others["rejected"] = (*others.get("rejected", ()), *emptied)
        kept = [(record, seen) for record, (_, seen) in zip(edited, kept, strict=True) if record is not None]
    shown_often = list(chain.from_iterable([pair] * pair[0].repeats for pair in kept))
    records, seen = (tuple(column) for column in (zip(*shown_often, strict=True) if shown_often else ((), ())))
    return Dataset(
        name, records, digest_of(kept), ground=config.ground, seen=seen, edits=varying, edited=edits, **others
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
    """The training and the held-out pictures of a run, the second of which may be empty, and logs the split. Raises ConfigError as
    `examine`, `hold_out` and the sources do."""
    edits = build_edits(run.data)
    if edits is not None and edits.tagger:
        log.info("captions are edited by the tagger %s %s", edits.tagger, edits.version)
    if run.data.streaming:
        return load_stream(run, edits)
    examined, of_their_own, split = divide(run)
    if run.data.source != "shapes":  # the drawn world holds out what it drew for that
        tell_held_out(*split)
    return build_datasets(run, examined, of_their_own, split, edits)


def divide(run: RunConfig) -> tuple[Examined, Examined | None, tuple[list[Record], list[Record]]]:
    """What is there, what is there apart of held-out pictures, and the records that are trained on and held out, of a run whose pictures
    are no stream; captions as they are. Raises ConfigError as `load_datasets` does."""
    listing, apart = list_pictures(run)
    examined = examine(listing, run.data)
    of_their_own = None if apart is None else examine(apart, run.data)
    training, held_out = hold_out(run.data, examined, of_their_own)
    check_pairs(run, training, held_out)
    if run.data.sample is not None:
        everything, training = training, draw_sample(training, run.data.sample, run.seed)
        drawn, why = {*training}, f"not among the {len(training)} that seed {run.seed} draws"
        left = [(record.path, why) for record in everything if record not in drawn]
        examined = replace(examined, aside=(*examined.aside, *left))
    return examined, of_their_own, (training, held_out)


def build_edits(data: DataConfig) -> Captions | None:
    return build_captions(data.captions, data.tagger) if data.captions else None


def list_pictures(run: RunConfig) -> tuple[Listing, Listing | None]:
    """What is trained on, and what is held out; None where it is a share of the first."""
    return shapes.load(run.shapes, run.data.part) if run.data.source == "shapes" else load_listings(run.data)


def hold_out(data: DataConfig, examined: Examined, apart: Examined | None) -> tuple[list[Record], list[Record]]:
    """Training and held-out records; `apart`: those that are held out, where they are no share of the others. For `data.part: tuning`
    what is held out of the training records; those that final runs hold out are in neither."""
    training, held_out = [*examined.pictures], [*apart.pictures] if apart else []
    if apart is None:
        training, held_out = folder.hold_out(training, data.validation_share)
    return folder.hold_out(training, data.validation_share, TUNING) if divided_again(data) else (training, held_out)


def divided_again(data: DataConfig) -> bool:
    """Whether what is held out is a share of what final runs train on; the drawn world draws other pictures instead."""
    return data.part == "tuning" and data.source != "shapes"


def draw_sample(records: Sequence[Record], count: int, seed: int) -> list[Record]:
    """So many of the records, in their order, drawn by the seed. Raises ConfigError where there are not as many."""
    if count > len(records):
        raise ConfigError(
            f"data.sample {count}: there are {counted(records, 'training picture')}; lower it, or leave it out"
        )
    chosen = numpy_generator_for(seed, "sample of the pictures").permutation(len(records))[:count]
    return [records[place] for place in sorted(chosen)]


def build_datasets(
    run: RunConfig,
    examined: Examined,
    apart: Examined | None,
    split: tuple[list[Record], list[Record]],
    edits: Captions | None,
) -> tuple[Dataset, Dataset]:
    data, (training, held_out) = run.data, split
    name = name_of(run)
    if divided_again(data) and apart is None:
        held_elsewhere = folder.hold_out([*examined.pictures], data.validation_share)[1]
        others = [(record.path, "held out of final runs") for record in held_elsewhere]
        examined = replace(examined, aside=(*examined.aside, *others))
    kept = edits if data.edit_held_out else None
    of_held_out = (examined, False) if apart is None or divided_again(data) else (apart, True)
    return (
        build_dataset(name, examined, training, data, rest=True, edits=edits),
        build_dataset(
            f"{name}-held-out", of_held_out[0], held_out, data, rest=of_held_out[1], edits=kept, measured=True
        ),
    )


def load_stream(run: RunConfig, edits: Captions | None) -> tuple[Dataset, Dataset]:
    """The training pictures of a stream, of which the first block has been read, and its held-out pictures."""
    data = run.data
    stream, examined = open_streamed(run, edits)
    name, varying = name_of(run), None if edits is None else edits.split()[1]
    records, seen = Column(stream, 0), Column(stream, 1)
    tell_held_out(list(records), list(examined.pictures))
    held_out = build_dataset(
        f"{name}-held-out",
        examined,
        examined.pictures,
        data,
        True,
        edits if data.edit_held_out else None,
        measured=True,
    )
    training = Dataset(name, records, stream.digest, (), data.ground, seen, edits=varying, edited=edits, stream=stream)
    return training, held_out


def name_of(run: RunConfig) -> str:
    """What the data set is called in MLflow and in messages."""
    if run.data.path:
        return shown(PurePath(public(run.data.path)).name)
    return "-".join((PurePath(run.data.source).name, *(run.shapes.scenes if run.shapes else ())))


def some_captions(held_out: Sequence[str], training: Sequence[str]) -> tuple[str, ...]:
    """GRID_PROMPTS different captions, held-out ones first, from all along the order that they are in: what lies together is often
    alike."""
    own = dict.fromkeys(held_out)
    rest = [caption for caption in dict.fromkeys(training) if caption not in own]
    chosen: list[str] = []
    for captions in (list(own), rest):
        wanted = GRID_PROMPTS - len(chosen)
        chosen += captions[:: max(1, len(captions) // max(1, wanted))][:wanted]
    return tuple(chosen)


def manifest_rows(training: Dataset, held_out: Dataset) -> Iterator[tuple]:
    """A row for everything that was found."""
    parts = (*zip(("training", "class"), training.parts or (training,), strict=False), ("held out", held_out))
    for part, dataset in parts:
        yield from used_rows(part, dataset.records, dataset.looked_at())
    for _, dataset in parts:
        yield from other_rows(dataset.rejected, dataset.aside, dataset.hidden)


def rows_held_out(held_out: Dataset) -> Iterator[tuple]:
    yield from dict.fromkeys(used_rows("held out", held_out.records, held_out.looked_at()))
    yield from other_rows(held_out.rejected, held_out.aside, held_out.hidden)


def save_manifest(training: Dataset, held_out: Dataset, path: Path) -> None:
    """Writes a row for everything that was found to `path`, a CSV, and beside it `summary` as JSON. Of a stream they begin with what is
    held out, and grow as it is read."""
    if training.stream is not None:
        training.stream.begin(rows_held_out(held_out), summary(training, held_out))
        return
    write_manifest(path, manifest_rows(training, held_out))
    told = json.dumps(summary(training, held_out), indent=2, ensure_ascii=False)
    path.with_suffix(".json").write_text(told + "\n", encoding="utf-8")


def summary(training: Dataset, held_out: Dataset) -> dict[str, Any]:
    """Totals, digests, what the captions are like, and what was done to them. A picture counts once, however often it is shown."""
    sets = (*(training.parts or (training,)), held_out)
    own, *of_class, apart = (dict.fromkeys(dataset.records) for dataset in sets)
    rejected = by_kind([told for dataset in sets for told in dataset.rejected])
    edits = training.edited or held_out.edited
    return {
        "name": training.name,
        "pictures": {
            "training": len(own),
            "class": sum(map(len, of_class)),
            "held_out": len(apart),
            "rejected": sum(map(len, rejected.values())),
            "left_aside": sum(len(dataset.aside) for dataset in sets),
            "hidden": sum(len(dataset.hidden) for dataset in sets),
        },
        "samples_of_an_epoch": len(training.own),
        "rejected": {shown(why): len(paths) for why, paths in rejected.items()},
        "digest": dict(
            zip(("training", *["class"] * len(of_class), "held_out"), [dataset.digest for dataset in sets], strict=True)
        ),
        "captions": count_captions([record.captions for record in (*own, *apart)]).told(),
        "edits": edits
        and {
            "transforms": [name if argument is None else {name: argument} for name, argument in edits.specs],
            "in_every_step": edits.varies,
            "held_out_too": held_out.edited is not None,
            "tagger": edits.tagger,
            "version": edits.version,
        },
    }
