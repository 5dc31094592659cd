"""Where the pictures of a published data set lie, a folder or a zip as downloaded, matched with captions by picture name.

For data sets whose captions are one file apart from the pictures. Both sides are compared: a caption whose picture is not there and a
picture without a caption are told, each picture once.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from t2ilib.config import ConfigError, DataConfig
from t2ilib.data.records import Listing, Readable, Record, Told
from t2ilib.data.sources.archived import LEADS_OUT, open_zip
from t2ilib.data.sources.emphasis import emphasised
from t2ilib.data.sources.files import OUTSIDE, is_picture, near, walk
from t2ilib.text import shown

COLUMNS = ("image_column", "caption_column", "mask_column", "weight_column", "repeat_column")
"""Fields of tables, which data sets of a form of their own have no use for."""


@dataclass(frozen=True)
class Place:
    """Pictures by the names that captions give them, and what else lies there; `refused` what lies there and is not taken."""

    at: Path
    pictures: dict[str, Readable]
    others: tuple[Readable, ...] = ()
    hidden: tuple[Readable, ...] = ()
    refused: Mapping[str, Told] = field(default_factory=dict)

    def find(self, name: str) -> Readable | str:
        """The picture, or the reason why there is none."""
        if name in self.pictures:
            return self.pictures[name]
        if not name.strip():
            return "names no picture"
        if LEADS_OUT.match(name):
            return OUTSIDE
        other = self.near.get(near(name))
        return f"missing; there is {shown(other)}: write its name as it is" if other else "missing"

    @cached_property
    def near(self) -> dict[str, str]:
        return {near(name): name for name in self.pictures}


def folder_of(config: DataConfig, what: str) -> Path:
    """`config.path` as a folder that is there; raises ConfigError."""
    if config.path is None:
        raise ConfigError(f"data.path is missing: give the folder with {what}")
    folder = Path(config.path)
    if not folder.is_dir():
        raise ConfigError(f"data.path {shown(folder)} is not a folder: give the one with {what}")
    return folder


def refuse(config: DataConfig, fields: Iterable[str], why: str) -> None:
    """Raises ConfigError for a field that is set and would be without effect."""
    for name in fields:
        if getattr(config, name) != DataConfig.model_fields[name].default:
            raise ConfigError(f"data.{name} has no effect with data.source {config.source}, {why}: leave it out")


def in_folder(folder: Path) -> Place:
    files, hidden, rejected = walk(folder)
    pictures, others = {}, []
    for path in files:
        if is_picture(path):
            pictures[path.relative_to(folder).as_posix()] = path
        else:
            others.append(path)
    refused = {path.relative_to(folder).as_posix(): (path, reason) for path, reason in rejected}
    return Place(folder, pictures, tuple(others), tuple(hidden), refused)


def in_zip(path: Path, top: str) -> Place:
    """`top` is the folder in the archive, if it has one, from which names count."""
    archive, pictures, others = open_zip(path), {}, []
    for inside, member in archive.members.items():
        if is_picture(Path(inside)):
            pictures[inside.removeprefix(f"{top}/")] = member
        else:
            others.append(member)
    refused = {inside.removeprefix(f"{top}/"): told for inside, told in archive.refused.items()}
    return Place(path, pictures, tuple(others), archive.hidden, refused)


def matched(
    folder: Path,
    place: Place,
    captions: Mapping[str, Sequence[str]],
    table: Readable,
    rejected: Iterable[Told],
    config: DataConfig,
) -> Listing:
    """Records in the order of names. `captions`: of each picture that `table` names, perhaps none, all of them fit; `rejected`: what of it cannot be
    used for other reasons."""
    records, names, rejected, refused = [], [], [*rejected], {**place.refused}
    uncaptioned = f"has no caption in {shown(table.name)}"
    for name in sorted(captions):
        texts, path = captions[name], place.find(name)
        if isinstance(path, str):
            lost = f", and its {len(texts)} caption{'s' * (len(texts) != 1)} with it" if texts else ""
            rejected.append(refused.pop(name, (place.at / name, f"{path}{lost} ({shown(table.name)} names it)")))
        elif not texts:
            rejected.append((path, uncaptioned))
        else:
            records.append(Record(path, texts[0], more=tuple(texts[1:])))
            names.append(name)
    rejected += [(path, uncaptioned) for name, path in place.pictures.items() if name not in captions]
    rejected += refused.values()
    if not records and not rejected:
        raise ConfigError(f"{shown(place.at)} has no picture, and {shown(table.name)} names none")
    records = emphasised(records, names, folder, config) if records else records
    aside = [(path, "neither a picture nor a caption") for path in place.others if path != table]
    return Listing(folder, tuple(records), (table,), place.hidden, tuple(aside), tuple(rejected))
