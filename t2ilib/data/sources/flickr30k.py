"""Flickr30k (TACL 2014, "From image descriptions to visual denotations"): `results.csv`, five captions a picture, as it is published.

It is no CSV. Fields are separated by `|` with spaces around, the header too; commas and quotes stand in captions as they are; and one
row of the published file lacks its second separator (`2199200615.jpg| 4   A dog runs across the grass .`), which is understood and
said. Whatever else is no row is rejected with its number.

    results.csv             image_name| comment_number| comment
    flickr30k_images/       the pictures, or they lie beside results.csv
"""

import logging
import re
from pathlib import Path

from t2ilib.config import ConfigError, DataConfig
from t2ilib.data.records import Listing, Told
from t2ilib.data.sources.places import COLUMNS, Place, folder_of, in_folder, matched, refuse
from t2ilib.data.sources.wording import one_line, unfit
from t2ilib.text import read_text, shown

log = logging.getLogger(__name__)

TABLE, PICTURES = "results.csv", "flickr30k_images"
HEADER = ["image_name", "comment_number", "comment"]
NUMBER = re.compile("[0-9]{1,6}")
NUMBER_AND_CAPTION = re.compile(rf"({NUMBER.pattern})\s+(\S.*)", re.DOTALL)
"""What is left of a row whose second separator is missing."""
CUT_OFF = "has {} of 3 fields (picture | number | caption)"


def load(config: DataConfig) -> Listing:
    """All pictures: results.csv knows no parts. Raises ConfigError."""
    refuse(config, (*COLUMNS, "prompt"), "whose captions are in its results.csv")
    if config.split not in (None, "train"):
        raise ConfigError(
            f"data.split {config.split!r}: Flickr30k's results.csv has no parts; leave it out, and held-out pictures are a share"
            " of all (data.validation_share)"
        )
    folder = folder_of(config, "Flickr30k's results.csv and flickr30k_images")
    table = next((place for place in (folder / TABLE, folder / PICTURES / TABLE) if place.is_file()), None)
    if table is None:
        raise ConfigError(f"{shown(folder)} has no {TABLE}, nor has {PICTURES} in it: give the folder where it lies")
    captions, rejected = read_results(table)
    place = find_pictures(table.parent)
    listing = matched(folder, place, captions, table, rejected, config)
    num_captions = sum(len(record.captions) for record in listing)
    log.info("%s: %d pictures with %d captions, from %s", shown(folder), len(listing), num_captions, table.name)
    return listing


def find_pictures(folder: Path) -> Place:
    return in_folder(folder / PICTURES if (folder / PICTURES).is_dir() else folder)


def read_results(table: Path) -> tuple[dict[str, list[str]], list[Told]]:
    """Captions by picture name, in the order of their numbers, and rows that cannot be used. Raises ConfigError for another table."""
    try:
        header, *lines = read_text(table).split("\n")
    except OSError as error:
        raise ConfigError(f"{shown(table)} cannot be read: {error.strerror}") from None
    if [name.strip() for name in header.split("|")] != HEADER:
        raise ConfigError(
            f"{shown(table)} is not Flickr30k's: its first line is {shown(header.strip()[:80])!r}, not {'| '.join(HEADER)!r}"
        )
    numbered: dict[str, dict[int, str]] = {}
    rejected: list[Told] = []
    mended = []
    for row, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, *rest = (part.strip() for part in line.split("|", 2))
        if len(rest) == 1 and (match := NUMBER_AND_CAPTION.fullmatch(rest[0])):
            rest = [match[1], match[2]]
            mended.append(row)
        if len(rest) != 2:
            rejected.append((table, f"row {row} {CUT_OFF.format(1 + len(rest))}: {shown(line.strip()[:60])}"))
        elif not NUMBER.fullmatch(rest[0]):
            rejected.append((table, f"row {row} has no number in its second field: {shown(rest[0][:60])}"))
        elif int(rest[0]) in numbered.get(name, {}):
            rejected.append((table, f"row {row} is caption {int(rest[0])} of {shown(name)} again"))
        elif wrong := unfit(rest[1:]):
            rejected.append((table, f"row {row} ({shown(name)}): {wrong}"))
        else:
            numbered.setdefault(name, {})[int(rest[0])] = one_line(rest[1])
    if mended:
        log.info(
            "%s: %d row(s) lack their second separator and are read as number and caption: row %s",
            shown(table),
            len(mended),
            ", ".join(map(str, mended[:10])),
        )
    return {name: [texts[number] for number in sorted(texts)] for name, texts in numbered.items()}, rejected
