"""metadata.jsonl and metadata.csv, read strictly: a row that is not whole is an error, not something near to what was meant.

Python's readers are lenient (a short CSV row ends in None, a JSON key that comes twice has its last value), and what they make of
a mistake would be trained on.
"""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from t2ilib.config import ConfigError, DataConfig
from t2ilib.text import read_text, shown

TABLES = ("metadata.jsonl", "metadata.csv")
"""The first that is there counts."""
LISTED = 10


def read_table(path: Path, config: DataConfig) -> list[tuple[int, dict[str, Any]]]:
    """The rows of a table, each with its number (from 1, without the header); both columns of `config` hold text in all.

    Raises ConfigError that lists what is wrong with it.
    """
    read = read_jsonl if path.suffix == ".jsonl" else read_csv
    rows, mistakes = [], {}
    for number, row in enumerate(read(path), 1):
        wrong = row if isinstance(row, str) else missing_column(row, config)
        if wrong:
            mistakes.setdefault(wrong, []).append(number)
        else:
            rows.append((number, row))
    if mistakes:
        lines = [f"row {told[0]} {wrong}{and_others(len(told) - 1)}" for wrong, told in mistakes.items()]
        more = [f"... and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
        raise ConfigError(f"{shown(path)}, " + "\n  ".join(lines[:LISTED] + more))
    return rows


def and_others(count: int) -> str:
    return f"; so {'has' if count == 1 else 'have'} {count} other row{'s' * (count > 1)}" if count else ""


def missing_column(row: Any, config: DataConfig) -> str | None:
    """What to say of a row in which a column holds no text."""
    for column in (config.image_column, config.caption_column):
        if not isinstance(row, dict) or not isinstance(row.get(column), str):
            found = ", ".join(map(shown, row)) if isinstance(row, dict) else type(row).__name__
            return f"has no text in {column!r} (it has {found}): set data.image_column and data.caption_column"
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
