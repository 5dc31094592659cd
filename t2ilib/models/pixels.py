"""Pixels as if they were latents: what stands where a VAE would, for UNets that see and draw the pictures themselves.

Training, caching, drawing and planning then ask nothing about the space that they work in. So pixels are kept on disk as latents are, in
float32: 12 KiB of a picture of 32 x 32, four times its bytes; with `data.cache: off` they are decoded in every step instead, and that is
all that a step then does.
"""

from types import SimpleNamespace

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor


class PixelSpace(ModelMixin, ConfigMixin):
    """The part of an AutoencoderKL's interface that this library uses, with nothing between its two sides: (B, 3, H, W), from -1 to 1."""

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 3,
        block_out_channels: tuple[int, ...] = (3,),
        scaling_factor: float = 1.0,
        sample_size: int = 64,
    ):
        """As the config of an AutoencoderKL that halves nothing; the same for pictures of every size, so that all share what is kept on disk."""
        super().__init__()
        self.register_buffer("place", torch.empty(0), persistent=False)  # says on which device it is

    def encode(self, pixels: Tensor) -> SimpleNamespace:
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: pixels))

    def decode(self, pixels: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return (pixels,)

    def enable_tiling(self) -> None:
        """There is nothing to save."""

    def disable_tiling(self) -> None:
        pass
