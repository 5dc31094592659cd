"""The text encoder of the user's choice (`scratch.text_encoder`), in place of a base's: CLIP's, with its tokenizer.

It is a pipeline, whose `text_encoder` and `tokenizer` are taken, or a folder or Hub id of CLIP itself, text alone or with its pictures'
half, which is left there.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from t2ilib.config import ConfigError
from t2ilib.memory import require_memory
from t2ilib.models.files.headers import bytes_in_memory, read_header
from t2ilib.models.files.locate import fetch_files, locate
from t2ilib.models.pipeline import quiet_libraries

FIELD = "scratch.text_encoder"
WEIGHTS = "model.safetensors"
DESCRIBED = ("config.json", "tokenizer*.json", "special_tokens_map.json", "vocab.json", "merges.txt")
"""What there is of either besides weights."""
KINDS = ("clip_text_model", "clip")
"""`model_type` in the configs of CLIP's text encoder, and of CLIP."""


def find_text_encoder(name: str, with_weights: bool = True) -> tuple[Path, Path]:
    """The folders of the encoder and of its tokenizer, fetched where they are on the Hub. Raises ConfigError for what is none, or not
    CLIP's, or lacks a file."""
    place = Path(locate(name, FIELD))
    if place.is_file():
        raise ConfigError(f"{FIELD} {name} is a file without a config: give a folder or Hub id")
    if not place.is_dir():
        weights = (f"text_encoder/{WEIGHTS}", WEIGHTS) if with_weights else ()
        patterns = (
            *DESCRIBED,
            *(f"text_encoder/{file}" for file in DESCRIBED),
            *(f"tokenizer/{file}" for file in DESCRIBED),
        )
        place = fetch_files(name, (*patterns, *weights), FIELD)
    piped = (place / "text_encoder").is_dir()
    encoder, tokenizer = (place / "text_encoder", place / "tokenizer") if piped else (place, place)
    lacking = [file for file in ("config.json", *((WEIGHTS,) if with_weights else ())) if not (encoder / file).exists()]
    if not (tokenizer / "tokenizer.json").exists():
        lacking += [file for file in ("vocab.json", "merges.txt") if not (tokenizer / file).exists()]
    if lacking:
        raise ConfigError(
            f"{FIELD} {name} lacks {', '.join(lacking)}: give a pipeline, or CLIP's text encoder with its tokenizer"
        )
    kind = json.loads((encoder / "config.json").read_text()).get("model_type")
    if kind not in KINDS:
        raise ConfigError(f"{FIELD} {name} is a {kind}; UNets are conditioned here on CLIP's text encoders")
    return encoder, tokenizer


def read_text_config(folder: Path) -> Any:
    """The CLIPTextConfig in a folder of `find_text_encoder`; of CLIP that of its text half."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig.from_pretrained(folder)


def load_text_encoder(name: str, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """The CLIPTextModel that `scratch.text_encoder` names, in `dtype`, and its tokenizer."""
    from transformers import CLIPTextModel, CLIPTokenizer

    encoder, tokenizer = find_text_encoder(name)
    tensors = read_header(encoder / WEIGHTS, f"{FIELD}: {encoder / WEIGHTS}")
    of_text = [tensor for key, tensor in tensors.items() if not key.startswith(("vision_model.", "visual_"))]
    require_memory(
        bytes_in_memory(of_text, dtype.itemsize), f"{FIELD} {name}", "close other programs, or choose a smaller one"
    )
    with quiet_libraries():
        model = CLIPTextModel.from_pretrained(encoder, dtype=dtype, use_safetensors=True)
        words = CLIPTokenizer.from_pretrained(tokenizer)
    if len(words) > model.config.vocab_size:
        raise ConfigError(
            f"{FIELD} {name}: its tokenizer knows {len(words)} tokens and its encoder {model.config.vocab_size}: they do not belong together"
        )
    return model, words
