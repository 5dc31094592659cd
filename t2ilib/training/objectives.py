"""What is minimised: pure functions `(denoiser, batch, noise, timesteps) -> per-sample losses (B,)`.

With x0 the latents, e the noise and a_t the cumulative alphas (DDPM, arXiv 2006.11239), x_t = sqrt(a_t) x0 + sqrt(1 - a_t) e.
The network predicts e (epsilon), sqrt(a_t) e - sqrt(1 - a_t) x0 (v, arXiv 2202.00512) or x0 (sample); the loss is the mean
squared error per sample, weighted by min-SNR (arXiv 2303.09556) where a gamma is given.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from t2ilib.config import ConfigError, ObjectiveConfig
from t2ilib.seeds import generator_for

Objective = Callable[[nn.Module, Mapping[str, Any], Tensor, Tensor], Tensor]

OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "epsilon": lambda schedule, latents, noise, timesteps: noise,
    "v_prediction": lambda schedule, latents, noise, timesteps: schedule.get_velocity(latents, noise, timesteps),
    "sample": lambda schedule, latents, noise, timesteps: latents,
}
"""Prediction type -> the target (B, C, h, w)."""


@dataclass(frozen=True)
class Denoising:
    """The squared error of a prediction, weighted by timestep. `schedule`: the base's, as DDPM defines it; `weights`: (T,)."""

    schedule: Any
    predicts: str
    weights: Tensor

    def __call__(self, denoiser: nn.Module, batch: Mapping[str, Any], noise: Tensor, timesteps: Tensor) -> Tensor:
        latents = batch["latents"]
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        prediction = denoiser(noisy, timesteps, batch)
        target = OBJECTIVES[self.predicts](self.schedule, latents, noise, timesteps)
        return self.weights[timesteps] * (prediction - target).square().mean(dim=(1, 2, 3))


def build_objective(config: ObjectiveConfig, schedule) -> Denoising:
    """The objective for a base whose DDPM `schedule` is given."""
    name = schedule.config.prediction_type if config.name == "auto" else config.name
    weights = torch.ones_like(schedule.alphas_cumprod)
    if config.snr_gamma is not None:
        weights = min_snr_weights(schedule.alphas_cumprod, name, config.snr_gamma)
    return Denoising(schedule, name, weights)


def min_snr_weights(alphas_cumprod: Tensor, prediction: str, gamma: float) -> Tensor:
    """Weight by timestep (T,): min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v, / 1 for sample (arXiv 2303.09556, sec. 3.4).

    Raises ConfigError for epsilon under a zero-terminal-SNR schedule, where the weight divides by zero.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    clipped = snr.clamp(max=gamma)
    if prediction == "epsilon":
        if (snr == 0).any():
            raise ConfigError(
                "objective.snr_gamma: epsilon prediction has no min-SNR weight at zero terminal SNR; set it to null or use v_prediction"
            )
        return clipped / snr
    return clipped / (snr + 1) if prediction == "v_prediction" else clipped


def addressed_noise(
    seed: int, step: int, ids: list[int], shape: tuple[int, ...], num_timesteps: int
) -> tuple[Tensor, Tensor]:
    """Noise (B, *shape) and timesteps (B,) of these samples at this step, the same on every machine and after every resume."""
    noise = torch.stack([torch.randn(shape, generator=generator_for(seed, "noise", step, i)) for i in ids])
    timesteps = [torch.randint(num_timesteps, (), generator=generator_for(seed, "timestep", step, i)) for i in ids]
    return noise, torch.stack(timesteps)
