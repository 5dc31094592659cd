"""What quantizing a base costs in exactness: every layer's output against the full-precision model's, on inputs it really has.

Leaves out: the error of the whole model, which the pictures and the held-out loss of a study show better.
"""

from collections.abc import Sequence

import torch

from t2ilib.config import ModelConfig
from t2ilib.models.denoiser import Denoiser
from t2ilib.models.families import time_ids
from t2ilib.models.files.layouts import build_layout, is_layout
from t2ilib.models.load import load_base, quantize_parts
from t2ilib.models.quantize import QuantizationReport, foresee, layer_errors
from t2ilib.seeds import generator_for

PROMPTS = ("a photo of a red apple on a table", "a small blue square on a white background")
TIMESTEPS = (100, 500, 900)


def quantization_reports(config: ModelConfig) -> dict[str, QuantizationReport]:
    """Part -> what `config`'s quantization makes of it; of a layout (`sd15`, `sdxl`), which has no weights, in bfloat16."""
    if not is_layout(config.base):
        return load_base(config).quantization
    components = build_layout(config.base)
    quantize_parts(components, config, torch.bfloat16, torch.device("meta"), foresee)
    return components.quantization


@torch.no_grad()
def quantization_errors(
    config: ModelConfig, prompts: Sequence[str] = PROMPTS, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Part -> layer -> relative error of its output, for the base that `config` quantizes.

    The text encoders read `prompts`; the UNet sees noise of unit variance at TIMESTEPS, conditioned on them. Loads the base
    twice, once in full. Raises ConfigError as `load_base` does.
    """
    full, quantized = load_base(config.in_full()), load_base(config)
    denoiser, device = Denoiser(full, trains_text=False), full.device
    side = full.unet.config.sample_size
    pixels = (side * full.vae_scale,) * 2
    batch = full.encode_text(list(prompts)) | {
        "time_ids": time_ids(pixels, (0, 0), pixels).repeat(len(prompts), 1).to(device)
    }
    shape = (len(prompts), full.unet.config.in_channels, side, side)

    def call_unet(unet: torch.nn.Module) -> None:
        for timestep in TIMESTEPS:
            noise = torch.randn(shape, generator=generator_for(seed, "quantization error", timestep)).to(device)
            denoiser(noise, torch.full((len(prompts),), timestep, device=device), batch)

    errors = {}
    for name in quantized.quantization:
        call = call_unet if name == "unet" else lambda encoder: full.encode_text(list(prompts))
        errors[name] = layer_errors(full.modules()[name], quantized.modules()[name], call)
    return errors
