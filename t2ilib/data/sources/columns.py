"""Which columns of a Hugging Face data set hold pictures and captions: as the config names them, or by type and by the usual names."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from t2ilib.config import ConfigError, DataConfig
from t2ilib.config.mistakes import check_choice
from t2ilib.text import shown

IMAGES = ("image", "images", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "file_name", "image_path", "path")
CAPTIONS = (
    "caption", "captions", "text", "texts", "txt", "prompt", "prompts", "sentence", "sentences", "sentences_raw", "description",
    "descriptions", "alt_text",
)  # fmt: skip
"""The usual names, in lower case, likeliest first."""
TEXT_TYPES = ("string", "large_string", "string_view")
BYTES_TYPES = ("binary", "large_binary", "binary_view")


@dataclass(frozen=True)
class Columns:
    """Names of columns; no `caption` where `data.prompt` stands for all. `also`: others that look like captions."""

    image: str
    caption: str | None
    mask: str | None = None
    weight: str | None = None
    repeat: str | None = None
    also: tuple[str, ...] = ()

    def __str__(self) -> str:
        others = f" (not from {', '.join(map(repr, self.also))}: data.caption_column)" if self.also else ""
        captions = f"captions from column {self.caption!r}" if self.caption else "no captions"
        return f"pictures from column {self.image!r}, {captions}{others}"


def find_columns(features: Mapping[str, Any], config: DataConfig) -> Columns:
    """Raises ConfigError for a column that is named and not there or holds something else, and where none is found."""
    for field in ("image_column", "caption_column", "mask_column", "weight_column", "repeat_column"):
        if (column := getattr(config, field)) is not None:
            check_choice(column, features, f"data.{field} of {shown(config.path)}:")
    image = config.image_column or find_image(features, config)
    for field, column in (("image_column", image), ("mask_column", config.mask_column)):
        if column is not None and not holds_pictures(features[column]):
            raise ConfigError(
                f"data.{field} {column!r} of {shown(config.path)} holds no pictures but {features[column]}"
            )
    caption, also = config.caption_column, ()
    if caption is None:
        caption, *also = find_captions(features, image, config)
    elif not holds_text(features[caption]):
        raise ConfigError(
            f"data.caption_column {caption!r} of {shown(config.path)} holds no text but {features[caption]}"
        )
    return Columns(image, caption, config.mask_column, config.weight_column, config.repeat_column, tuple(also))


def find_image(features: Mapping[str, Any], config: DataConfig) -> str:
    import datasets

    typed = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    typed = [name for name in typed if name != config.mask_column]
    if len(typed) == 1:
        return typed[0]
    usual = by_usual_name([name for name in typed or features if holds_pictures(features[name])], IMAGES)
    if usual:
        return usual[0]
    several = (
        f"several columns of pictures ({', '.join(typed)})" if typed else "no column of pictures by type or usual name"
    )
    raise ConfigError(f"{shown(config.path)} has {several}, but {listed(features)}: set data.image_column")


def find_captions(features: Mapping[str, Any], image: str, config: DataConfig) -> list[str | None]:
    """The column of captions, and others that look like one; None where there is none and `config.prompt` stands for all."""
    texts = [name for name, feature in features.items() if holds_text(feature) and name != image]
    usual = by_usual_name(texts, CAPTIONS)
    if usual:
        return usual
    if config.prompt is not None:
        return [None]
    raise ConfigError(
        f"{shown(config.path)} has no column of captions by a usual name, but {listed(features)}: set data.caption_column, or"
        " data.prompt as the caption of all"
    )


def by_usual_name(names: Iterable[str], usual: tuple[str, ...]) -> list[str]:
    return sorted((name for name in names if name.lower() in usual), key=lambda name: usual.index(name.lower()))


def holds_text(feature: Any) -> bool:
    inner = getattr(feature, "feature", feature)  # of a list
    return getattr(inner, "dtype", None) in TEXT_TYPES


def holds_pictures(feature: Any) -> bool:
    """Whether a column can: of pictures, of their bytes or of paths."""
    import datasets

    if isinstance(feature, Mapping):
        return "bytes" in feature or "path" in feature
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) in (*TEXT_TYPES, *BYTES_TYPES)


def listed(features: Mapping[str, Any]) -> str:
    return ", ".join(map(shown, features))
