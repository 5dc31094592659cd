"""`Components`: a model in parts, by name. A pipeline in diffusers is for drawing; training wants the parts, frozen, in the right
precision, and perhaps quantized. `load` makes them, `pipeline` makes them a diffusers pipeline again.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from t2ilib.config import DrawnBy, ModelConfig
from t2ilib.memory import pictures_at_once
from t2ilib.models.families import Family
from t2ilib.models.noise import drawing_as, scheduler_for
from t2ilib.models.quantize import QuantizationReport, move
from t2ilib.models.students import stages_of

VAE_PIXELS = 2**18
"""What the VAE takes at a time: in float32 it needs more memory for a picture than the UNet does."""
SMALLEST_TILE = 32
"""Latents along a side; of less, a VAE's middle block, which looks at all of them, sees too little."""


@dataclass
class Components:
    """A model in parts. `text_encoders` and `tokenizers` keep the pipeline's names; `path`: `model.base`.

    `zero_empty`: the pipeline conditions its unconditional half on zeros, not on the encoded "" (SDXL's
    `force_zeros_for_empty_prompt`); a dropped caption must then be zeros in training too. `words`: those that were added to the
    vocabulary (`adapters.tokens`), each with the tokens that it is. `teacher`: where the UNet is a student that learns from it, the base's own,
    frozen. `drawn_by`: how the model is drawn where what it learned wants it another way than its base.
    """

    family: Family
    path: str
    unet: nn.Module
    vae: nn.Module
    text_encoders: dict[str, nn.Module]
    tokenizers: dict[str, Any]
    scheduler: Any
    zero_empty: bool = False
    config: ModelConfig | None = None
    teacher: nn.Module | None = None
    quantization: dict[str, QuantizationReport] = field(default_factory=dict)
    words: dict[str, tuple[str, ...]] = field(default_factory=dict)
    drawn_by: DrawnBy | None = None
    parked: list[nn.Module] = field(default_factory=list)
    home: torch.device | None = None

    @property
    def device(self) -> torch.device:
        """Where the model works, also while its UNet is elsewhere."""
        return self.home or self.unet.device

    @property
    def vae_scale(self) -> int:
        """Pixels a latent, along one side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def native_side(self) -> int:
        """Pixels along a side of the pictures that the UNet was made for."""
        return self.unet.config.sample_size * self.vae_scale

    @property
    def side_multiple(self) -> int:
        """Pixels that a picture's sides are multiples of, where the UNet halves them evenly down to its middle; of a student its teacher's."""
        return min(64, self.vae_scale * 2 ** (stages_of(self.unet) - 1))

    def modules(self) -> dict[str, nn.Module]:
        """Pipeline name -> trainable-in-principle part: the UNet and the text encoders."""
        return {"unet": self.unet, **self.text_encoders}

    def networks(self) -> list[nn.Module]:
        """Everything that has weights in memory."""
        return [*self.modules().values(), self.vae, *([] if self.teacher is None else [self.teacher])]

    def parkable(self, needed: Iterable[str]) -> list[nn.Module]:
        """The VAE and the text encoders, but for those `needed`, by name."""
        parts = {"vae": self.vae, **self.text_encoders}
        return [part for name, part in parts.items() if name not in needed]

    def park(self, needed: Iterable[str]) -> None:
        """Moves the VAE and the text encoders, but for those that steps need, from the device to host memory until they are needed."""
        self.parked = self.parkable(needed)
        for module in self.parked:
            self.place(module, at_work=False)

    @contextlib.contextmanager
    def awake(self, *names: str) -> Iterator[None]:
        """All parts on the device for as long as the scope lasts; with names ("unet", "vae", a text encoder) those and no others."""
        parts = {**self.modules(), "vae": self.vae}
        waking = [part for name, part in parts.items() if part in self.parked and (not names or name in names)]
        resting = [part for name, part in parts.items() if part not in self.parked and names and name not in names]
        self.home = self.device
        try:
            for module in resting:
                self.place(module, at_work=False)
            for module in waking:
                self.place(module, at_work=True)
            yield
        finally:  # also where the device has no room for what wakes
            for module in waking:
                self.place(module, at_work=False)
            for module in resting:
                self.place(module, at_work=True)
            self.home = None

    def place(self, module: nn.Module, at_work: bool) -> None:
        """Moves a part to the device, or to host memory."""
        move(module, self.device if at_work else "cpu")

    def encode_pictures(self, pixels: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w), scaled, on the host, of `pixels` (B, 3, H, W), uint8: the mode of the VAE's posterior, so many
        pictures at a time as make a quarter of a megapixel."""
        parts = []
        for part in pixels.split(pictures_at_once(max(pixels.shape[-2:]), len(pixels), VAE_PIXELS)):
            scaled = part.to(self.vae.device, self.vae.dtype) / 127.5 - 1
            parts.append((self.vae.encode(scaled).latent_dist.mode() * self.vae.config.scaling_factor).float().cpu())
        return torch.cat(parts)

    def decode_latents(self, latents: torch.Tensor, tiled: bool = False) -> torch.Tensor:
        """Pictures (B, 3, H, W), from -1 to 1, of latents (B, C, h, w), in the VAE's own precision: it stays float32 beside a
        half-precision UNet. As many at a time as are encoded at a time.

        `tiled`: in tiles of half the side that the VAE was made for, which overlap by a quarter and are blended (`AutoencoderKL`'s own
        tiling): a fraction of the memory, with tones that may differ from tile to tile.
        """
        vae, side = self.vae, self.vae_scale * max(latents.shape[-2:])
        if tiled:
            vae.tile_latent_min_size = max(SMALLEST_TILE, vae.config.sample_size // 2 // self.vae_scale)
            vae.tile_sample_min_size = vae.tile_latent_min_size * self.vae_scale
            vae.enable_tiling()
        parts = latents.to(vae.dtype).split(pictures_at_once(side, len(latents), VAE_PIXELS))
        try:
            decoded = [vae.decode(part / vae.config.scaling_factor, return_dict=False)[0].detach() for part in parts]
        finally:
            vae.disable_tiling()
        return torch.cat(decoded)

    def noise_as(
        self, prediction: str = "auto", beta_schedule: str = "auto", zero_terminal_snr: bool | None = None
    ) -> None:
        """Has the model be trained, draw and be saved as one of this prediction and noise schedule (see `noise.scheduler_for`),
        whatever it came with."""
        self.scheduler = scheduler_for(self.scheduler, prediction, beta_schedule, zero_terminal_snr)

    def draw_as(self, drawn: DrawnBy | None) -> None:
        """Has the model be drawn, and saved, as what was trained to be drawn so; None leaves it as it is."""
        if drawn is not None:
            self.scheduler, self.drawn_by = drawing_as(self.scheduler, drawn), drawn

    def spelled(self, captions: Sequence[str]) -> list[str]:
        """Captions with the tokens of every added word in its place, as diffusers' pipelines spell prompts (`maybe_convert_prompt`)."""
        several = {word: " ".join(tokens) for word, tokens in self.words.items() if len(tokens) > 1}
        found = list(captions)
        for word, tokens in several.items():
            found = [caption.replace(word, tokens) for caption in found]
        return found

    def encode_text(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """What the UNet is conditioned on (see `families`), without time ids; an empty caption as the pipeline has it."""
        encoded = self.family.encode_text(self.text_encoders, self.tokenizers, self.spelled(captions))
        if self.zero_empty and "" in captions:
            kept = torch.tensor([float(caption != "") for caption in captions])
            encoded = {name: x * kept.to(x).view(-1, *[1] * (x.ndim - 1)) for name, x in encoded.items()}
        return encoded
