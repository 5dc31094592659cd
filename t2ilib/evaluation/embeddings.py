"""Embedding models: what says how alike two pictures are, DINOv2 or a CLIP by the config's choice.

Every other measure of likeness is a function of the vectors that are made here, each of length 1, so that a product of two is a cosine.
By default a picture is the model's one vector of it, which says what is seen and little of where. `NAME:patches` takes the vectors of all its
patches, each in its place: for pictures whose layout the caption or the noise decides, and for what a model has no word for. The tiny models'
CLIP is asked so: its one vector holds what the captions of its world name, and a heart is hardly another thing to it than what the base draws
in its place.

Pictures are prepared as a model's own `preprocessor_config.json` says, by Pillow and numpy: the processors of transformers that take
tensors need torchvision. Only the part of a CLIP that sees is loaded.
"""

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from t2ilib.config import ConfigError, RunConfig
from t2ilib.memory import align
from t2ilib.models.files.locate import fetch_files
from t2ilib.models.pipeline import clip_folder, quiet_libraries

FIELD = "evaluation.embedding_models"
CONFIG, PREPARATION = "config.json", "preprocessor_config.json"
FILES = (CONFIG, PREPARATION, "*.safetensors", "*.safetensors.index.json")
AT_ONCE = 32
PATCHES = ":patches"
"""Behind a model's folder or Hub id: all patches in place of the one vector."""


@dataclass(frozen=True)
class Preparation:
    """How a model wants its pictures. `shorter`: pixels of the shorter side after scaling, or None where `side` is scaled to; `side`: of
    the square that is cut out of the middle. `mean`, `std`: of the channels, from 0 to 1."""

    shorter: int | None
    side: int
    resample: Image.Resampling
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, picture: Image.Image) -> np.ndarray:
        """(3, side, side), float32."""
        picture = picture.convert("RGB")
        if self.shorter is None:
            picture = picture.resize((self.side, self.side), self.resample)
        else:
            width, height = picture.size
            scale = self.shorter / min(width, height)
            size = (self.shorter, int(scale * height)) if width <= height else (int(scale * width), self.shorter)
            picture = picture.resize(size, self.resample)
            left, top = (picture.width - self.side) // 2, (picture.height - self.side) // 2
            picture = picture.crop((left, top, left + self.side, top + self.side))
        pixels = np.asarray(picture, np.float32) / 255
        return ((pixels - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)).transpose(2, 0, 1)


def read_preparation(folder: Path, native: int) -> Preparation:
    """From a model's folder; `native`: the side that the model was made for, where the file says none."""
    told = json.loads((folder / PREPARATION).read_text())
    size, crop = told.get("size", {}), told.get("crop_size", {})
    size = {"shortest_edge": size} if isinstance(size, int) else size
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    shorter = size.get("shortest_edge")
    side = crop.get("height") if told.get("do_center_crop", True) and crop else size.get("height", shorter or native)
    return Preparation(
        shorter=shorter if shorter and told.get("do_resize", True) else None,
        side=side or native,
        resample=Image.Resampling(told.get("resample", Image.Resampling.BICUBIC)),
        mean=tuple(told["image_mean"]),
        std=tuple(told["image_std"]),
    )


@dataclass(frozen=True)
class Embedder:
    """Pictures -> vectors of length 1."""

    name: str
    model: Any
    prepare: Preparation
    patches: bool = False

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """(N, D), float64, of N pictures."""
        parts = []
        for start in range(0, len(pictures), AT_ONCE):
            pixels = np.stack([self.prepare(picture) for picture in pictures[start : start + AT_ONCE]])
            parts.append(self.vectors(torch.from_numpy(pixels).to(self.model.device)).double().cpu().numpy())
        found = np.concatenate(parts) if parts else np.zeros((0, 1))
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    def vectors(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, D) of pixels (N, 3, H, W): a CLIP's projection, otherwise the class token after the last norm, as DINOv2's authors
        compare pictures (arXiv 2304.07193, section 7.1). Patches: the tokens of the last layer behind class and register tokens."""
        given = self.model(pixel_values=pixels)
        if self.patches:
            return given.last_hidden_state[:, 1 + getattr(self.model.config, "num_register_tokens", 0) :].flatten(1)
        return given.image_embeds if hasattr(given, "image_embeds") else given.last_hidden_state[:, 0]


THUMBNAIL = 32
"""Pixels of a side."""


@dataclass(frozen=True)
class Thumbnails:
    """Pictures -> thumbnails around middle grey, of length 1: how a picture is painted, place by place, whatever it shows. Of copies that
    says most, and no model is needed."""

    name: str = "thumbnails"

    def __call__(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """(N, D), float64, of N pictures."""
        small = [picture.convert("RGB").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX) for picture in pictures]
        found = np.stack([np.asarray(picture, float).ravel() - 127.5 for picture in small])
        return found / np.linalg.norm(found, axis=1, keepdims=True)


def embedding_models(run: RunConfig) -> dict[str, str]:
    """Name -> folder or Hub id of a run's embedding models, the one that decides first; empty where it has none. Raises ConfigError for
    two of one name."""
    base = clip_folder(run.model.base)
    own = run.evaluation.clip_model or (base and f"{base}{PATCHES}")
    found: dict[str, str] = {}
    for place in run.evaluation.embedding_models or filter(None, [own]):
        name = Path(place).name.lower().replace(":", "-")
        if found.setdefault(name, place) != place:
            raise ConfigError(f"{FIELD}: {found[name]} and {place} would both be called {name}: rename a folder")
    return found


def lacks_models(run: RunConfig) -> str | None:
    """Why a run has nothing that says how alike pictures are, or None where it has."""
    return None if embedding_models(run) else f"set {FIELD}, since no CLIP lies beside its base"


def load_embedder(name: str, place: str, device: torch.device) -> Embedder:
    """From a folder, or the Hub or its cache. Raises ConfigError for what is neither, and for a model without class token."""
    from transformers import AutoConfig, AutoModel, CLIPVisionModelWithProjection

    place, patches = place.removesuffix(PATCHES), place.endswith(PATCHES)
    folder = Path(place).expanduser()
    if not folder.is_dir():
        if place.count("/") != 1 or folder.is_absolute() or place.startswith("."):
            raise ConfigError(f"{FIELD}: {place!r} is neither a folder nor a Hub id such as facebook/dinov2-base")
        folder = fetch_files(place, FILES, FIELD, "give a local folder, or leave it out")
    if lacking := [file for file in (CONFIG, PREPARATION) if not (folder / file).exists()]:
        raise ConfigError(f"{FIELD} {place} holds no {' and no '.join(lacking)}: give a vision model of transformers")
    with quiet_libraries():
        config = AutoConfig.from_pretrained(folder)
        kind = CLIPVisionModelWithProjection if config.model_type == "clip" else AutoModel
        model = kind.from_pretrained(folder, dtype=torch.float32)
    if kind is AutoModel and not hasattr(getattr(model, "embeddings", None), "cls_token"):
        raise ConfigError(
            f"{FIELD} {place} is a {type(model).__name__}, whose pictures have no class token: take DINOv2 or a CLIP"
        )
    align(model)
    native = getattr(config, "vision_config", config).image_size
    return Embedder(name, model.to(device).eval(), read_preparation(folder, native), patches)


def embedders(run: RunConfig, device: torch.device, shared: dict[str, Any]) -> list[Embedder]:
    """A run's embedding models, loaded once for all its measures."""
    if "embedders" not in shared:
        shared["embedders"] = [load_embedder(name, place, device) for name, place in embedding_models(run).items()]
    return shared["embedders"]


def vectors_of(embedder: Embedder | Thumbnails, pictures: Sequence[Image.Image], shared: dict[str, Any]) -> np.ndarray:
    """(N, D), made once for all measures that are asked about the same list of pictures, as long as it is one of the last two: what was drawn,
    and what the base drew."""
    known = shared.setdefault("vectors", {}).setdefault(embedder.name, deque(maxlen=2))
    for held, vectors in known:
        if held is pictures:
            return vectors
    known.append((pictures, embedder(pictures)))
    return known[-1][1]
