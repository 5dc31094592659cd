"""What the model families do differently, in one place: encoding text, and calling the UNet.

Outside this module nobody asks which family a model is of. A `Family` is data plus two functions; `Denoiser` makes every
UNet look like `denoiser(noisy_latents, timesteps, batch) -> prediction`. Conditioning goes by `encoder_hidden_states`
(B, T, D) and, in SDXL, `pooled` (B, P) and `time_ids` (B, 6).

Leaves out: refiner models, inpainting UNets (9 input channels), SD3 and Flux.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from t2ilib.models.components import Components


def tokenize(tokenizer, captions: Sequence[str]) -> Tensor:
    """Token ids (B, T), padded and cut to the tokenizer's length."""
    return tokenizer(
        list(captions),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def encode_sd15(components: "Components", captions: Sequence[str]) -> dict[str, Tensor]:
    """The last hidden state of the one CLIP text encoder, after its final norm."""
    encoder = components.text_encoders["text_encoder"]
    ids = tokenize(components.tokenizers["tokenizer"], captions).to(encoder.device)
    return {"encoder_hidden_states": encoder(ids).last_hidden_state}


def encode_sdxl(components: "Components", captions: Sequence[str]) -> dict[str, Tensor]:
    """Both encoders' penultimate hidden states side by side, and the second's projected pooled output (arXiv 2307.01952)."""
    hidden = []
    for name, encoder in components.text_encoders.items():
        ids = tokenize(components.tokenizers[name.replace("text_encoder", "tokenizer")], captions).to(encoder.device)
        output = encoder(ids, output_hidden_states=True)
        hidden.append(output.hidden_states[-2])
    return {"encoder_hidden_states": torch.cat(hidden, dim=-1), "pooled": output.text_embeds}


@dataclass(frozen=True)
class Family:
    """`text_encoders`: their names in the pipeline. `pooled_conditioning`: whether the UNet also takes pooled text and time ids.

    For files: `architecture` as modelspec calls it, `version` as kohya's sd-scripts do, `kohya_prefixes` of the parts' tensors there,
    and whether the UNet's modules have their `original_names` in that layout.
    """

    name: str
    pipeline_class: str
    text_encoders: tuple[str, ...]
    encode_text: Callable[["Components", Sequence[str]], dict[str, Tensor]]
    pooled_conditioning: bool
    architecture: str
    version: str
    kohya_prefixes: Mapping[str, str]
    original_names: bool


FAMILIES = {
    "sd15": Family(
        name="sd15",
        pipeline_class="StableDiffusionPipeline",
        text_encoders=("text_encoder",),
        encode_text=encode_sd15,
        pooled_conditioning=False,
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
        architecture="stable-diffusion-xl-v1-base",
        version="sdxl_base_v1-0",
        kohya_prefixes={"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
        original_names=True,
    ),
}


def unused_text_layers(components: "Components") -> tuple[str, ...]:
    """Module prefixes (`text_encoder.<module>.`) that can never receive a gradient.

    SDXL reads the penultimate hidden state, so the last layer of its first encoder has no effect; the second's last layer
    still feeds the pooled output.
    """
    if components.family.name != "sdxl":
        return ()
    encoder = components.text_encoders["text_encoder"]
    last = encoder.config.num_hidden_layers - 1
    return tuple(
        f"text_encoder.{name}." for name, _ in encoder.named_modules() if name.endswith(f"encoder.layers.{last}")
    )


def time_ids(original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """SDXL's micro-conditioning (6,): original (height, width), crop (top, left), target (height, width), in pixels."""
    return torch.tensor([*original, *crop, *target], dtype=torch.float32)


class Denoiser(nn.Module):
    """The UNet behind one signature: `denoiser(noisy_latents, timesteps, batch)` -> (B, C, h, w) in float32.

    `noisy_latents`: (B, C, h, w); `timesteps`: (B,); `batch` holds the conditioning, or `captions` where text encoders are
    trained and so must be encoded anew in every step.
    """

    def __init__(self, components: "Components", trains_text: bool):
        super().__init__()
        self.unet = components.unet
        self.text_encoders = nn.ModuleDict(components.text_encoders) if trains_text else None
        self.components = components

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, batch: Mapping[str, Any]) -> Tensor:
        if self.text_encoders is not None:
            batch = batch | self.components.encode_text(batch["captions"])
        dtype = self.unet.dtype
        added = None
        if self.components.family.pooled_conditioning:
            added = {"text_embeds": batch["pooled"].to(dtype), "time_ids": batch["time_ids"].to(dtype)}
        hidden = batch["encoder_hidden_states"].to(dtype)
        return self.unet(
            noisy_latents.to(dtype), timesteps, encoder_hidden_states=hidden, added_cond_kwargs=added
        ).sample.float()
