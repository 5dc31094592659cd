"""Looking on while a network draws: at every call of it, before the sampler takes its step, and at the picture that it predicts.

A sampler's own latents are noise until the end; what the network believes is in them is x0 = (x - s eps) / a, where x = a x0 + s eps is
what it is given (arXiv 2010.02502, equation 9, for a network that predicts eps; v and sample likewise). That is computed here from
what the pipeline hands to its scheduler, guidance included, and not asked of the scheduler: some tell it (DDIM, DDPM, Euler), others keep it
to themselves (PNDM, DPM-Solver, UniPC) or mix it with earlier ones.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from t2ilib.config import ConfigError


@dataclass(frozen=True)
class Call:
    """One call of the network for a batch: its `number`, from 1, among the `count` that the batch takes, which are more than its steps
    where a sampler asks more often than once a step (PNDM, Heun)."""

    number: int
    count: int
    predict: Callable[[], Tensor]
    """Gives x0 (B, C, h, w), float32, where the latents are."""

    def ends_step(self, step: int, num_inference_steps: int) -> bool:
        """Whether this is the last of the calls that fall to a sampling step (from 1); calls are shared out over the steps."""
        return self.number == -(-step * self.count // num_inference_steps)


Look = Callable[[Call], None]


@contextlib.contextmanager
def watched(scheduler, look: Look) -> Iterator[None]:
    """Has `look` called at every call of the network by a pipeline that draws with `scheduler` within the scope. What it raises ends the
    drawing, and the scheduler is as it was."""
    plain, calls = scheduler.step, 0

    @functools.wraps(plain)  # pipelines ask for its parameters: whether it takes their generator
    def look_and_step(output: Tensor, timestep, sample: Tensor, *arguments, **named):
        nonlocal calls
        count = len(scheduler.timesteps)
        predict = functools.partial(predicted_picture, scheduler, output, timestep, sample)
        look(Call(calls % count + 1, count, predict))
        calls += 1
        return plain(output, timestep, sample, *arguments, **named)

    scheduler.step = look_and_step
    try:
        yield
    finally:
        del scheduler.step


def require_known_noise(scheduler) -> None:
    """Raises ConfigError for a scheduler of which it is not known how much noise is in what the network sees (EDM's, flow matching's)."""
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ConfigError(
            f"evaluation.strip_steps: the base's {type(scheduler).__name__} has no noise schedule that predictions could be read by; set"
            " strip_steps to null"
        )


def predicted_picture(scheduler, output: Tensor, timestep: Tensor | int, sample: Tensor) -> Tensor:
    """x0 (B, C, h, w), float32, of the network's `output` (B, C, h, w), as a pipeline gives it to `scheduler.step` with `sample`."""
    a, s = (x.to(sample.device, torch.float32) for x in shares(scheduler, timestep))
    seen, output = scheduler.scale_model_input(sample, timestep).float(), output.float()
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return (seen - s * output) / a
    return output if kind == "sample" else a * seen - s * output  # v = a eps - s x0 (arXiv 2202.00512, appendix D)


def shares(scheduler, timestep: Tensor | int) -> tuple[Tensor, Tensor]:
    """a and s, with a^2 + s^2 = 1, of the a x0 + s eps that the network is given at this step, which is not taken yet."""
    one = torch.ones((), dtype=torch.float64)
    a = scheduler.scale_model_input(one, timestep)
    if a != one:  # Euler, Heun, LMS: their sample is x0 + s / a eps, and this makes it what the network knows
        return a, (1 - a**2).sqrt()
    if hasattr(scheduler, "sigmas"):  # DPM-Solver, UniPC, DEIS: s / a, perhaps between timesteps
        if scheduler.step_index is None:
            scheduler._init_step_index(timestep)
        a = (1 + scheduler.sigmas[scheduler.step_index].double() ** 2).rsqrt()
    else:
        a = scheduler.alphas_cumprod[int(timestep)].double().sqrt()
    return a, (1 - a**2).sqrt()
