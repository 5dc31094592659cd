"""What the files of one WebDataset sample are and say: which is the picture, which its mask, what its captions are.

Files are told by their endings: all of a name behind its first dot.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from t2ilib.config import DataConfig
from t2ilib.data.pictures import picture_suffixes
from t2ilib.data.sources.shardindex import TEXTS, Member
from t2ilib.data.sources.table import each_once
from t2ilib.text import shown

JSON = "json"
CAPTIONS = ("caption", "captions", "text")
"""Fields of a .json, where `data.caption_column` names no other: the first that is there."""
MASK = "mask"
DECODER = json.JSONDecoder(object_pairs_hook=each_once)


def parts_of(name: str) -> tuple[str, str]:
    """Key and ending of a member: its file's name is cut at the first dot."""
    folder, slash, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    return folder + slash + stem, ending.lower()


def is_picture(ending: str) -> bool:
    return f".{ending.rpartition('.')[2]}" in picture_suffixes()


def chosen(files: Iterable[str], config: DataConfig) -> tuple[str | None, str | None, str | None]:
    """Which of a sample's endings are its picture and the mask, and what is wrong with that."""
    pictures = [ending for ending in files if is_picture(ending)]
    masks = [ending for ending in pictures if ending.split(".")[0] == (config.mask_column or MASK)]
    others = [ending for ending in pictures if ending not in masks]
    if config.image_column is not None:
        fit = [e for e in others if config.image_column in (e, e.split(".")[0])]
    else:
        fit = [e for e in others if "." not in e] or others
    if not fit:
        named = f" .{config.image_column} (data.image_column)" if config.image_column else ""
        return (
            None,
            None,
            f"is a caption without a picture{named} in its sample, which has {', '.join(map(shown, files))}",
        )
    if len(fit) > 1:
        return (
            fit[0],
            None,
            f"is one of {len(fit)} pictures of its sample ({', '.join(fit)}): name one by data.image_column",
        )
    if len(masks) > 1:
        return fit[0], None, f"has {len(masks)} masks ({', '.join(masks)}): keep one"
    return fit[0], (masks[0] if masks else None), None


def json_of(files: Mapping[str, Member]) -> dict[str, Any]:
    """What a sample's .json says; raises ValueError for one that is no object."""
    if JSON not in files:
        return {}
    text = text_of(files[JSON])
    try:
        value = DECODER.decode(text)
    except RecursionError:
        raise ValueError("its .json is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"its .json is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"its .json holds no fields, but {type(value).__name__}")
    return value


def text_of(member: Member) -> str:
    if member.text is None:
        raise ValueError(
            f"its .{parts_of(member.name)[1]} cannot be read: {shown(member.fault or 'its index has no text')}"
        )
    return member.text


def plain_text(text: str) -> str:
    """The caption in a text file."""
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def captions_of(files: Mapping[str, Member], told: Mapping[str, Any], column: str | None) -> tuple[str, ...] | None:
    """All captions of a sample, None where there is none: of the field or file that `column` names, else of the .txt or .caption, else
    of the .json."""
    plain = [ending for ending in files if ending in TEXTS and ending != JSON and column in (None, ending)]
    field = column if column is not None else next((name for name in CAPTIONS if told.get(name) is not None), None)
    if column is not None and told.get(column) is not None:
        plain = []
    if len(plain) > 1:
        raise ValueError(
            f"has {len(plain)} captions ({', '.join(plain)}): keep one, or name one by data.caption_column"
        )
    if plain:
        return (plain_text(text_of(files[plain[0]])),)
    value = told.get(field)
    if value is None:
        return None
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{field!r} in its .json is neither text nor a list of texts")
    return tuple(text.strip() for text in texts)


def without_caption(told: Mapping[str, Any], column: str | None) -> str:
    has = f" (its .json has {', '.join(map(shown, told))}: set data.caption_column)" if told else ""
    what = f"no {column!r}" if column else f"no {', '.join(f'.{ending}' for ending in TEXTS)} with a caption"
    return f"has {what} in its sample{has}"
