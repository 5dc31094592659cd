"""Data sets as Hugging Face's `datasets` reads them: an id of the Hub, a folder of `save_to_disk`, of Parquet, JSON or pictures, or a
single file of these kinds.

The index holds captions and row numbers; pictures stay in the Arrow files, mapped to memory, until they are asked for. Columns are
named, or found by type and by the usual names, and the log says which. No code of a data set is run: `datasets` has had no way to
since its version 4. Its bars, warnings and counting of downloads are kept off.
"""

import contextlib
import functools
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2ilib.config import ConfigError, DataConfig
from t2ilib.config.mistakes import check_choice
from t2ilib.data.records import Listing, Record
from t2ilib.data.sources.archived import Member, open_zip
from t2ilib.data.sources.columns import Columns, find_columns
from t2ilib.data.sources.emphasis import as_repeats, as_weight
from t2ilib.data.sources.files import OUTSIDE
from t2ilib.data.sources.places import refuse
from t2ilib.data.sources.table import TABLES
from t2ilib.data.sources.wording import unfit
from t2ilib.text import shown

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
IN_ZIP = re.compile(r"zip://(?P<inside>.+)::(?P<archive>(?!\w+://).+)", re.DOTALL)
"""How `datasets` names pictures of a zip on this machine."""
READERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".arrow": "arrow"}
"""Endings of single files that are data sets."""
ROWS_AT_ONCE = 1000
LISTED = 10


class Rows:
    """A column of pictures, or of masks. `root`: the local folder that relative paths in it count from, where there is one."""

    def __init__(self, dataset: "Dataset", column: str, split: str, root: Path | None) -> None:
        import datasets

        pictures = dataset.select_columns([column]).with_format(None)
        if isinstance(pictures.features[column], datasets.Image):
            pictures = pictures.cast_column(column, datasets.Image(decode=False))
        self.pictures, self.column, self.split, self.root = pictures, column, split, root


@dataclass(frozen=True, slots=True)
class Cell:
    """A picture in a row, counted from 0 as `datasets` does: `train[17]`."""

    rows: Rows
    row: int

    @property
    def name(self) -> str:
        return f"{self.rows.split}[{self.row}]"

    @property
    def parent(self) -> str:
        return shown(self.rows.root or self.rows.split)

    def __str__(self) -> str:
        return self.name

    def read_bytes(self) -> bytes:
        """Raises FileNotFoundError where the row has no picture, and ValueError for one that lies where it is not read."""
        value = self.rows.pictures[self.row][self.rows.column]
        return bytes_in(value, self.rows.root, self)


def bytes_in(value: Any, root: Path | None, cell: object) -> bytes:
    """The bytes of a picture as a row has it; raises as `Cell.read_bytes` does."""
    if isinstance(value, Mapping):
        value = value["path"] if value.get("bytes") is None else value["bytes"]
    if value is None:
        raise FileNotFoundError(f"{cell} holds no picture")
    if isinstance(value, bytes):
        return value
    if zipped := IN_ZIP.fullmatch(value):
        return member_of(Path(zipped["archive"]), zipped["inside"]).read_bytes()
    if "://" in value:
        raise ValueError(f"{value} is not fetched: download the pictures first")
    path = Path(value)
    if not path.is_absolute():
        if root is None or not (root / path).resolve().is_relative_to(root.resolve()):
            raise ValueError(f"{value} {OUTSIDE}")
        path = root / path
    return path.read_bytes()


def member_of(archive: Path, inside: str) -> Member:
    found = opened(archive)
    if inside in found.refused:
        raise ValueError(f"{inside} {found.refused[inside][1]}")
    if inside not in found.members:
        raise FileNotFoundError(f"{inside} is not in {archive}")
    return found.members[inside]


opened = functools.lru_cache(maxsize=64)(open_zip)
"""Once a process: a large archive's list of contents takes seconds."""


def load(config: DataConfig) -> Listing:
    """The rows of `config.split`, in their order; `train` without it. Raises ConfigError."""
    if config.streaming:
        raise ConfigError("data.streaming is for training: leave it out, and all rows are told at once")
    parts, split = choose_rows(config, load_parts)
    dataset = parts[split]
    columns = find_columns(dataset.features, config)
    log.info(
        "%s: %d rows of %s (there %s %s); %s",
        shown(config.path),
        len(dataset),
        split,
        "is" if len(parts) == 1 else "are",
        ", ".join(parts),
        columns,
    )
    if any((Path(config.path) / table).is_file() for table in TABLES):
        log.warning(
            "%s: `datasets` leaves out pictures that no row names, and says nothing; data.source: folder reads this folder too,"
            " and tells every file",
            shown(config.path),
        )
    return read_rows(dataset, columns, split, config)


def choose_rows(config: DataConfig, load: Callable[[DataConfig], dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """What `load` gives of `config.path`, and which part of it is meant. Raises ConfigError."""
    refuse(
        config,
        ("weights", "repeats", "folder_repeats"),
        "whose rows lie in no subfolders (data.weight_column and data.repeat_column name columns)",
    )
    if config.path is None:
        raise ConfigError("data.path is missing: give the id of a data set on the Hub (owner/name), or a local folder")
    parts = load(config)
    return parts, choose_part([*parts], config)


def load_parts(config: DataConfig, streaming: bool = False) -> dict[str, Any]:
    """The parts of a data set by name, `Dataset`s or, as streams, `IterableDataset`s; raises ConfigError that says what can be done."""
    path, options = config.path, {"name": config.subset, "revision": config.revision, "streaming": streaming}
    with quiet() as datasets:
        place = Path(path)
        try:
            if any((place / name).is_file() for name in ("dataset_dict.json", "state.json")):
                found = datasets.load_from_disk(path)
            elif place.is_file() and place.suffix.lower() in READERS:
                found = datasets.load_dataset(READERS[place.suffix.lower()], data_files=path, **options)
            elif place.is_dir() or (HUB_ID.fullmatch(path) and not place.exists()):
                found = datasets.load_dataset(path, **options)
            else:
                raise ConfigError(
                    f"data.path {shown(path)} is no folder, no file of {', '.join(READERS)}, and no id of the Hub"
                    " (owner/name)"
                )
        except ConfigError:
            raise
        except Exception as error:  # what its many readers meet, of which each has errors of its own
            raise ConfigError(f"data.path {shown(path)} {refusal(error, place)}") from error
    if isinstance(found, datasets.Dataset):
        found = {str(found.split or "train"): found}
    parts = dict(found)
    if streaming:
        parts = {
            name: part.to_iterable_dataset() if isinstance(part, datasets.Dataset) else part
            for name, part in parts.items()
        }
    return parts


def refusal(error: Exception, place: Path) -> str:
    """What to say of a data set that `datasets` does not load."""
    import datasets

    told = shown(error.__cause__ or error).strip()
    if "scripts are no longer supported" in told:
        return "is a Python script, and no code of data sets is run: save its rows as Parquet, and give that folder"
    if "Config name is missing" in told:
        names = re.search(r"\[.*\]", told)
        return f"has several subsets {names[0] if names else ''}: name one as data.subset"
    if isinstance(error, ConnectionError) and datasets.config.HF_HUB_OFFLINE:
        return "is not in the local cache, and HF_HUB_OFFLINE=1 forbids fetching it: unset that, or give a local folder"
    if isinstance(error, ConnectionError):
        return f"cannot be fetched ({told}): connect, or give a local folder"
    if isinstance(error, datasets.exceptions.DatasetNotFoundError) and not place.exists():
        return "does not exist on the Hub, or is private or gated (then `hf auth login`); or give a local folder"
    hint = "; data.source: folder reads folders of pictures and tells every file" if place.is_dir() else ""
    return f"cannot be loaded ({type(error).__name__}: {told.splitlines()[0] if told else 'without a word'}){hint}"


def choose_part(parts: list[str], config: DataConfig) -> str:
    if config.split is None and len(parts) == 1:
        return parts[0]
    if config.split is None and "train" not in parts:
        raise ConfigError(f"data.split is missing: {shown(config.path)} has {', '.join(parts)}, and no train")
    return check_choice(config.split or "train", parts, f"data.split of {shown(config.path)}:")


def read_rows(dataset: "Dataset", columns: Columns, split: str, config: DataConfig) -> Listing:
    place, root = Path(config.path), root_of(config)
    pictures = Rows(dataset, columns.image, split, root)
    masks = Rows(dataset, columns.mask, split, root) if columns.mask else None
    has_mask = filled(dataset, columns.mask) if columns.mask else []
    records, rejected, mistakes, prompted = [], [], [], 0
    for row, (value, weight, repeats) in enumerate(values_of(dataset, columns)):
        cell = Cell(pictures, row)
        captions, from_prompt = captions_of(value, config)
        prompted += from_prompt
        if wrong := why_unfit(captions):
            rejected.append((cell, wrong))
            continue
        try:
            weight, repeats = as_weight(weight), as_repeats(repeats)
        except ValueError as error:
            mistakes.append(f"{cell}: {error}")
            continue
        mask = Cell(masks, row) if masks and has_mask[row] else None
        weight = 1.0 if weight is None else weight
        records.append(Record(cell, captions[0], None, captions[1:], mask, weight, repeats or 1))
    if mistakes:
        more = [f"... and {len(mistakes) - LISTED} more"] if len(mistakes) > LISTED else []
        raise ConfigError(f"{shown(config.path)}, " + "\n  ".join(mistakes[:LISTED] + more))
    if not records and not rejected:
        raise ConfigError(f"{shown(config.path)} has no rows in {split}")
    if prompted:
        log.info("%s: %d rows take data.prompt as their caption: %s", shown(config.path), prompted, config.prompt)
    return Listing(place, tuple(records), rejected=tuple(rejected))


def root_of(config: DataConfig) -> Path | None:
    """The local folder that relative paths in a data set count from, where there is one."""
    place = Path(config.path)
    return place if place.is_dir() else place.parent if place.is_file() else None


def captions_of(value: Any, config: DataConfig) -> tuple[tuple[str, ...], bool]:
    """The captions of a row, and whether they are `config.prompt` for want of any."""
    texts = [value] if isinstance(value, str) else [text or "" for text in value or ()]
    prompted = not texts and config.prompt is not None
    return tuple(text.strip() for text in ([config.prompt] if prompted else texts)), prompted


def why_unfit(captions: tuple[str, ...]) -> str | None:
    return unfit(captions) if captions else "has no caption (data.prompt is one for those that have none)"


def values_of(dataset: "Dataset", columns: Columns) -> Iterator[tuple[Any, Any, Any]]:
    """Captions, weight and repeats of each row; None where there is no such column."""
    wanted = (columns.caption, columns.weight, columns.repeat)
    there = [column for column in wanted if column]
    if not there:
        yield from ((None, None, None) for _ in range(len(dataset)))
        return
    for batch in dataset.select_columns(list(dict.fromkeys(there))).with_format(None).iter(ROWS_AT_ONCE):
        size = len(batch[there[0]])
        yield from zip(*(batch[column] if column else [None] * size for column in wanted), strict=True)


def filled(dataset: "Dataset", column: str) -> list[bool]:
    """Which rows of a column of pictures have one; their bytes are not read."""
    import pyarrow

    found = []
    for batch in dataset.select_columns([column]).with_format("arrow").iter(ROWS_AT_ONCE):
        for chunk in batch.column(0).chunks:
            fields = chunk.flatten() if pyarrow.types.is_struct(chunk.type) else [chunk]
            found += [any(there) for there in zip(*(field.is_valid().to_pylist() for field in fields), strict=True)]
    return found


@contextlib.contextmanager
def quiet() -> Iterator[Any]:
    """The module `datasets`, for as long as it is kept off the screen and from counting downloads."""
    import datasets
    import huggingface_hub

    level, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    hub_level, hub_bars = huggingface_hub.logging.get_verbosity(), huggingface_hub.utils.are_progress_bars_disabled()
    counting = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.logging.set_verbosity(logging.CRITICAL)
    huggingface_hub.logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield datasets
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counting
        datasets.logging.set_verbosity(level)
        huggingface_hub.logging.set_verbosity(hub_level)
        if not bars:
            datasets.enable_progress_bars()
        if not hub_bars:
            huggingface_hub.utils.enable_progress_bars()
