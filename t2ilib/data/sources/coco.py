"""COCO's captions (arXiv 1504.00325): `captions_train2017.json`, five captions a picture, with pictures in folders or in the zips as
downloaded.

    annotations/captions_{train,val}2017.json    or in annotations_trainval2017.zip, or beside
    {train,val}2017/                             or images/{train,val}2017/, or {train,val}2017.zip

The years of other releases, and data sets of one's own in this form, are read alike. Of the JSON, which is 90 MB for the training
part, only names and captions are kept while it is parsed: objects as Python has them would take 700 MB.
"""

import json
import logging
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from t2ilib.config import ConfigError, DataConfig
from t2ilib.data.records import Listing, Readable, Told
from t2ilib.data.sources.archived import open_zip
from t2ilib.data.sources.places import COLUMNS, Place, folder_of, in_folder, in_zip, matched, refuse
from t2ilib.data.sources.wording import one_line, unfit
from t2ilib.text import decoded, shown

log = logging.getLogger(__name__)

CAPTIONS = re.compile(r"captions_(.+)\.json")
AS_DOWNLOADED = "`t2ilib data download coco` fetches them"


class Image(NamedTuple):
    id: int | str
    name: str


class Caption(NamedTuple):
    image: int | str
    text: str


def load(config: DataConfig) -> Listing:
    """The pictures of `config.split`: `train`, `val`, or with the year where there are several. Raises ConfigError."""
    refuse(config, (*COLUMNS, "prompt"), "whose captions are in its JSON")
    folder = folder_of(config, "COCO's annotations and pictures")
    part, table = find_captions(folder, config.split or "train")
    captions, rejected = read_captions(table)
    place = find_pictures(folder, part)
    listing = matched(folder, place, captions, table, rejected, config)
    log.info(
        "%s: %d pictures with %d captions, from %s and %s",
        shown(folder),
        len(listing),
        sum(len(record.captions) for record in listing),
        shown(table.name),
        shown(place.at.name),
    )
    return listing


def find_captions(folder: Path, split: str) -> tuple[str, Readable]:
    """The part that a split means, such as `train2017`, and its captions. Raises ConfigError for none and for several."""
    there: dict[str, Readable] = {}
    for place in (folder / "annotations", folder):
        for path in sorted(place.glob("captions_*.json")):
            there.setdefault(path.stem.removeprefix("captions_"), path)
    if not meant(split, there):  # a download that is not whole must not stop what was extracted
        for path in [*sorted(folder.glob("annotations*.zip")), *sorted((folder / "annotations").glob("*.zip"))]:
            for member in open_zip(path).members.values():
                if match := CAPTIONS.fullmatch(member.name):
                    there.setdefault(match[1], member)
    found = meant(split, there)
    if len(found) == 1:
        return found[0], there[found[0]]
    if found:
        raise ConfigError(f"{shown(folder)} has captions of {' and '.join(found)}: set data.split to one of them")
    others = f"there are {', '.join(sorted(there))}: set data.split" if there else AS_DOWNLOADED
    raise ConfigError(
        f"{shown(folder)} has no captions_{shown(split)}*.json, beside or in annotations, nor in annotations*.zip ({others})"
    )


def meant(split: str, parts: Iterable[str]) -> list[str]:
    """The part that is called so, or those whose names begin so."""
    return [split] if split in parts else sorted(part for part in parts if part.startswith(split))


def find_pictures(folder: Path, part: str) -> Place:
    """The first place that is there; raises ConfigError where none is."""
    for place in (folder / part, folder / "images" / part):
        if place.is_dir():
            return in_folder(place)
    for path in (folder / f"{part}.zip", folder / "images" / f"{part}.zip"):
        if path.is_file():
            return in_zip(path, part)
    raise ConfigError(
        f"{shown(folder)} has no pictures of {part}: put them in {part} or images/{part}, or {part}.zip there as it was"
        f" downloaded ({AS_DOWNLOADED})"
    )


def read_captions(table: Readable) -> tuple[dict[str, list[str]], list[Told]]:
    """Captions by picture name, in the file's order, none where a picture has none; and entries that cannot be used."""
    images, annotations = parse(table)
    names: dict[int | str, str] = {}
    captions: dict[str, list[str]] = {}
    rejected: list[Told] = []
    for number, image in enumerate(images, 1):
        if not isinstance(image, Image):
            rejected.append((table, f"entry {number} of images has no file_name that is text, or no id"))
        elif image.id in names:
            rejected.append(
                (table, f"entry {number} of images has the id {image.id}, which another has: {shown(image.name)}")
            )
        elif image.name in captions:
            names[image.id] = image.name
            rejected.append((table, f"entry {number} of images names {shown(image.name)} again"))
        else:
            names[image.id] = image.name
            captions[image.name] = []
    astray: dict[int | str, int] = defaultdict(int)
    for number, caption in enumerate(annotations, 1):
        if not isinstance(caption, Caption):
            rejected.append((table, f"entry {number} of annotations has no caption that is text, or no image_id"))
        elif wrong := unfit([caption.text]):
            rejected.append((table, f"entry {number} of annotations (image_id {shown(caption.image)}): {wrong}"))
        elif caption.image in names:
            captions[names[caption.image]].append(caption.text)
        else:
            astray[caption.image] += 1
    for image, count in sorted(astray.items(), key=str):
        rejected.append(
            (table, f"{count} caption{'s' * (count != 1)} of image_id {shown(image)}, which is no id of its images")
        )
    return captions, rejected


def parse(table: Readable) -> tuple[list[Any], list[Any]]:
    """Its images and annotations, each compact, or as it is where it lacks what it must have; raises ConfigError."""
    try:
        text = decoded(table.read_bytes(), table)
        found = json.loads(text, object_hook=compact)
    except RecursionError:
        raise ConfigError(f"{shown(table)} is not COCO's JSON: it is nested too deep") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{shown(table)} is not whole JSON, perhaps cut off: {error}: download it again") from None
    except OSError as error:
        raise ConfigError(f"{shown(table)} cannot be read: {error.strerror}") from None
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{shown(table)} cannot be read: {error}") from None
    for key in ("images", "annotations"):
        if not isinstance(found, dict) or not isinstance(found.get(key), list):
            raise ConfigError(f"{shown(table)} holds no COCO captions: it has no list {key!r}")
    return found["images"], found["annotations"]


def compact(found: dict[str, Any]) -> Any:
    """What is kept of an object, as soon as it is parsed."""
    name, text = found.get("file_name"), found.get("caption")
    if isinstance(name, str) and isinstance(found.get("id"), int | str):
        return Image(found["id"], name)
    if isinstance(text, str) and isinstance(found.get("image_id"), int | str):
        return Caption(found["image_id"], one_line(text))
    return found
