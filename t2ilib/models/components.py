"""`Components`: a model in parts, by name. A pipeline in diffusers is for drawing; training wants the parts, frozen, in the right
precision, and perhaps quantized. `load` makes them, `pipeline` makes them a diffusers pipeline again.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from t2ilib.config import ModelConfig
from t2ilib.models.families import Family
from t2ilib.models.quantize import QuantizationReport, move


@dataclass
class Components:
    """A model in parts. `text_encoders` and `tokenizers` keep the pipeline's names; `path`: `model.base`.

    `zero_empty`: the pipeline conditions its unconditional half on zeros, not on the encoded "" (SDXL's
    `force_zeros_for_empty_prompt`); a dropped caption must then be zeros in training too.
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
    quantization: dict[str, QuantizationReport] = field(default_factory=dict)
    parked: list[nn.Module] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def vae_scale(self) -> int:
        """Pixels a latent, along one side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def modules(self) -> dict[str, nn.Module]:
        """Pipeline name -> trainable-in-principle part: the UNet and the text encoders."""
        return {"unet": self.unet, **self.text_encoders}

    def parkable(self, trained: Iterable[str]) -> list[nn.Module]:
        """What a training step does without: the VAE and the text encoders that nothing trains."""
        return [self.vae, *(encoder for name, encoder in self.text_encoders.items() if name not in trained)]

    def park(self, trained: Iterable[str]) -> None:
        """Moves the VAE and the text encoders that nothing trains from the device to host memory until they are needed."""
        self.parked = self.parkable(trained)
        for module in self.parked:
            move(module, "cpu")

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """All parts on the device, for as long as the scope lasts."""
        for module in self.parked:
            move(module, self.device)
        try:
            yield
        finally:
            for module in self.parked:
                move(module, "cpu")

    def predict(self, kind: str) -> None:
        """Has the model draw, and be saved, as one that predicts `kind` (epsilon, v_prediction, sample), whatever it came with."""
        if kind != self.scheduler.config.prediction_type:
            self.scheduler = type(self.scheduler).from_config(self.scheduler.config, prediction_type=kind)

    def encode_text(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """What the UNet is conditioned on (see `families`), without time ids; an empty caption as the pipeline has it."""
        encoded = self.family.encode_text(self.text_encoders, self.tokenizers, captions)
        if self.zero_empty and "" in captions:
            kept = torch.tensor([float(caption != "") for caption in captions])
            encoded = {name: x * kept.to(x).view(-1, *[1] * (x.ndim - 1)) for name, x in encoded.items()}
        return encoded
