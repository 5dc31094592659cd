"""Pairs of pictures of one caption, of which one was preferred: a folder with `preferences.jsonl`, or rows as Pick-a-Pic has them.

    {"chosen": "a.png", "rejected": "b.png", "text": "a red heart"}

A line a pair, with paths from the file's own folder; `t2ilib data preferences` writes such folders, of pictures that a measure ranked or people
voted on. Pick-a-Pic (arXiv 2305.01569; `yuvalkirstain/pickapic_v2`) has the bytes of two pictures a row, `jpg_0` and `jpg_1`, their `caption`,
and `label_0`, which is 1 where the first was preferred, 0 where the second was and 0.5 where neither was; `label_1` is the rest to 1. Ties
are left out, as Diffusion-DPO did (arXiv 2311.12908, sec. 5.1), and so are rows that have no label or say that they have none (`has_label`).

Which pairs are held out is decided by their captions (`folder.hold_out`), so that no prompt is on both sides. Leaves out: streams, masks, and
votes as they are exported, which hold settings in place of pictures.
"""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2ilib.config import ConfigError, DataConfig
from t2ilib.data.records import Listing, Record, Told
from t2ilib.data.sources.files import LookUp, is_picture, walk
from t2ilib.data.sources.huggingface import ROWS_AT_ONCE, Cell, Rows, choose_rows, load_parts, root_of
from t2ilib.data.sources.places import COLUMNS, refuse
from t2ilib.data.sources.table import raise_mistakes, read_jsonl
from t2ilib.data.sources.wording import unfit
from t2ilib.text import shown

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

TABLE = "preferences.jsonl"
CHOSEN, REJECTED, TEXT = FIELDS = ("chosen", "rejected", "text")
PICTURES, LABELS, CAPTION, HAS_LABEL = ("jpg_0", "jpg_1"), ("label_0", "label_1"), "caption", "has_label"
FORMS = f"a folder with {TABLE} ({', '.join(FIELDS)}), or rows of {', '.join((*PICTURES, *LABELS, CAPTION))} as Pick-a-Pic has them"
TIE, UNLABELLED = "a tie: neither picture was preferred", "has no label: nobody said which was preferred"


def load(config: DataConfig) -> Listing:
    """The pairs of `config.path`, in their order. Raises ConfigError for what holds none, a table that cannot be read, and as `huggingface`."""
    why = "whose pairs have columns of their own"
    refuse(config, (*COLUMNS, "weights", "repeats", "folder_repeats", "prompt"), why)
    if config.path is None:
        raise ConfigError(f"data.path is missing: give {FORMS}")
    path = Path(config.path)
    if path.is_file() and path.suffix.lower() == ".json":
        raise ConfigError(
            f"data.path {shown(path)}: exported votes name settings, not pictures. Have these drawn again by t2ilib data preferences"
            f" OUT --votes {shown(path)}, and give that folder"
        )
    table = path / TABLE if path.is_dir() else path
    if not (table.is_file() and table.suffix.lower() == ".jsonl"):
        parts, split = choose_rows(config, load_parts)
        return read_rows(parts[split], split, config)
    for field in ("split", "subset", "revision", "validation_split"):
        if getattr(config, field) is not None:
            raise ConfigError(
                f"data.{field} is about data sets with parts, and {shown(table)} is a table: leave it out"
            )
    return read_table(table, config.validation_path and Path(config.validation_path))


def read_table(table: Path, apart: Path | None = None) -> Listing:
    """The pairs that a table names, of pictures in its folder but for what lies in `apart`. Raises ConfigError for rows that are none, and a
    table without any."""
    folder = table.parent
    files, hidden, rejected = walk(folder, apart)
    look_up, records, known, others = LookUp(folder, files), [], {}, {}
    for number, row in enumerate(rows_of(table), 1):
        others |= dict.fromkeys(name for name in row if name not in FIELDS)
        where, text = f"(row {number} of {table.name})", row[TEXT].strip()
        found = [look_up(row[field]) for field in (CHOSEN, REJECTED)]
        absent = [
            (folder / row[field], path) for field, path in zip(FIELDS, found, strict=False) if isinstance(path, str)
        ]
        if absent:
            rejected += [(path, f"{reason} {where}") for path, reason in absent]
            continue
        key = (*found, text)
        if wrong := unfit((text,)) or why_no_pair(key, known):
            rejected.append((found[0], f"{wrong} {where}"))
            continue
        known[key] = number
        records.append(Record(found[0], text, rejected=found[1]))
    if not records and not rejected:
        raise ConfigError(f"{shown(table)} names no pair")
    if others:
        log.info("%s: not read of its rows: %s", shown(table), ", ".join(map(shown, others)))
    tell_contradictions(table, known)
    named = {path for one, other, _ in known for path in (one, other)} | {path for path, _ in rejected} | {table}
    aside = [(path, why_aside(path, table)) for path in files if path not in named]
    return Listing(folder, tuple(records), (table,), tuple(hidden), tuple(aside), tuple(rejected))


def rows_of(table: Path) -> list[dict[str, Any]]:
    rows, mistakes = list(read_jsonl(table)), {}
    for number, row in enumerate(rows, 1):
        lacking = [name for name in FIELDS if not (isinstance(row, dict) and isinstance(row.get(name), str))]
        if lacking:
            has = ", ".join(map(shown, row)) if isinstance(row, dict) else type(row).__name__
            wrong = f"has no text in {lacking[0]!r} (it has {has}): a row is {', '.join(FIELDS)}"
            mistakes.setdefault(wrong, []).append(number)
    raise_mistakes(table, mistakes)
    return rows


def why_no_pair(key: tuple[Path, Path, str], known: dict[tuple[Path, Path, str], int]) -> str | None:
    if key[0] == key[1]:
        return "is chosen and rejected at once"
    return f"is chosen over {shown(key[1].name)} in row {known[key]} already: keep one" if key in known else None


def tell_contradictions(table: Path, known: dict[tuple[Path, Path, str], int]) -> None:
    """Warns of pairs that are there both ways round: people differ, and what is learned of them is nothing."""
    turned = [number for (one, other, text), number in known.items() if (other, one, text) in known]
    if turned:
        log.warning(
            "%s: %d rows contradict each other: the picture that one has chosen another has rejected (row %d, ...)",
            shown(table),
            len(turned),
            turned[0],
        )


def why_aside(path: Path, table: Path) -> str:
    return f"no row of {table.name} names it" if is_picture(path) else "neither a picture nor the table of pairs"


@dataclass(frozen=True, slots=True)
class Side(Cell):
    """One of the two pictures in a row: `train[17].jpg_0`."""

    @property
    def name(self) -> str:
        return f"{self.rows.split}[{self.row}].{self.rows.column}"

    def __str__(self) -> str:
        return self.name


def read_rows(dataset: "Dataset", split: str, config: DataConfig) -> Listing:
    """The rows in which one picture was preferred; their pictures stay where they are until they are asked for."""
    needed = (*PICTURES, LABELS[0], CAPTION)
    absent = [name for name in needed if name not in dataset.features]
    if absent:
        has = ", ".join(map(shown, dataset.features))
        raise ConfigError(f"{shown(config.path)} has no column {absent[0]!r}, but {has}. Pairs are {FORMS}")
    told = [name for name in (*LABELS, HAS_LABEL, CAPTION) if name in dataset.features]
    columns = [Rows(dataset, name, split, root_of(config)) for name in PICTURES]
    records, rejected, aside, row = [], [], [], 0
    for batch in dataset.select_columns(told).with_format(None).iter(ROWS_AT_ONCE):
        for values in zip(*(batch[name] for name in told), strict=True):
            sides, named = [Side(column, row) for column in columns], dict(zip(told, values, strict=True))
            file_row(sides, named, records, rejected, aside)
            row += 1
    if not row:
        raise ConfigError(f"{shown(config.path)} has no rows in {split}")
    ties = sum(why == TIE for _, why in aside)
    log.info(
        "%s: %d rows of %s, of which %d are pairs; left out: %d ties and %d without a label",
        shown(config.path),
        row,
        split,
        len(records),
        ties,
        len(aside) - ties,
    )
    return Listing(Path(config.path), tuple(records), aside=tuple(aside), rejected=tuple(rejected))


def file_row(
    sides: list[Side], values: dict[str, Any], records: list[Record], rejected: list[Told], aside: list[Told]
) -> None:
    """Puts a row where it belongs."""
    caption, first = (values[CAPTION] or "").strip(), preferred(values)
    if first is None or first == TIE:
        aside.append((sides[0], first or UNLABELLED))
    elif wrong := unfit((caption,)):
        rejected.append((sides[0], wrong))
    else:
        records.append(Record(sides[first], caption, rejected=sides[1 - first]))


def preferred(values: dict[str, Any]) -> int | str | None:
    """Which picture of a row was preferred, 0 or 1, TIE, or None where it has no label."""
    first = values[LABELS[0]]
    if first is None or math.isnan(first) or values.get(HAS_LABEL) is False:
        return None
    second = values.get(LABELS[1])
    second = 1 - first if second is None or math.isnan(second) else second
    return TIE if first == second else int(second > first)
