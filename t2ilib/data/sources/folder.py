"""An image folder as people keep them: metadata.jsonl or metadata.csv, or a .txt caption beside each picture.

Hugging Face's `imagefolder` layout, so a data set made for other trainers works as it is. Whatever is wrong with the
folder is told in one error: captions without a picture, pictures without a caption, a column that is not there.
"""

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from t2ilib.config import ConfigError, DataConfig
from t2ilib.seeds import seed_for

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Record:
    """One captioned picture on disk. `scene` is what it truly shows, for drawn pictures."""

    path: Path
    caption: str
    scene: dict[str, str] | None = field(default=None, compare=False)


def load(config: DataConfig) -> tuple[list[Record], list[Record]]:
    """Training and held-out records of `config.path`; held out by their names' hashes, so adding a picture moves no
    other (unless the share holds out none, and the one with the smallest hash stands in)."""
    if config.path is None:
        raise ConfigError("data.path is missing: give the folder with your pictures and captions")
    records = read_folder(Path(config.path), config)
    if config.validation_path is not None:
        return records, read_folder(Path(config.validation_path), config)
    place = {record: seed_for(0, "held out", record.path.name) / 2**63 for record in records}
    held_out = {record for record in records if place[record] < config.validation_share}
    if config.validation_share and not held_out:
        held_out = {min(records, key=place.__getitem__)}
    training = [record for record in records if record not in held_out]
    if not training:
        raise ConfigError(
            f"data.path {config.path}: {len(records)} picture(s) leave none to train on; add pictures or set data.validation_path"
        )
    return training, [record for record in records if record in held_out]


def read_folder(folder: Path, config: DataConfig) -> list[Record]:
    """The records of one folder, in name order; raises ConfigError for an unusable folder. Pictures are not opened here."""
    if not folder.is_dir():
        raise ConfigError(f"data.path {folder} is not a folder")
    rows = read_rows(folder, config)
    records = [
        Record(folder / row[config.image_column], str(row[config.caption_column]).strip(), row.get("scene"))
        for row in rows
    ]
    outside = [record.path for record in records if not record.path.resolve().is_relative_to(folder.resolve())]
    if outside:
        raise ConfigError(f"{folder}: pictures must lie in the folder itself, {outside[0]} does not")
    blank = [record.path.name for record in records if not record.caption]
    if blank:
        raise ConfigError(
            f"{folder}: {len(blank)} picture(s) have an empty caption, the first is {blank[0]}: write one or take them out"
        )
    return sorted(records, key=lambda record: record.path.name)


def read_rows(folder: Path, config: DataConfig) -> list[dict[str, Any]]:
    if (folder / "metadata.jsonl").exists():
        source, rows = folder / "metadata.jsonl", []
        for number, line in enumerate(source.read_text(encoding="utf-8-sig").split("\n"), 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except json.JSONDecodeError as error:
                raise ConfigError(f"{source}, line {number} is not JSON: {error}") from None
    elif (folder / "metadata.csv").exists():
        source = folder / "metadata.csv"
        with source.open(newline="", encoding="utf-8-sig") as lines:
            rows = list(csv.DictReader(lines))
    else:
        source = folder
        pictures = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
        bare = [path.name for path in pictures if not path.with_suffix(".txt").exists()]
        if bare:
            raise ConfigError(
                f"{folder} has no metadata.jsonl or metadata.csv, and {len(bare)} of {len(pictures)} pictures have no .txt"
                f" caption beside them, the first is {bare[0]}"
            )
        rows = [
            {config.image_column: p.name, config.caption_column: p.with_suffix(".txt").read_text(encoding="utf-8-sig")}
            for p in pictures
        ]
    if not rows:
        raise ConfigError(f"{source} lists no picture")
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict) and None in row:
            raise ConfigError(
                f"{source}, row {number} has more fields than the header: put captions with commas in quotes"
            )
        for column in (config.image_column, config.caption_column):
            if not isinstance(row, dict) or not isinstance(row.get(column), str):
                found = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
                raise ConfigError(
                    f"{source}, row {number} has no text in {column!r} (it has {found}): set data.image_column and data.caption_column"
                )
    return rows
