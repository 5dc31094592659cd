"""The layouts of the real models without their weights: what SD1.5 and SDXL look like, on the meta device.

For counting, planning and testing without a download: the configs are those that the models were published with
(runwayml/stable-diffusion-v1-5, stabilityai/stable-diffusion-xl-base-1.0), left out where diffusers' or transformers' default
is the same. Nothing here can compute; `load_base` loads models that can, a single
file with the configs from here.
"""

import json
from pathlib import Path

import torch
from torch import nn

from t2ilib.config import ConfigError, check_choice
from t2ilib.models.components import Components
from t2ilib.models.families import FAMILIES
from t2ilib.models.files.locate import SHIPPED
from t2ilib.models.pipeline import quiet_libraries

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
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
LAYOUTS: dict[str, dict] = {
    "sd15": {
        "unet": {"sample_size": 64, "cross_attention_dim": 768},
        "vae": VAE | {"sample_size": 512, "scaling_factor": 0.18215},
        "text_encoder": CLIP_L,
        "scheduler": NOISE | {"_class_name": "PNDMScheduler", "skip_prk_steps": True},
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
        "scheduler": NOISE | {"_class_name": "EulerDiscreteScheduler"},
        "prediction_type": "epsilon",
    },
}
"""Layout -> the published config of each part."""
PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "runwayml/stable-diffusion-v1-5": "sd15",
    "CompVis/stable-diffusion-v1-4": "sd15",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
}
"""Hub id -> its layout, for planning where the Hub is not to be asked."""


def build_layout(name: str, dtype: torch.dtype = torch.float32, device: str = "meta") -> Components:
    """A model of this layout without weights (`device` "meta") or with random ones; no tokenizers.

    Raises ConfigError for a name that is not in LAYOUTS.
    """
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    layout = LAYOUTS[check_choice(name, LAYOUTS, "layout")]
    encoders = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    with torch.device(device):
        unet: nn.Module = UNet2DConditionModel(**layout["unet"])
        vae = AutoencoderKL(**layout["vae"])
        text = {part: encoder(CLIPTextConfig(**layout[part])) for part, encoder in encoders.items() if part in layout}
    with quiet_libraries():
        for module in (unet, vae, *text.values()):
            module.requires_grad_(False).eval().to(dtype)
    scheduler = DDPMScheduler(**NOISE, clip_sample=False, prediction_type=layout["prediction_type"])
    return Components(FAMILIES[name], name, unet, vae, text, {}, scheduler, zero_empty=name == "sdxl")


def write_configs(name: str, folder: Path) -> None:
    """Writes the configs of a layout as a diffusers pipeline folder without weights and tokenizers.

    UNet and VAE go through their classes, because `from_single_file` reads fields of their configs that are left to defaults.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel

    layout = LAYOUTS[check_choice(name, LAYOUTS, "layout")]
    family = FAMILIES[name]
    scheduler = layout["scheduler"]
    index = {
        "_class_name": family.pipeline_class,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    configs = {
        "text_encoder/config.json": {"model_type": "clip_text_model", **layout["text_encoder"]},
        "scheduler/scheduler_config.json": scheduler | {"prediction_type": layout["prediction_type"]},
    }
    if "text_encoder_2" in layout:
        index |= {
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "force_zeros_for_empty_prompt": True,
        }
        configs["text_encoder_2/config.json"] = {"model_type": "clip_text_model", **layout["text_encoder_2"]}
    with torch.device("meta"):
        UNet2DConditionModel(**layout["unet"]).save_config(folder / "unet")
        AutoencoderKL(**layout["vae"]).save_config(folder / "vae")
    for file, config in {"model_index.json": index, **configs}.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(json.dumps(config))


def is_layout(name: str) -> bool:
    """Whether `name` is a layout rather than a model to load; raises ConfigError where it is also a folder here."""
    if name not in LAYOUTS:
        return False
    if Path(name).is_dir() and name not in SHIPPED:
        raise ConfigError(f"{name} is a layout and also a folder here: write ./{name} for the folder")
    return True
