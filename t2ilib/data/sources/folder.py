"""An image folder as people keep them: a table metadata.jsonl, .csv or .parquet, a .txt caption beside each picture, or neither
and one caption for all (`data.prompt`).

Hugging Face's `imagefolder` layout, subfolders included, so a data set made for other trainers works as it is. Every file under the
folder is accounted for: a picture that is used, its caption, its mask, a hidden file, something else that is left aside, or rejected
with a reason; a table and its folder are compared both ways. What is rejected is told together with the pictures that cannot
be decoded (`manifest`), and `data.on_error` decides about both. Pictures are not opened here.
"""

import dataclasses
import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from t2ilib.config import ConfigError, DataConfig
from t2ilib.data.records import Listing, Record, Told
from t2ilib.data.sources.emphasis import emphasised
from t2ilib.data.sources.files import LookUp, composed, is_picture, walk
from t2ilib.data.sources.table import FILE_NAME, SCENE, TABLES, TEXT, read_table
from t2ilib.data.sources.wording import one_line, unfit
from t2ilib.seeds import seed_for
from t2ilib.text import read_text, shown

log = logging.getLogger(__name__)


def load(config: DataConfig) -> Listing:
    """The pictures of `config.path`, but for those that lie in `config.validation_path`."""
    if config.path is None:
        raise ConfigError("data.path is missing: give the folder with your pictures and captions")
    return read_folder(Path(config.path), config, apart=config.validation_path and Path(config.validation_path))


def hold_out(records: Sequence[Record], share: float, purpose: str = "held out") -> tuple[list[Record], list[Record]]:
    """Training and held-out records; held out by their names' hashes, so adding a picture moves no other (unless the share
    holds out none, and the one with the smallest hash stands in), and of pairs by their prompts' hashes, all pairs of a prompt together.
    `purpose`: another one holds out others. Raises ConfigError where none is left to train on."""
    place = {record: seed_for(0, purpose, known_by(record)) / 2**63 for record in records}
    held_out = {record for record in records if place[record] < share}
    if share and not held_out:
        first = min(records, key=place.__getitem__)
        held_out = {first} | {
            record for record in records if record.rejected is not None and place[record] == place[first]
        }
    training = [record for record in records if record not in held_out]
    if not training:
        raise ConfigError(
            f"of {len(records)} picture(s) data.validation_share {share:g} holds out {len(held_out)},"
            " which leave none to train on: set data.validation_share: 0, which trains on all and validates on none, add pictures,"
            " or give held-out pictures of their own by data.validation_path"
        )
    return training, [record for record in records if record in held_out]


def known_by(record: Record) -> str:
    """What decides whether a record is held out: of a pair its prompt, whatever the white space."""
    return address(record.path.name if record.rejected is None else f"prompt {one_line(record.caption)}")


def address(name: str) -> str:
    """A name as the same text on every system; Macs decompose letters with accents."""
    return shown(composed(name)).replace("\x1f", "\\x1f")


def read_folder(folder: Path, config: DataConfig, apart: Path | None = None) -> Listing:
    """What lies in one folder, but for what lies in `apart`. Raises ConfigError for one without pictures, and for a table
    that cannot be read."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"data.path {shown(folder)} is not a folder")
    files, hidden, rejected = walk(folder, apart)
    table = next((folder / name for name in TABLES if folder / name in files), None)
    if table is None:
        records, texts, unusable = read_captions(folder, files, config)
        masks = set()
    else:
        records, texts, unusable, masks = read_rows(table, files, config)
    rejected += unusable
    records, inside = [], records
    for record in inside:
        wrong = unfit(record.captions)
        rejected += [(record.path, wrong)] if wrong else []
        records += [] if wrong else [record]
    rejected = [*dict(reversed(rejected)).items()][::-1]  # of several reasons the first
    told = {record.path for record in records} | {path for path, _ in rejected} | {*texts}
    told |= {record.mask for record in records}
    aside = [(path, why_aside(path, folder, table, masks)) for path in files if path not in told]
    if not records and not rejected:
        ignored = f" ({len(hidden)} hidden file(s) ignored)" if hidden else ""
        raise ConfigError(f"{shown(table or folder)} lists no picture{ignored}")
    if records:
        records = emphasised(
            records, [record.path.relative_to(folder).as_posix() for record in records], folder, config
        )
    records.sort(key=lambda record: (composed(record.path.name), composed(str(record.path))))
    return Listing(folder, tuple(records), tuple(texts), tuple(hidden), tuple(aside), tuple(rejected))


def why_aside(path: Path, folder: Path, table: Path | None, masks: set[Path]) -> str:
    if path in masks:
        return "the mask of a picture that is not used"
    if path.name in TABLES and path.parent != folder:
        return "tables of subfolders are not read"
    if table and (path.suffix.lower() == ".txt" or path.name in TABLES):
        return f"the captions are in {table.name}"
    return "neither a picture nor a caption"


def read_captions(
    folder: Path, files: Sequence[Path], config: DataConfig
) -> tuple[list[Record], list[Path], list[Told]]:
    """Records of pictures with a .txt of their name beside them, or without any where `config.prompt` is their caption; the captions
    that have a picture, and what lacks the other."""
    for field in ("mask_column", "weight_column", "repeat_column"):
        if getattr(config, field) is not None:
            raise ConfigError(f"data.{field} names a column, and {shown(folder)} has no {' or '.join(TABLES)}")
    if config.prompt is not None and not config.prompt.strip():
        raise ConfigError("data.prompt is empty: write the caption of pictures that have none, or leave it out")
    captions: dict[str, list[Path]] = defaultdict(list)
    for path in files:
        if path.suffix.lower() == ".txt":
            captions[composed(str(path.with_suffix("")))].append(path)
    records, texts, rejected, bare = [], [], [], 0
    for path in filter(is_picture, files):
        beside = captions.get(composed(str(path.with_suffix(""))), [])
        texts += beside
        if not beside and config.prompt is not None:
            records.append(Record(path, config.prompt.strip()))
            bare += 1
            continue
        if len(beside) != 1:
            several = f"has {len(beside)} captions ({', '.join(shown(p.name) for p in beside)}): keep one"
            none = (
                f"has no .txt caption beside it, and the folder no {' or '.join(TABLES)} (data.prompt is one for all)"
            )
            rejected.append((path, several if beside else none))
            continue
        try:
            text = read_text(beside[0])
        except (ConfigError, OSError) as error:
            rejected.append((path, f"its caption cannot be read: {shown(error)}"))
        else:
            records.append(Record(path, text.replace("\r\n", "\n").replace("\r", "\n").strip()))
    of_pictures = set(texts)
    for path in (path for paths in captions.values() for path in paths if path not in of_pictures):
        beside = sorted(shown(p.name) for p in files if p.stem == path.stem and p.parent == path.parent and p != path)
        other = f" ({', '.join(beside)} is none by its ending)" if beside else ""
        rejected.append((path, f"is a caption without a picture beside it{other}"))
    if bare:
        log.info(
            "%s: %d of %d pictures have no .txt beside them and take data.prompt as their caption: %s",
            shown(folder),
            bare,
            len(records),
            shown(config.prompt.strip()),
        )
    return records, list(dict.fromkeys(texts)), rejected


def read_rows(
    table: Path, files: Sequence[Path], config: DataConfig
) -> tuple[list[Record], list[Path], list[Told], set[Path]]:
    """Records of the rows of a table, and all masks that it names; rejected are rows without a file or its mask, rows of one file
    after the first, and pictures without a row."""
    folder, rejected, rows, masks = table.parent, [], {}, {}
    if config.prompt is not None:
        log.warning("data.prompt is not used: the captions of %s are in %s", shown(folder), table.name)
    look_up, records = LookUp(folder, files), {}
    for number, row in read_table(table, config):
        name, where = row[config.image_column or FILE_NAME], f"(row {number} of {table.name})"
        path = look_up(name)
        if isinstance(path, str):
            rejected.append((folder / name, f"{path} {where}"))
            continue
        if path in rows:
            rejected.append((path, f"row {number} of {table.name} names it again, after row {rows[path]}: keep one"))
            continue
        rows[path] = number
        record = record_of(path, row, config)
        if record.more and (wrong := unfit(record.captions)):
            rejected.append((path, f"{wrong} {where}"))
            continue
        if row.get(config.mask_column) is not None:
            mask = look_up(row[config.mask_column])
            if isinstance(mask, str):
                rejected.append((path, f"its mask {shown(row[config.mask_column])}: {mask} {where}"))
                continue
            if mask in masks:
                rejected.append((path, f"its mask {shown(mask.name)} is that of row {masks[mask]} too {where}"))
                continue
            masks[mask] = number
            record = dataclasses.replace(record, mask=mask)
        records[path] = record
    for path, record in [*records.items()]:
        if record.mask in rows:
            reason = f"its mask {shown(record.mask.name)} is the picture of row {rows[record.mask]}"
            rejected.append((path, f"{reason} (row {rows[path]} of {table.name})"))
            del records[path]
    rejected += [
        (path, f"no row of {table.name} names it{if_odd(path)}")
        for path in files
        if is_picture(path) and path not in rows and path not in masks
    ]
    return [*records.values()], [table], rejected, {*masks}


def record_of(path: Path, row: dict, config: DataConfig) -> Record:
    """Without its mask, whose file must be found first."""
    captions, scene = row[config.caption_column or TEXT], row.get(SCENE)
    caption, *more = (text.strip() for text in ([captions] if isinstance(captions, str) else captions))
    weight = row[config.weight_column] if config.weight_column else None
    return Record(
        path,
        caption,
        scene if isinstance(scene, dict) else None,
        tuple(more),
        weight=1.0 if weight is None else weight,
        repeats=(row[config.repeat_column] if config.repeat_column else None) or 1,
    )


def if_odd(path: Path) -> str:
    return "" if shown(path.name) == path.name else ", nor can easily, for its name is not UTF-8: rename it"
