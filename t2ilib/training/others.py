"""The base as it was, beside what is trained of it: what an objective compares with, or learns from, as another denoiser."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from t2ilib.config import RunConfig
from t2ilib.models.alone import adapters_off
from t2ilib.models.components import Components
from t2ilib.models.denoiser import Denoiser

Denoise = Callable[[Tensor, Tensor, Mapping[str, Any]], Tensor]
"""`(noisy_latents, timesteps, batch)` -> (B, C, h, w), as `Denoiser` has it."""


class BaseAlone:
    """The base of a model that has adapters, with all of them switched off, those of text encoders too: no copy of it."""

    def __init__(self, components: Components, denoiser: Denoiser):
        self.components, self.denoiser = components, denoiser

    @torch.no_grad()
    def __call__(self, noisy_latents: Tensor, timesteps: Tensor, batch: Mapping[str, Any]) -> Tensor:
        with adapters_off(self.components):
            return self.denoiser(noisy_latents, timesteps, batch)


class Frozen:
    """A UNet that stays as it is, on the conditioning of a model that is trained."""

    def __init__(self, components: Components, unet: nn.Module):
        self.unet = unet.requires_grad_(False).eval()
        self.denoiser = Denoiser(components, trains_text=False)
        self.denoiser.unet = self.unet

    @torch.no_grad()
    def __call__(self, noisy_latents: Tensor, timesteps: Tensor, batch: Mapping[str, Any]) -> Tensor:
        return self.denoiser(noisy_latents, timesteps, batch)


def base_as_it_was(run: RunConfig, components: Components, denoiser: Denoiser) -> BaseAlone | Frozen:
    """What the run's base predicts, of a model whose trained parts are attached or thawed and have not learned yet. `denoiser`: what is
    trained. A copy is made only where the base's own UNet is trained: a student's teacher is there."""
    if run.trains == "adapter":
        return BaseAlone(components, denoiser)
    return Frozen(components, copy.deepcopy(components.unet) if components.teacher is None else components.teacher)
