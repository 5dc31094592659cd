"""Rows of a Hugging Face data set from front to back, as `datasets` streams them: nothing is downloaded, prepared or kept as a whole.

Columns are found, and captions read, as of the whole data set (`huggingface`). A place in it is a row's number and what `datasets` says of
its own state there, with which it goes on in the middle of a file without reading those before (seen with 5.2.0, for Parquet, CSV, JSON,
folders and zips of pictures, Arrow and shards). Leaves out shuffling and repeats.
"""

import errno
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2ilib.config import ConfigError, DataConfig
from t2ilib.data.records import Cursor, Listing, Record
from t2ilib.data.sources.columns import Columns, find_columns
from t2ilib.data.sources.emphasis import as_weight
from t2ilib.data.sources.huggingface import bytes_in, captions_of, choose_rows, load_parts, why_unfit
from t2ilib.data.sources.spans import read_whole
from t2ilib.text import shown

if TYPE_CHECKING:
    from datasets import IterableDataset

log = logging.getLogger(__name__)

FETCHED = ("hf",)
"""Protocols of pictures' own files that are fetched: those by which `datasets` names files of the Hub."""


@dataclass(frozen=True, slots=True, eq=False)
class RowPicture:
    """A picture as its row has it: its bytes, or where its file lies. `parent`: the data set."""

    name: str
    parent: str
    value: Any
    root: Path | None

    def __str__(self) -> str:
        return self.name

    def read_bytes(self) -> bytes:
        """Raises as `huggingface.Cell` does, and `spans.Unanswered` for one of the Hub that may come another time."""
        value = self.value
        path = value.get("path") if isinstance(value, Mapping) and value.get("bytes") is None else None
        if path is not None and path.rpartition("::")[2].partition("://")[0] in FETCHED and "://" in path:
            return read_whole(path)
        return bytes_in(value, self.root, self)


@dataclass(frozen=True)
class RowStream:
    """The rows of `split`."""

    config: DataConfig
    dataset: "IterableDataset"
    columns: Columns
    split: str
    hint: str = ""

    @property
    def folder(self) -> Path:
        return Path(self.config.path)

    def read(self, cursor: Cursor | None = None) -> Iterator[tuple[Listing, Cursor]]:
        rows, number = self.rows(), 0
        if cursor is not None:
            rows.load_state_dict(cursor["state"])
            number = cursor["row"]
        coming = iter(rows)
        while True:
            try:
                row = next(coming)
            except StopIteration:
                return
            except Exception as error:  # what its many readers, and connections, meet
                told = shown(error.__cause__ or error).strip() or type(error).__name__
                raise OSError(errno.EIO, f"row {number} cannot be read ({told})", shown(self.folder)) from error
            listing, number = self.listing(number, row), number + 1
            yield listing, {"row": number, "state": rows.state_dict()}

    def rows(self) -> "IterableDataset":
        """The data set anew, for a place of its own; its pictures stay bytes and paths."""
        import datasets

        columns = self.columns
        there = [name for name in (columns.image, columns.caption, columns.mask, columns.weight) if name]
        rows = self.dataset.select_columns(list(dict.fromkeys(there)))
        for name in (columns.image, columns.mask):
            if name and isinstance((rows.features or {}).get(name), datasets.Image):
                rows = rows.cast_column(name, datasets.Image(decode=False))
        return rows

    def listing(self, number: int, row: Mapping[str, Any]) -> Listing:
        columns, place = self.columns, self.folder
        root = place if place.is_dir() else place.parent if place.is_file() else None
        picture = RowPicture(f"{self.split}[{number}]", shown(place), row[columns.image], root)
        captions, _ = captions_of(row[columns.caption] if columns.caption else None, self.config)
        wrong = why_unfit(captions)
        try:
            weight = as_weight(row[columns.weight]) if columns.weight else None
        except ValueError as error:
            wrong = wrong or f"its weight: {error}"
        if wrong:
            return Listing(place, rejected=((picture, wrong),))
        mask = row[columns.mask] if columns.mask else None
        if mask is None or (isinstance(mask, Mapping) and mask.get("bytes") is None and mask.get("path") is None):
            masked = None
        else:
            masked = RowPicture(f"{picture.name} {columns.mask}", picture.parent, mask, root)
        weight = 1.0 if weight is None else weight
        return Listing(place, (Record(picture, captions[0], None, captions[1:], masked, weight),))


def open_stream(config: DataConfig) -> RowStream:
    """The rows of `config.split`, in their order; `train` without it. Raises ConfigError."""
    parts, split = choose_rows(config, partial(load_parts, streaming=True))
    features = features_of(parts[split], config)
    stream = RowStream(config, parts[split], find_columns(features, config), split)
    log.info(
        "%s: a stream of %s (there %s %s); %s",
        shown(config.path),
        split,
        "is" if len(parts) == 1 else "are",
        ", ".join(parts),
        stream.columns,
    )
    return stream


def features_of(dataset: "IterableDataset", config: DataConfig) -> Mapping[str, Any]:
    """Its columns and their types, which tables without types, such as CSV, tell by their first row."""
    if dataset.features is not None:
        return dataset.features
    import datasets
    import pyarrow

    try:
        first = next(iter(dataset), None)
    except Exception as error:  # as in `RowStream.read`
        raise ConfigError(f"{shown(config.path)} cannot be read ({shown(error).strip()})") from error
    if first is None:
        raise ConfigError(f"{shown(config.path)} has no rows")
    return datasets.Features.from_arrow_schema(pyarrow.Table.from_pylist([first]).schema)
