"""How much each picture counts: the weight of its loss, and how often an epoch shows it.

A row's own number is multiplied by what the subfolder says; of several patterns that match a picture the last one counts. What a
pattern says goes before the number in a subfolder's name, which is read as kohya's trainers do, and only where it is asked for.
"""

import dataclasses
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Any

from t2ilib.config import ConfigError, DataConfig
from t2ilib.config.mistakes import did_you_mean
from t2ilib.data.records import Record
from t2ilib.data.sources.files import composed
from t2ilib.text import shown

log = logging.getLogger(__name__)

COUNTED_FOLDER = re.compile(r"(\d+)_.")
LISTED = 8


def as_weight(value: Any) -> float | None:
    """A number of a table, None where there is none; raises ValueError that says what it must be."""
    if value is None or value == "":
        return None
    try:
        weight = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise ValueError(f"{value!r} is no weight: write a number from 0 up, or nothing for 1")
    return weight


def as_repeats(value: Any) -> int | None:
    if value is None or value == "":
        return None
    try:
        repeats = 0.5 if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        repeats = 0.5
    if not (repeats >= 1 and repeats.is_integer()):
        raise ValueError(f"{value!r} is no number of repeats: write a whole number from 1 up, or nothing for 1")
    return int(repeats)


def emphasised(records: Sequence[Record], paths: Sequence[str], source: object, config: DataConfig) -> list[Record]:
    """Records with what `config` says of their subfolders. `paths`: of each picture in its source, with slashes.

    Raises ConfigError for a pattern that matches no picture.
    """
    paths = [composed(path) for path in paths]
    weights = by_pattern(config.weights, "data.weights", paths, source)
    repeats = by_pattern(config.repeats, "data.repeats", paths, source)
    numbers = [counted_folder(path) for path in paths]
    if config.folder_repeats:
        if not any(numbers):
            raise ConfigError(
                f"data.folder_repeats: {shown(source)} has no subfolder with pictures that is called like 10_cat"
            )
        repeats = [mine or number for mine, number in zip(repeats, numbers, strict=True)]
    elif any(numbers) and not config.repeats:
        name = next(path for path, number in zip(paths, numbers, strict=True) if number).rpartition("/")[0]
        log.info(
            "%s has subfolders such as %s: data.folder_repeats: true shows them so often, otherwise all pictures are"
            " shown once",
            shown(source),
            shown(name),
        )
    found = [
        record
        if weight is None and number is None
        else dataclasses.replace(
            record,
            weight=record.weight * (1.0 if weight is None else weight),
            repeats=record.repeats * (number or 1),
        )
        for record, weight, number in zip(records, weights, repeats, strict=True)
    ]
    shows = sum(record.repeats for record in found)
    if shows > len(found):
        log.info("%s: an epoch shows its %d pictures %d times in all", shown(source), len(found), shows)
    return found


def by_pattern(patterns: Mapping[str, Any], field: str, paths: Sequence[str], source: object) -> list[Any]:
    """For each path the value of the last pattern that matches it, else None."""
    values: list[Any] = [None] * len(paths)
    for pattern, value in patterns.items():
        matching = [index for index, path in enumerate(paths) if matches(composed(pattern), path)]
        if not matching:
            there = sorted({folder for path in paths for folder in folders_of(path)})
            names = f" ({', '.join(map(shown, there[:LISTED]))}{', ...' * (len(there) > LISTED)})" if there else ""
            raise ConfigError(
                f"{field}: {pattern!r} matches no picture of {shown(source)}: name a subfolder{names}, or a pattern over"
                f" paths in it, such as cats/*.{did_you_mean(pattern, there)}"
            )
        for index in matching:
            values[index] = value
    return values


def matches(pattern: str, path: str) -> bool:
    """Whether it names one of the folders that a path lies in, by name or by path, or fits the whole path."""
    bare = pattern.strip("/")
    return bare in path.split("/")[:-1] or bare in folders_of(path) or fnmatchcase(path, pattern)


def folders_of(path: str) -> Iterable[str]:
    return list(accumulate(path.split("/")[:-1], "{}/{}".format))


def counted_folder(path: str) -> int | None:
    """The number of the innermost folder that is called like `10_cat`."""
    found = [int(match[1]) for name in path.split("/")[:-1] if (match := COUNTED_FOLDER.match(name))]
    return found[-1] or None if found else None
