"""What each single picture measured: a run's `rows.jsonl`, a line for each step, group of prompts and prompt.

A metric of a run is a mean over its pictures; its rows say over which. They are what the noise of prompts can be told
from, and what the report pairs two variants by: the same prompt from the same noise. Imports no torch.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from t2ilib.config import ConfigError
from t2ilib.text import write_whole

ROWS = "rows.jsonl"
Value = float | Sequence[float | None]
"""Of a metric: one number for all pictures, or one for each, None for a picture that it is not about."""


@dataclass(frozen=True)
class Row:
    """One picture: the `step` of the weights that drew it, its `number` in its `group` of prompts, and metric -> value."""

    step: int
    group: str
    number: int
    prompt: str
    values: Mapping[str, float]


def split(
    values: Mapping[str, Value], step: int, group: str, prompts: Sequence[str]
) -> tuple[dict[str, float], list[Row]]:
    """The metrics of a group as numbers, means over its pictures where they are of single pictures, and its rows. A metric
    that is about none of the pictures is left out. Raises ConfigError where there is not one value for each picture."""
    each = {name: list(value) for name, value in values.items() if not isinstance(value, float | int | np.number)}
    if uneven := [name for name, value in each.items() if len(value) != len(prompts)]:
        raise ConfigError(
            f"{uneven[0]} has {len(each[uneven[0]])} values for {len(prompts)} pictures: give one for each, None for a picture"
            " that it is not about, or one number for all"
        )
    known = {name: [float(value) for value in column if value is not None] for name, column in each.items()}
    means = {name: float(np.mean(known[name])) if name in each else float(values[name]) for name in values if known.get(name, True)}  # fmt: skip
    rows = [
        Row(step, group, i, prompt, {name: float(column[i]) for name, column in each.items() if column[i] is not None})
        for i, prompt in enumerate(prompts)
    ]
    return means, rows


def write_rows(folder: Path, rows: Iterable[Row]) -> None:
    """Writes the rows of a run, in place of those of the same steps that its folder has."""
    rows = list(rows)
    steps = {row.step for row in rows}
    kept = [row for row in read_rows(folder) if row.step not in steps]
    lines = [json.dumps(vars(row), ensure_ascii=False) for row in sorted((*kept, *rows), key=lambda row: row.step)]
    write_whole(folder / ROWS, "".join(f"{line}\n" for line in lines))


def read_rows(folder: Path) -> Iterator[Row]:
    """The rows of a run, none where its folder has no file of them. Raises ConfigError for a line that is none."""
    path = folder / ROWS
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else (), start=1):
        try:
            yield Row(**json.loads(line))
        except (json.JSONDecodeError, TypeError) as error:
            raise ConfigError(f"{path}, line {number} is no row of a run: {error}") from None
