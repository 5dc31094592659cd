"""What a UNet with fresh weights is built as: named sizes, configs of the user's own, and what the conditioning decides of either.

A size is a layout of blocks. How wide its cross-attention is, whether it takes pooled text and time ids, and how many channels it sees is
not its own to say: that is filled in from the text encoders and the space that it is trained with (`unet_config`). `sd15` and `sdxl`
are the published models' layouts. In the others only levels of at most 16 x 16 places have attention (as DDPM's had, arXiv 2006.11239, appendix
B), and the deepest one in any case. So one size serves latents of 8 x 8 and pixels of 32 x 32 and more.
"""

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from t2ilib.config import ConfigError, check_choice
from t2ilib.models.files.layouts import LAYOUTS
from t2ilib.models.files.locate import fetch_files

ATTENTION_SIDE = 16
FILLED_IN = (
    "cross_attention_dim",
    "addition_embed_type",
    "projection_class_embeddings_input_dim",
    "in_channels",
    "out_channels",
)
"""What the conditioning and the space decide. A config of the user's own may say it too, and must then say the same."""
NO_INPUT = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "time_cond_proj_dim")
"""Fields of configs that ask for inputs which a caption does not give."""
TIME_IDS, TIME_ID_WIDTH = 6, 256
"""How many numbers SDXL's micro-conditioning is, and the width that each is embedded in where a layout does not say it."""


def published(name: str) -> dict[str, Any]:
    return {field: value for field, value in LAYOUTS[name]["unet"].items() if field not in (*FILLED_IN, "sample_size")}


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"block_out_channels": (64, 64), "layers_per_block": 1, "attention_head_dim": 2},
    "small": {
        "block_out_channels": (64, 128, 256),
        "layers_per_block": 1,
        "attention_head_dim": (1, 2, 4),
        "use_linear_projection": True,
    },
    "base": {
        "block_out_channels": (128, 256, 384, 512),
        "layers_per_block": 2,
        "attention_head_dim": (2, 4, 6, 8),
        "use_linear_projection": True,
    },
    "sd15": published("sd15"),
    "sdxl": published("sdxl"),
}
"""Name -> fields of a UNet2DConditionModel's config. Its `attention_head_dim` is the number of heads, in spite of its name."""
WITH_POOLED_TEXT: dict[str, dict[str, Any]] = {
    "tiny": {
        "block_out_channels": (64, 128),
        "attention_head_dim": (1, 2),
        "transformer_layers_per_block": (1, 1),
        "use_linear_projection": True,
        "addition_time_embed_dim": 32,
    }
}
"""What a size has otherwise where the UNet also takes pooled text, as SDXL's does."""
IN_PIXELS: dict[str, dict[str, Any]] = {
    "tiny": {"block_out_channels": (16, 32, 64, 64), "attention_head_dim": (1, 1, 2, 2), "norm_num_groups": 8}
}
"""What a size has otherwise where it sees pixels, of which there are many: two levels more, and narrow where they are most."""


@dataclass(frozen=True)
class Surroundings:
    """What a UNet is built for. `text_width`: of encoder_hidden_states. `pooled_width`: of pooled text, None for a family without.
    `channels`, `side`: of latents, or of `pixels`, at `data.resolution`."""

    text_width: int
    pooled_width: int | None
    channels: int
    side: int
    pixels: bool = False


def build_unet(name: str, around: Surroundings) -> nn.Module:
    """The UNet that `scratch.unet` names, with random weights from torch's global generator, on the current device.

    Raises ConfigError for a config that cannot be read, contradicts its surroundings, or is none of this class.
    """
    from diffusers import UNet2DConditionModel

    config = unet_config(name, around)
    try:
        return UNet2DConditionModel(**config)
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise ConfigError(f"scratch.unet {name} describes no UNet2DConditionModel: {error}") from None


def unet_config(name: str, around: Surroundings) -> dict[str, Any]:
    """All fields of the config that decide the UNet called `name`, a size or a config of the user's own, in its surroundings."""
    pooled = around.pooled_width is not None
    if name in SIZES:
        otherwise = (WITH_POOLED_TEXT if pooled else IN_PIXELS if around.pixels else {}).get(name, {})
        layout = SIZES[name] | otherwise
        if name not in LAYOUTS:
            layout = layout | block_types(len(layout["block_out_channels"]), around.side)
        said = {}
    else:
        layout = read_config(name)
        said = {field: layout.pop(field) for field in FILLED_IN if field in layout}
    if not pooled:
        layout = {field: value for field, value in layout.items() if field != "addition_time_embed_dim"}
    wanted = filled_in(layout, around)
    for field, value in said.items():
        if value != wanted[field]:
            raise ConfigError(
                f"scratch.unet {name} has {field} {value}, and {REASONS[field]} ask for {wanted[field]}: leave {field} out of it, or"
                " set it so"
            )
    return layout | wanted | {"sample_size": around.side}


REASONS = dict.fromkeys(FILLED_IN, "the text encoders") | dict.fromkeys(
    ("in_channels", "out_channels"), "scratch.space and its VAE"
)


def filled_in(layout: Mapping[str, Any], around: Surroundings) -> dict[str, Any]:
    """The fields FILLED_IN, and with pooled text the width of time ids."""
    fields = dict.fromkeys(FILLED_IN) | {
        "cross_attention_dim": around.text_width,
        "in_channels": around.channels,
        "out_channels": around.channels,
    }
    if around.pooled_width is not None:
        width = layout.get("addition_time_embed_dim") or TIME_ID_WIDTH
        fields |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": width,
            "projection_class_embeddings_input_dim": TIME_IDS * width + around.pooled_width,
        }
    return fields


def block_types(levels: int, side: int) -> dict[str, tuple[str, ...]]:
    """The kinds of blocks on the way down and up: with attention where it is affordable, and at the deepest of `levels`."""
    attends = [side // 2**level <= ATTENTION_SIDE or level == levels - 1 for level in range(levels)]
    return {
        "down_block_types": tuple("CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attends),
        "up_block_types": tuple("CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)),
    }


def read_config(name: str) -> dict[str, Any]:
    """The fields of a config of the user's own: a .json file, or a folder or Hub id with `config.json` or `unet/config.json`."""
    from diffusers import UNet2DConditionModel

    file = find_config(name)
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"scratch.unet {file} cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"scratch.unet {file} must hold the fields of a config, not a {type(config).__name__}")
    kind = config.get("_class_name", UNet2DConditionModel.__name__)
    if kind != UNet2DConditionModel.__name__:
        raise ConfigError(
            f"scratch.unet {file} is the config of a {kind}; what is trained here is a UNet2DConditionModel"
        )
    fields = {field: value for field, value in config.items() if not field.startswith("_")}
    unknown = fields.keys() - inspect.signature(UNet2DConditionModel.__init__).parameters.keys()
    if unknown:
        raise ConfigError(
            f"scratch.unet {file} has fields that no UNet2DConditionModel has: {', '.join(sorted(unknown))}"
        )
    asked = [field for field in NO_INPUT if fields.get(field) is not None]
    if asked:
        raise ConfigError(
            f"scratch.unet {file} asks by {asked[0]} for an input that a caption does not give: set it to null"
        )
    return fields


def find_config(name: str) -> Path:
    place = Path(name).expanduser()
    if place.suffix == ".json":
        if not place.is_file():
            raise ConfigError(f"scratch.unet {name}: there is no such file")
        return place
    if not place.is_dir():
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            check_choice(
                name, SIZES, "scratch.unet (no such folder, not a .json file, and not a Hub id like owner/name):"
            )
        place = fetch_files(name, ("config.json", "unet/config.json"), "scratch.unet", "name a size or a local config")
    found = next((file for file in (place / "unet" / "config.json", place / "config.json") if file.exists()), None)
    if found is None:
        raise ConfigError(f"scratch.unet {name} holds neither config.json nor unet/config.json")
    return found
