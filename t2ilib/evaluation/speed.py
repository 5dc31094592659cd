"""What drawing with a model costs, whatever it draws: how large its UNet is, and how long a denoising step takes.

Timed is the UNet's pass as guidance takes it, for one picture of the run's resolution, after WARM passes that pay for what others find warm;
the median of TIMED ones is told. It is of the machine that measured. Leaves out text encoders and VAE, which work once a picture, and
what the sampler computes, which is next to nothing.
"""

import time
from math import prod
from statistics import median

import torch
from torch import nn

from t2ilib.config import RunConfig
from t2ilib.evaluation.metrics import Metric
from t2ilib.evaluation.sampling import evaluating
from t2ilib.models.components import Components
from t2ilib.models.denoiser import Denoiser
from t2ilib.models.families import time_ids

WARM, TIMED = 2, 7
METRICS = {
    "drawing/unet_parameters": Metric(
        "parameters of the UNet", "count", "lower", True, "Cost", note="that pictures are drawn with; adapters not counted"
    ),
    "drawing/seconds_per_step": Metric(
        "seconds a denoising step", "seconds", "lower", False, "Cost", note="of one picture with guidance, by the UNet alone; a median"
    ),
}  # fmt: skip


def drawing_costs(run: RunConfig, components: Components) -> dict[str, float]:
    """The METRICS of a model as it is, adapters included in the time."""
    seconds = seconds_per_step(components, run.data.resolution, run.evaluation.guidance_scale > 1)
    return {
        "drawing/unet_parameters": float(count_parameters(components.unet)),
        "drawing/seconds_per_step": seconds,
    }


def count_parameters(unet: nn.Module) -> int:
    """Of the network, however its weights are packed; those of attached adapters are not."""
    named = [(name, parameter) for name, parameter in unet.named_parameters() if "lora_" not in name]
    states = [(parameter, getattr(parameter, "quant_state", None)) for _, parameter in named]
    return sum(parameter.numel() if state is None else prod(state.shape) for parameter, state in states)


@torch.no_grad()
def seconds_per_step(components: Components, resolution: int, guided: bool) -> float:
    """The median time of the UNet's pass for a picture of `resolution` pixels."""
    side, device = resolution // components.vae_scale, components.device
    with evaluating(components), components.awake():
        text = components.encode_text(["", "a picture"][-1 - guided :])
        rows = len(text["encoder_hidden_states"])
        square = (resolution, resolution)
        batch = text | {"time_ids": time_ids(square, (0, 0), square).repeat(rows, 1).to(device)}
        latents = torch.zeros(rows, components.unet.config.in_channels, side, side, device=device)
        timesteps = torch.full((rows,), components.scheduler.config.num_train_timesteps // 2, device=device)
        denoiser, found = Denoiser(components, trains_text=False).eval(), []
        for _ in range(WARM + TIMED):
            finish(device)
            began = time.perf_counter()
            denoiser(latents, timesteps, batch)
            finish(device)
            found.append(time.perf_counter() - began)
    return median(found[WARM:])


def finish(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
