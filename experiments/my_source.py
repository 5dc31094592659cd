"""A source of pictures of one's own, in one page: a folder with captions.json, a picture's name -> its caption, or a list of several.

    {"cat.jpg": "a photo of my cat", "more/dog.png": ["a dog", "my dog in the snow"]}

Name it in a run file, in the `data` cell of a notebook, or in a study:

    data: {source: experiments/my_source.py:load, path: my-pictures}

It is a function that takes the run's `data` section and gives a Listing: the records, and what is to be said of everything else that was
there. What is rejected is counted, logged and held against `data.max_rejected`, as with the sources that come with t2ilib; pictures are
opened later, so a source need not look whether they can be. A record's picture is a path, or anything with `name`, `read_bytes()` and
a text for messages.
"""

import json
from pathlib import Path

from t2ilib.config import ConfigError, DataConfig
from t2ilib.data.records import Listing, Record
from t2ilib.data.sources.files import LookUp, is_picture, walk
from t2ilib.data.sources.wording import unfit
from t2ilib.text import read_text


def load(config: DataConfig) -> Listing:
    """`config` has a field for each option of the section. A ConfigError is shown as one message, without a traceback."""
    if config.path is None or not (Path(config.path) / "captions.json").is_file():
        raise ConfigError(f"data.path {config.path}: give a folder with captions.json")
    folder = Path(config.path)
    table = folder / "captions.json"
    apart = Path(config.validation_path) if config.validation_path else None  # held-out pictures may lie in the folder
    files, hidden, rejected = walk(folder, apart)
    look_up, records = LookUp(folder, files), {}  # finds names however accents are written, and none outside
    for name, captions in read(table).items():
        path = look_up(name)
        captions = [captions] if isinstance(captions, str) else captions
        if isinstance(path, str):  # the reason why there is none
            rejected.append((folder / name, f"{path} (captions.json names it)"))
        elif not isinstance(captions, list) or not captions or not all(isinstance(text, str) for text in captions):
            rejected.append((path, "its entry in captions.json is neither a caption nor a list of captions"))
        elif wrong := unfit([text.strip() for text in captions]):
            rejected.append((path, wrong))
        else:
            caption, *more = (text.strip() for text in captions)
            records[path] = Record(path, caption, more=tuple(more))
    told = {table, *records, *(path for path, _ in rejected)}
    rejected += [(path, "is not in captions.json") for path in files if is_picture(path) and path not in told]
    aside = [(path, "no picture") for path in files if not is_picture(path) and path not in told]
    in_order = [records[path] for path in sorted(records)]  # of names, the same on every machine
    return Listing(folder, tuple(in_order), (table,), tuple(hidden), tuple(aside), tuple(rejected))


def read(table: Path) -> dict:
    try:
        found = json.loads(read_text(table))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{table} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{table} is no object of names and captions")
    return found
