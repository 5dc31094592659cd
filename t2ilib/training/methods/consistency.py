"""Fewer sampling steps: latent consistency distillation (LCM, arXiv 2310.04378), of an adapter LCM-LoRA (arXiv 2311.05556).

A solver that draws in N steps visits N timesteps, the grid. Its path from noise to a picture is that of an ODE, the base's with classifier-free
guidance; a consistency function f(x, t) gives of every point on a path its end (arXiv 2303.01469, sec. 2). It is learned by making two
neighbours on the path agree (arXiv 2310.04378, sec. 4 and algorithm 1). With t a timestep of the grid, s the one before, x_t the picture under
noise, w the guidance scale and e the teacher's guided prediction of the noise (arXiv 2207.12598, eq. 6):

    e(x, t) = e(x, t, "") + w (e(x, t, caption) - e(x, t, ""))            w as diffusers counts it; the authors' is less by 1
    x_s     = sqrt(a_s) x0 + sqrt(1 - a_s) e,  x0 = (x_t - sqrt(1 - a_t) e) / sqrt(a_t)      DDIM (arXiv 2010.02502, eq. 12)
    f(x, t) = c_skip(t) x + c_out(t) x0 of the student at x, t                               (arXiv 2303.01469, eq. 5)
    c_skip  = d^2 / ((k t)^2 + d^2),  c_out = k t / sqrt((k t)^2 + d^2),  d = 1/2, k = 10     so that f(x, 0) = x
    loss    = mean of sqrt(r^2 + c^2) - c,  r = f(x_t, t) - f(x_s, s)           pseudo-Huber (arXiv 2310.14189, sec. 3.3), by element

where f(x_s, s) is without gradient. LCM takes it from an average of the student (EMA); LCM-LoRA, and this, from the student as it is. c_skip and
c_out are those of diffusers' LCMScheduler, which draws: f at a few timesteps of the grid, with fresh noise between them. The grid ends in
timestep 0, where a little noise is left; the step onto it is the base's last.

The loop's own timesteps choose that of the grid: those that lie between two of them stand for the later one. The teacher reads v and the picture as
it reads noise, and guidance is the same for all three, since they differ by a factor and by what they have in common.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from t2ilib.config import ConfigError, RunConfig
from t2ilib.data.cache import EncodedDataset
from t2ilib.seeds import generator_for
from t2ilib.training.methods.method import Method, Parts
from t2ilib.training.objectives import mean_error
from t2ilib.training.others import Denoise

SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0
"""d and k: of diffusers' LCMScheduler, `sigma_data` and `timestep_scaling`."""
GUIDANCE = "guidance"
"""In a batch: the teacher's guidance scale (B,)."""
WITHOUT = "without "
"""In a batch, before the name of a conditioning: that of an empty caption."""

PICTURES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "epsilon": lambda said, noisy, signal, spread: (noisy - spread * said) / signal,
    "v_prediction": lambda said, noisy, signal, spread: signal * noisy - spread * said,
    "sample": lambda said, noisy, signal, spread: said,
}
"""Prediction type -> x0 of what is `said` (B, C, h, w) of `noisy`; `signal`, `spread` (B, 1, 1, 1): sqrt(a_t), sqrt(1 - a_t)."""
NOISES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "epsilon": lambda said, noisy, signal, spread: said,
    "v_prediction": lambda said, noisy, signal, spread: signal * said + spread * noisy,
    "sample": lambda said, noisy, signal, spread: (noisy - signal * said) / spread,
}
"""Likewise the noise."""


def boundary(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out, each (B, 1, 1, 1), of `timesteps` (B,)."""
    scaled = TIMESTEP_SCALING * timesteps.view(-1, 1, 1, 1).float()
    reach = scaled.square() + SIGMA_DATA**2
    return SIGMA_DATA**2 / reach, scaled / reach.sqrt()


def neighbours(timesteps: Tensor, solver_steps: int, num_timesteps: int) -> tuple[Tensor, Tensor]:
    """Of `timesteps` (B,) of `num_timesteps` the grid's that they stand for, and the ones before those; the first's is 0."""
    between = num_timesteps // solver_steps
    number = (timesteps // between).clamp(max=solver_steps - 1)
    return (number + 1) * between - 1, (number * between - 1).clamp(min=0)


def shrunk(error: Tensor, c: float) -> Tensor:
    """sqrt(e^2 + c^2) - c of every element, which does not lose small errors in a difference."""
    square = error.square()
    return square / ((square + c**2).sqrt() + c)


@dataclass(frozen=True)
class Distilling:
    """The loss of each sample (B,). `schedule`: the base's, as DDPM defines it, with its prediction; `teacher`: the base as it was; `c`: of the
    loss. A batch has `guidance` (B,), and `captions` or the conditioning of an empty one (`more`)."""

    schedule: Any
    teacher: Denoise
    solver_steps: int
    c: float

    def __call__(self, denoiser: nn.Module, batch: Mapping[str, Any], noise: Tensor, timesteps: Tensor) -> Tensor:
        here, before = neighbours(timesteps, self.solver_steps, self.schedule.config.num_train_timesteps)
        noisy = self.schedule.add_noise(batch["latents"], noise, here)
        with torch.no_grad():  # before there is a graph
            earlier = self.step(noisy, here, before, batch)
            target = self.end(denoiser, earlier, before, batch)
        torch.clear_autocast_cache()  # or older versions of torch take weights that were cast without a graph for those that learn
        losses = mean_error(shrunk(self.end(denoiser, noisy, here, batch) - target, self.c), batch)
        return losses * batch["weights"] if "weights" in batch else losses

    def step(self, noisy: Tensor, here: Tensor, before: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """x at `before` (B,) of x at `here`, one DDIM step of the teacher with guidance."""
        without = self.teacher(noisy, here, captionless(batch))
        guidance = batch[GUIDANCE].view(-1, 1, 1, 1)
        said = without + guidance * (self.teacher(noisy, here, batch) - without)
        signal, spread = self.shares(before)
        kind, now = self.schedule.config.prediction_type, self.shares(here)
        return signal * PICTURES[kind](said, noisy, *now) + spread * NOISES[kind](said, noisy, *now)

    def end(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """f of `noisy` (B, C, h, w) at `timesteps` (B,)."""
        skip, out = boundary(timesteps)
        said = denoiser(noisy, timesteps, batch)
        return skip * noisy + out * PICTURES[self.schedule.config.prediction_type](said, noisy, *self.shares(timesteps))

    def shares(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(a_t) and sqrt(1 - a_t), each (B, 1, 1, 1)."""
        a = self.schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return a.sqrt(), (1 - a).sqrt()


def captionless(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with an empty caption for every sample."""
    if "captions" in batch:
        return {**batch, "captions": [""] * len(batch["captions"])}
    return {**batch, **{name.removeprefix(WITHOUT): x for name, x in batch.items() if name.startswith(WITHOUT)}}


def objective(parts: Parts) -> Distilling:
    asked, schedule = parts.run.objective.consistency, parts.plain.schedule
    if asked.solver_steps > schedule.config.num_train_timesteps:
        raise ConfigError(
            f"objective.consistency.solver_steps {asked.solver_steps} is more than the {schedule.config.num_train_timesteps} timesteps that the"
            " base has: lower it"
        )
    return Distilling(schedule, parts.base, asked.solver_steps, asked.huber_c)


def more(run: RunConfig, encoded: EncodedDataset, ids: Sequence[int], step: int) -> dict[str, Tensor]:
    """The guidance scale of each sample (B,), and, where captions are encoded, what an empty one gives, for each."""
    least, most = run.objective.consistency.guidance_scale
    shares = torch.stack([torch.rand((), generator=generator_for(run.seed, "guidance scale", step, i)) for i in ids])
    found = {GUIDANCE: least + (most - least) * shares}
    if encoded.text is not None:
        empty = encoded.text([""])
        found |= {f"{WITHOUT}{name}": x.expand(len(ids), *x.shape[1:]) for name, x in empty.items()}
    return found


def always(run: RunConfig) -> bool:
    return True


def passes(run: RunConfig) -> tuple[int, int]:
    return 1, 3


CONSISTENCY = Method(objective, always, more, passes)
