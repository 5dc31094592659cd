"""The UNet of every family behind one signature, so that nothing that trains or measures asks which family it has."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from t2ilib.models.components import Components


class Denoiser(nn.Module):
    """The UNet behind one signature: `denoiser(noisy_latents, timesteps, batch)` -> (B, C, h, w) in float32.

    `noisy_latents`: (B, C, h, w); `timesteps`: (B,); `batch` holds the conditioning, or `captions` where text encoders are
    trained and so must be encoded anew in every step.
    """

    def __init__(self, components: Components, trains_text: bool):
        super().__init__()
        self.unet = components.unet
        self.text_encoders = nn.ModuleDict(components.text_encoders) if trains_text else None
        self.components = components

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, batch: Mapping[str, Any]) -> Tensor:
        if self.text_encoders is not None:
            batch = batch | self.components.encode_text(batch["captions"])
        # diffusers' own `unet.dtype` asks every module something first
        dtype = next(p.dtype for p in self.unet.parameters() if p.is_floating_point())
        added = None
        if self.components.family.pooled_conditioning:
            added = {"text_embeds": batch["pooled"].to(dtype), "time_ids": batch["time_ids"].to(dtype)}
        hidden = batch["encoder_hidden_states"].to(dtype)
        return self.unet(
            noisy_latents.to(dtype), timesteps, encoder_hidden_states=hidden, added_cond_kwargs=added
        ).sample.float()
