"""The layouts of the real models without their weights: what SD1.5 and SDXL look like, on the meta device.

For counting, planning and testing without a download: the configs are those that the models were published with
(runwayml/stable-diffusion-v1-5, stabilityai/stable-diffusion-xl-base-1.0), left out where diffusers' or transformers' default
is the same. Of other models the config files are read, and no weights. Nothing here can compute; `load_base` loads models that
can.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from t2ilib.config import ConfigError, ModelConfig, check_choice
from t2ilib.models.components import SHIPPED, Components, download, load_family, locate, quiet_libraries
from t2ilib.models.families import FAMILIES, Family

CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
OPENCLIP_BIG_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
LAYOUTS: dict[str, dict] = {
    "sd15": {
        "unet": {"sample_size": 64, "cross_attention_dim": 768},
        "vae": VAE | {"sample_size": 512, "scaling_factor": 0.18215},
        "text_encoder": CLIP_L,
        "prediction_type": "epsilon",
    },
    "sdxl": {
        "unet": {
            "sample_size": 128,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "vae": VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
        "text_encoder": CLIP_L,
        "text_encoder_2": OPENCLIP_BIG_G,
        "prediction_type": "epsilon",
    },
}
"""Layout -> the published config of each part."""


def build_layout(name: str, dtype: torch.dtype = torch.float32, device: str = "meta") -> Components:
    """A model of this layout without weights (`device` "meta") or with random ones; no tokenizers.

    Raises ConfigError for a name that is not in LAYOUTS.
    """
    layout = LAYOUTS[check_choice(name, LAYOUTS, "layout")]
    scheduler = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "steps_offset": 1,
        "prediction_type": layout["prediction_type"],
    }
    return build_parts(name, FAMILIES[name], layout | {"scheduler": scheduler}, name == "sdxl", dtype, device)


def build_parts(
    path: str, family: Family, configs: dict[str, Any], zero_empty: bool, dtype: torch.dtype, device: str = "meta"
) -> Components:
    """The parts that `configs` (part -> config) describe, frozen, without weights on "meta" and with random ones elsewhere."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    encoders = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    with quiet_libraries():
        with torch.device(device):
            unet: nn.Module = UNet2DConditionModel.from_config(configs["unet"])
            vae = AutoencoderKL.from_config(configs["vae"])
            text = {part: encoders[part](CLIPTextConfig.from_dict(configs[part])) for part in family.text_encoders}
        for module in (unet, vae, *text.values()):
            module.requires_grad_(False).eval().to(dtype)
        scheduler = DDPMScheduler.from_config(configs["scheduler"])
    return Components(family, path, unet, vae, text, {}, scheduler, zero_empty=zero_empty)


def build_unloaded(config: ModelConfig, dtype: torch.dtype) -> Components:
    """What `load_base` would load, on the meta device and without tokenizers: UNet and text encoders in `dtype`, VAE in float32.

    `config.base` may also be the name of a layout. Of a folder or a Hub repository only config files are read. Raises
    ConfigError for what is none of these, and for a config file that is missing.
    """
    if is_layout(config.base):
        components = build_layout(config.base, dtype)
    else:
        path = locate(config.base)
        family = load_family(path, config)
        configs = {
            part: read_config(path, f"{part}/config.json", config) for part in ("unet", "vae", *family.text_encoders)
        }
        configs["scheduler"] = read_config(path, "scheduler/scheduler_config.json", config)
        zero_empty = read_config(path, "model_index.json", config).get("force_zeros_for_empty_prompt", False)
        components = build_parts(config.base, family, configs, bool(zero_empty), dtype)
    components.vae.float()
    return components


def read_config(path: str, name: str, config: ModelConfig) -> dict[str, Any]:
    file = Path(path) / name if Path(path).is_dir() else download(path, name, config.revision)
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"model.base {path} is incomplete, it lacks {name}") from None


def native_resolution(config: ModelConfig) -> int:
    """Side in pixels of the pictures that the UNet was made for; reads config files only."""
    if is_layout(config.base):
        unet, vae = LAYOUTS[config.base]["unet"], LAYOUTS[config.base]["vae"]
    else:
        path = locate(config.base)
        unet, vae = (read_config(path, f"{part}/config.json", config) for part in ("unet", "vae"))
    return unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)


def is_layout(name: str) -> bool:
    """Whether `name` is a layout rather than a model to load; raises ConfigError where it is also a folder here."""
    if name not in LAYOUTS:
        return False
    if Path(name).is_dir() and name not in SHIPPED:
        raise ConfigError(f"{name} is a layout and also a folder here: write ./{name} for the folder")
    return True
