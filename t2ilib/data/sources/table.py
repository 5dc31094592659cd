"""metadata.jsonl, .csv and .parquet, read strictly: a row that is not whole is an error, not something near to what was meant.

Python's readers are lenient (a short CSV row ends in None, a JSON key that comes twice has its last value), and what they make of
a mistake would be trained on. Of Parquet only the columns that count are read, for it may hold pictures too.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from t2ilib.config import ConfigError, DataConfig
from t2ilib.data.sources.emphasis import as_repeats, as_weight
from t2ilib.text import read_text, shown

TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""The first that is there counts."""
FILE_NAME, TEXT, SCENE = "file_name", "text", "scene"
"""The columns, where `data.image_column` and `data.caption_column` name no others."""
LISTED = 10


def read_table(path: Path, config: DataConfig) -> list[tuple[int, dict[str, Any]]]:
    """The rows of a table, each with its number (from 1, without the header).

    In all of them the picture's column holds text, the captions' text or a list of it, the mask's text or None; numbers are numbers,
    or None where nothing is written. Raises ConfigError that lists what is wrong with it.
    """
    read = {".jsonl": read_jsonl, ".csv": read_csv, ".parquet": lambda path: read_parquet(path, config)}[path.suffix]
    rows, mistakes = [], {}
    for number, row in enumerate(read(path), 1):
        wrong = row if isinstance(row, str) else missing_column(row, config) or unreadable_value(row, config)
        if wrong:
            mistakes.setdefault(wrong, []).append(number)
        else:
            rows.append((number, row))
    raise_mistakes(path, mistakes)
    return rows


def raise_mistakes(path: Path, mistakes: Mapping[str, Sequence[int]]) -> None:
    """Raises ConfigError that lists what is wrong, each with the numbers of the rows that have it; nothing where nothing is."""
    if mistakes:
        lines = [f"row {told[0]} {wrong}{and_others(len(told) - 1)}" for wrong, told in mistakes.items()]
        more = [f"... and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
        raise ConfigError(f"{shown(path)}, " + "\n  ".join(lines[:LISTED] + more))


def and_others(count: int) -> str:
    return f"; so {'has' if count == 1 else 'have'} {count} other row{'s' * (count > 1)}" if count else ""


def missing_column(row: Any, config: DataConfig) -> str | None:
    """What to say of a row in which a column holds no text."""
    found = ", ".join(map(shown, row)) if isinstance(row, dict) else type(row).__name__
    for column, several in ((config.image_column or FILE_NAME, False), (config.caption_column or TEXT, True)):
        value = row.get(column) if isinstance(row, dict) else None
        texts = value if several and isinstance(value, list) else [value]
        if not texts or not all(isinstance(text, str) for text in texts):
            return f"has no text in {column!r} (it has {found}): set data.image_column and data.caption_column"
    for field in ("mask_column", "weight_column", "repeat_column"):
        column = getattr(config, field)
        if column is not None and column not in row:
            return f"has no {column!r} (it has {found}): set data.{field}, or leave it out"
    return None


def unreadable_value(row: dict[str, Any], config: DataConfig) -> str | None:
    """What to say of a row whose mask or numbers cannot be meant; otherwise they are made what they say."""
    if config.mask_column:
        row[config.mask_column] = row[config.mask_column] or None
        if not isinstance(row[config.mask_column], str | None):
            return f"has no file name in {config.mask_column!r}: write one, or nothing where there is no mask"
    for column, convert in ((config.weight_column, as_weight), (config.repeat_column, as_repeats)):
        if column:
            try:
                row[column] = convert(row[column])
            except ValueError as error:
                return f"has a mistake in {column!r}: {error}"
    return None


def read_jsonl(path: Path) -> Iterator[Any]:
    """One JSON value a line; lines are cut at \\n alone, for JSON may hold other separators."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line, object_pairs_hook=each_once, parse_constant=no_number)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{shown(path)}, line {number} is not JSON: {error}") from None


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def read_csv(path: Path) -> Iterator[dict[str, str] | str]:
    """Rows by the names of the header, or what is wrong with a row; blank lines are none."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        header = next(reader, [])
        check_header(path, header)
        for row in reader:
            if len(row) > len(header):
                yield "has more fields than the header: put captions with commas in quotes"
            elif row and len(row) < len(header):
                yield f"has fewer fields than the header ({len(row)} of {len(header)}): write all, empty ones too"
            elif row:
                yield dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise ConfigError(f"{shown(path)}, line {reader.line_num} is not CSV: {error}") from None


def check_header(path: Path, header: list[str]) -> None:
    """Raises ConfigError for columns that cannot be told apart, and for another separator than the comma."""
    unnamed = [number for number, name in enumerate(header, 1) if not name.strip()]
    if unnamed:
        raise ConfigError(f"{shown(path)}: column {unnamed[0]} of the header has no name: name it, or take it out")
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise ConfigError(f"{shown(path)}: the header has {twice[0]!r} twice: take one of the columns out")
    separator = next((mark for mark in ";\t|" if len(header) == 1 and mark in header[0]), None)
    if separator:
        raise ConfigError(f"{shown(path)}: its fields are separated by {separator!r}: save it with commas")


def read_parquet(path: Path, config: DataConfig) -> Iterator[dict[str, Any]]:
    """Rows of the columns that `config` names."""
    import pyarrow
    from pyarrow import parquet

    named = {
        "data.image_column": config.image_column or FILE_NAME,
        "data.caption_column": config.caption_column or TEXT,
        "data.mask_column": config.mask_column,
        "data.weight_column": config.weight_column,
        "data.repeat_column": config.repeat_column,
    }
    try:
        with parquet.ParquetFile(path) as file:
            there = file.schema_arrow.names
            check_header(path, there)
            for field, column in named.items():
                if column is not None and column not in there:
                    raise ConfigError(
                        f"{shown(path)} has no column {column!r} (it has {', '.join(map(shown, there))}): set {field}"
                    )
            for batch in file.iter_batches(columns=[name for name in there if name in (*named.values(), SCENE)]):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{shown(path)} is not Parquet that can be read: {error}") from None
