"""What is minimised: pure functions `(denoiser, batch, noise, timesteps) -> per-sample losses (B,)`.

With x0 the latents, e the noise and a_t the cumulative alphas (DDPM, arXiv 2006.11239), x_t = sqrt(a_t) x0 + sqrt(1 - a_t) e.
The network predicts e (epsilon), sqrt(a_t) e - sqrt(1 - a_t) x0 (v, arXiv 2202.00512) or x0 (sample); the loss is the mean
over a sample of the squared error, or of its pseudo-Huber form, weighted by min-SNR (arXiv 2303.09556) where a gamma is given. A batch
may have a `mask` (B, 1, h, w) in [0, 1], of where the error counts, and `weights` (B,) of its samples' losses.

The noise and the timestep of a sample at a step come from their own addresses: they are the same on every machine, in every division of a
batch and after every resume.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn

from t2ilib.config import ConfigError, ObjectiveConfig
from t2ilib.seeds import generator_for

log = logging.getLogger(__name__)

Objective = Callable[[nn.Module, Mapping[str, Any], Tensor, Tensor], Tensor]

OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "epsilon": lambda schedule, latents, noise, timesteps: noise,
    "v_prediction": lambda schedule, latents, noise, timesteps: schedule.get_velocity(latents, noise, timesteps),
    "sample": lambda schedule, latents, noise, timesteps: latents,
}
"""Prediction type -> the target (B, C, h, w)."""


def squared(error: Tensor, delta: float) -> Tensor:
    return error.square()


def pseudo_huber(error: Tensor, delta: float) -> Tensor:
    """2 d (sqrt(e^2 + d^2) - d) of every element: e^2 where |e| is far below d, 2 d |e| far above.

    Pseudo-Huber (Charbonnier et al., 1997) came to diffusion with consistency models (arXiv 2310.14189, sec. 3.3), there of the norm of a
    whole picture, and as a loss against corrupted data, of which this is twice (arXiv 2403.16728): so scaled, delta changes what
    large errors weigh and nothing else, as in diffusers' and kohya's scripts. Computed as 2 d e^2 / (sqrt(e^2 + d^2) + d), which does
    not lose small errors in a difference.
    """
    square = error.square()
    return 2 * delta * square / ((square + delta**2).sqrt() + delta)


LOSSES: dict[str, Callable[[Tensor, float], Tensor]] = {"squared": squared, "huber": pseudo_huber}
"""Name -> what an error, of any shape, counts, element by element."""


@dataclass(frozen=True)
class Denoising:
    """The loss of a prediction's error, weighted by timestep, place and sample. `schedule`: the base's, as DDPM defines it; `weights`: (T,);
    `loss`: error -> what it counts, of the same shape."""

    schedule: Any
    predicts: str
    weights: Tensor
    loss: Callable[[Tensor], Tensor]

    def __call__(self, denoiser: nn.Module, batch: Mapping[str, Any], noise: Tensor, timesteps: Tensor) -> Tensor:
        latents = batch["latents"]
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        prediction = denoiser(noisy, timesteps, batch)
        return self.count(
            prediction - OBJECTIVES[self.predicts](self.schedule, latents, noise, timesteps), batch, timesteps
        )

    def count(self, difference: Tensor, batch: Mapping[str, Any], timesteps: Tensor) -> Tensor:
        """Losses (B,) of what lies between predictions (B, C, h, w) and what they should be."""
        losses = self.weights[timesteps] * mean_error(self.loss(difference), batch)
        return losses * batch["weights"] if "weights" in batch else losses


def mean_error(error: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Of each sample (B,) the mean of `error` (B, C, h, w): where there is a mask over what counts, so that a small object counts as much as a
    large one."""
    if "mask" in batch:
        mask = batch["mask"]
        error = error * (mask / mask.mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6))
    return error.mean(dim=(1, 2, 3))


def build_objective(config: ObjectiveConfig, schedule) -> Denoising:
    """The objective for a base whose DDPM `schedule` is given. Raises ConfigError as `min_snr_weights` does."""
    name = schedule.config.prediction_type if config.name == "auto" else config.name
    weights = torch.ones_like(schedule.alphas_cumprod)
    if config.snr_gamma is not None:
        weights = min_snr_weights(schedule.alphas_cumprod, name, config.snr_gamma)
    if not weights[-1]:
        log.warning(
            "objective.snr_gamma %g gives the last timestep the weight 0, because with zero terminal SNR nothing of the picture is left"
            " there: what pictures begin with is not trained. Set snr_gamma to null to train it",
            config.snr_gamma,
        )
    return Denoising(schedule, name, weights, partial(LOSSES[config.loss], delta=config.huber_delta))


def min_snr_weights(alphas_cumprod: Tensor, prediction: str, gamma: float) -> Tensor:
    """Weight by timestep (T,): min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v, / 1 for sample (arXiv 2303.09556, sec. 3.4).

    Where the SNR is infinite they are 0, 0 and gamma; where it is 0, those of v and sample are 0. Raises ConfigError for epsilon under a
    zero-terminal-SNR schedule, where the weight divides by zero.
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


PLAIN = ObjectiveConfig()
RAREST = 1e-6
"""A part of the schedule in which fewer of the drawn timesteps lie is none."""


def addressed_noise(
    seed: int,
    step: int,
    ids: list[int],
    shape: tuple[int, ...],
    num_timesteps: int,
    config: ObjectiveConfig = PLAIN,
) -> tuple[Tensor, Tensor]:
    """Noise (B, *shape) and timesteps (B,) of these samples at this step. `shape`: (C, h, w), or (). Raises ConfigError as `trained_part`.

    With `noise_offset` every channel is moved as a whole, by so many times a normal number of its own: that is part of the noise, so
    that targets made of it follow (N. Guttenberg, "Diffusion with Offset Noise", 2023).
    """
    noise = torch.stack([torch.randn(shape, generator=generator_for(seed, "noise", step, i)) for i in ids])
    if config.noise_offset:
        channels = tuple(1 if axis else size for axis, size in enumerate(shape))
        offsets = [torch.randn(channels, generator=generator_for(seed, "noise offset", step, i)) for i in ids]
        noise = noise + config.noise_offset * torch.stack(offsets)
    part, draw = trained_part(config, num_timesteps), TIMESTEPS[config.timesteps]
    timesteps = [draw(config, part, num_timesteps, generator_for(seed, "timestep", step, i)) for i in ids]
    return noise, torch.stack(timesteps)


def trained_part(config: ObjectiveConfig, num_timesteps: int) -> tuple[int, int]:
    """The first timestep that `timestep_range` trains, and the first after these that it does not. Raises ConfigError where none is left,
    or `timesteps` would hardly ever give one of them."""
    start, end = (round(share * num_timesteps) for share in config.timestep_range)
    if start >= end:
        raise ConfigError(
            f"objective.timestep_range {config.timestep_range} leaves none of the schedule's {num_timesteps} timesteps: make it wider"
        )
    below, above = shares_below(config, (start, end), num_timesteps)
    if config.timesteps == "logit_normal" and above - below < RAREST:
        raise ConfigError(
            f"objective.timestep_range {config.timestep_range} lies where logit_normal of mean {config.timestep_mean:g} and deviation"
            f" {config.timestep_std:g} has no timesteps: change one of them"
        )
    return start, end


def uniform(config: ObjectiveConfig, part: tuple[int, int], num_timesteps: int, generator: torch.Generator) -> Tensor:
    """Each timestep of `part` as often as the others (DDPM, arXiv 2006.11239, algorithm 1)."""
    return torch.randint(*part, (), generator=generator)


def logit_normal(
    config: ObjectiveConfig, part: tuple[int, int], num_timesteps: int, generator: torch.Generator
) -> Tensor:
    """The place in the schedule, in (0, 1), has a logit that is normal (arXiv 2403.03206, sec. 3.1): timestep k of T as often as it lies
    in [k / T, (k + 1) / T), given that it lies in `part`.

    Drawn by inverting the distribution function, so that one number of the generator makes one timestep.
    """
    below, above = shares_below(config, part, num_timesteps)
    share = below + (above - below) * torch.rand((), dtype=torch.float64, generator=generator)
    place = torch.sigmoid(config.timestep_mean + config.timestep_std * torch.special.ndtri(share))
    return (place * num_timesteps).long().clamp(part[0], part[1] - 1)


def shares_below(config: ObjectiveConfig, part: tuple[int, int], num_timesteps: int) -> list[float]:
    """The shares of a logit-normal's timesteps that lie before `part`, and before its end."""
    normal, places = NormalDist(config.timestep_mean, config.timestep_std), [edge / num_timesteps for edge in part]
    return [normal.cdf(math.log(place / (1 - place))) if 0 < place < 1 else place for place in places]


TIMESTEPS: dict[str, Callable[[ObjectiveConfig, tuple[int, int], int, torch.Generator], Tensor]] = {
    "uniform": uniform,
    "logit_normal": logit_normal,
}
"""Name -> what draws a timestep (), from `part` of the schedule's `num_timesteps`."""
