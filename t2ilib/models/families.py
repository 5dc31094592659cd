"""What the model families do differently, in one place: encoding text, and calling the UNet.

Outside this module nobody asks which family a model is of. A `Family` is data plus a function that encodes text; with it `Denoiser`
makes every UNet look like `denoiser(noisy_latents, timesteps, batch) -> prediction`. Conditioning goes by
`encoder_hidden_states` (B, T, D) and, in SDXL, `pooled` (B, P) and `time_ids` (B, 6). A family without a VAE works on pixels, which are
then what others call latents.

Leaves out: refiner models, inpainting UNets (9 input channels), SD3 and Flux.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from t2ilib.config import ConfigError

Parts = Mapping[str, Any]
"""Text encoders or tokenizers, by their names in the pipeline."""


def tokenize(tokenizer, captions: Sequence[str]) -> Tensor:
    """Token ids (B, T), padded and cut to the tokenizer's length."""
    return tokenizer(
        list(captions),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def cut_captions(tokenizers: Parts, captions: Sequence[str]) -> list[str]:
    """Those of `captions` of which a tokenizer drops the end, because they have more tokens than its text encoder takes."""
    found = []
    for caption in dict.fromkeys(captions):
        for tokenizer in tokenizers.values():
            most = tokenizer.model_max_length
            if len(caption.encode()) <= most - 2:  # a token is a byte at least, and two mark beginning and end
                continue
            if len(tokenizer(caption, truncation=False, verbose=False).input_ids) > most:
                found.append(caption)
                break
    return found


def encode_sd15(text_encoders: Parts, tokenizers: Parts, captions: Sequence[str]) -> dict[str, Tensor]:
    """The last hidden state of the one CLIP text encoder, after its final norm."""
    encoder = text_encoders["text_encoder"]
    ids = tokenize(tokenizers["tokenizer"], captions).to(encoder.device)
    return {"encoder_hidden_states": encoder(ids).last_hidden_state}


def encode_sdxl(text_encoders: Parts, tokenizers: Parts, captions: Sequence[str]) -> dict[str, Tensor]:
    """Both encoders' penultimate hidden states side by side, and the second's projected pooled output (arXiv 2307.01952)."""
    hidden = []
    for name, encoder in text_encoders.items():
        ids = tokenize(tokenizers[name.replace("text_encoder", "tokenizer")], captions).to(encoder.device)
        output = encoder(ids, output_hidden_states=True)
        hidden.append(output.hidden_states[-2])
    return {"encoder_hidden_states": torch.cat(hidden, dim=-1), "pooled": output.text_embeds}


@dataclass(frozen=True)
class Family:
    """`text_encoders`: their names in the pipeline. `pooled_conditioning`: whether the UNet also takes pooled text and time ids. `clip_skip`:
    whether it can read an earlier layer of its text encoder, see `skip_layers`. `left_out`: arguments that keep parts of published pipelines away which training has no use for; SD1.5's safety checker alone is 1.2 GB.

    `has_vae`: or else the UNet sees pixels. `pipeline_module`: where its class is.

    For files: `architecture` as modelspec calls it, `version` as kohya's sd-scripts do, `kohya_prefixes` of the parts' tensors there,
    and whether the UNet's modules have their `original_names` in that layout.
    """

    name: str
    pipeline_class: str
    text_encoders: tuple[str, ...]
    encode_text: Callable[[Parts, Parts, Sequence[str]], dict[str, Tensor]]
    pooled_conditioning: bool
    clip_skip: bool
    left_out: Mapping[str, Any]
    architecture: str
    version: str
    kohya_prefixes: Mapping[str, str]
    original_names: bool
    has_vae: bool = True
    pipeline_module: str = "diffusers"

    def load_pipeline_class(self) -> Any:
        return getattr(importlib.import_module(self.pipeline_module), self.pipeline_class)


FAMILIES = {
    "sd15": Family(
        name="sd15",
        pipeline_class="StableDiffusionPipeline",
        text_encoders=("text_encoder",),
        encode_text=encode_sd15,
        pooled_conditioning=False,
        clip_skip=True,
        left_out={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
        architecture="stable-diffusion-v1",
        version="sd_v1",
        kohya_prefixes={"unet": "lora_unet", "text_encoder": "lora_te"},
        original_names=False,
    ),
    "sdxl": Family(
        name="sdxl",
        pipeline_class="StableDiffusionXLPipeline",
        text_encoders=("text_encoder", "text_encoder_2"),
        encode_text=encode_sdxl,
        pooled_conditioning=True,
        clip_skip=False,
        left_out={"add_watermarker": False},
        architecture="stable-diffusion-xl-v1-base",
        version="sdxl_base_v1-0",
        kohya_prefixes={"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
        original_names=True,
    ),
    "pixels": Family(
        name="pixels",
        pipeline_class="TextToImagePipeline",
        text_encoders=("text_encoder",),
        encode_text=encode_sd15,
        pooled_conditioning=False,
        clip_skip=True,
        left_out={},
        architecture="t2ilib-pixels",
        version="t2ilib_pixels",
        kohya_prefixes={"unet": "lora_unet", "text_encoder": "lora_te"},
        original_names=False,
        has_vae=False,
        pipeline_module="t2ilib.models.text_to_image",
    ),
}


def skip_layers(family: Family, text_encoders: Parts, count: int) -> None:
    """Takes the last `count` layers out of SD1.x's text encoder: the UNet then reads what comes before them, after the final norm.

    That is `final_layer_norm(hidden_states[-(count + 1)])` of the whole encoder, which diffusers' pipeline gives for `clip_skip=count`
    and others call clip skip count + 1. With the layers gone, everything that encodes, adapts, keeps, draws or saves the model has it
    so, as in SD2's published encoder, which lacks its last layer. Raises ConfigError where a family reads another layer already,
    and where no layer is left.
    """
    if not count:
        return
    if not family.clip_skip:
        raise ConfigError(
            f"model.clip_skip {count}: a base of the family {family.name} was made to read the penultimate layer of its text encoders, and"
            " others were never seen by its UNet: leave it out"
        )
    for encoder in text_encoders.values():
        body = getattr(encoder, "text_model", encoder)
        if count >= len(body.encoder.layers):
            raise ConfigError(
                f"model.clip_skip {count}: the text encoder has {len(body.encoder.layers)} layers, and at least one must stay"
            )
        body.encoder.layers = body.encoder.layers[:-count]
        encoder.config.num_hidden_layers -= count


def unused_text_layers(family: Family, text_encoders: Parts) -> tuple[str, ...]:
    """Module prefixes (`text_encoder.<module>.`) that can never receive a gradient.

    SDXL reads the penultimate hidden state, so the last layer of its first encoder has no effect; the second's last layer
    still feeds the pooled output.
    """
    if family.name != "sdxl":
        return ()
    encoder = text_encoders["text_encoder"]
    last = encoder.config.num_hidden_layers - 1
    return tuple(
        f"text_encoder.{name}." for name, _ in encoder.named_modules() if name.endswith(f"encoder.layers.{last}")
    )


def time_ids(original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """SDXL's micro-conditioning (6,): original (height, width), crop (top, left), target (height, width), in pixels."""
    return torch.tensor([*original, *crop, *target], dtype=torch.float32)
