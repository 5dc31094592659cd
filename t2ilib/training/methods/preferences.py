"""Learning from preferences: pairs of pictures of one caption, of which people, or a measure, chose one.

Diffusion-DPO (arXiv 2311.12908, eq. 14): with L the squared error of the prediction, a mean over its elements, of the chosen (w) and the
rejected (l) picture under one noise at one timestep,

    loss = -log sigmoid(-beta / 2 ((L_w - L_w^ref) - (L_l - L_l^ref)))

where ref is the base as it was. beta holds the paper's T and its weight of the timestep, and is counted as in its experiments (`beta_dpo` of the
authors' code), whose half is that of a Gaussian's exponent. At the start both networks are one and the loss is log 2.

MaPO (arXiv 2406.06424) has no reference: it denoises the chosen picture and widens a margin,

    loss = L_w - beta log sigmoid(T (s(L_w) - s(L_l))),    s(L) = a L / (exp(a L) - 1), a = 1/2

as in the authors' code. Both also hold for bases that predict v or the picture, whose L is that of the prediction: the paper's weight
of the timestep then has another form. With min-SNR (`objective.snr_gamma`) L is weighted so.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2ilib.config import RunConfig
from t2ilib.training.methods.method import Method, Parts
from t2ilib.training.objectives import Denoising
from t2ilib.training.others import Denoise
from t2ilib.training.pairs import of_both

SCALE = 0.5
"""MaPO's a, as its authors set it."""
SMALL = 0.01
"""Below it a likelihood is its series, whose gradient does not cancel."""


def dpo(chosen: Tensor, rejected: Tensor, leads: Tensor, beta: float, num_timesteps: int) -> Tensor:
    """`leads` (B,): how much better the reference denoises the chosen picture than the rejected one."""
    return -F.logsigmoid(beta / 2 * ((rejected - chosen) - leads))


def mapo(chosen: Tensor, rejected: Tensor, leads: Tensor, beta: float, num_timesteps: int) -> Tensor:
    margin = likelihood(chosen) - likelihood(rejected)
    return chosen - beta * F.logsigmoid(num_timesteps * margin)


def likelihood(losses: Tensor) -> Tensor:
    """a L / (exp(a L) - 1), 1 where the loss is 0, falling towards 0."""
    scaled = SCALE * losses
    large = scaled.clamp(min=SMALL)
    return torch.where(
        scaled < SMALL, 1 - scaled / 2 + scaled.square() / 12, -large * torch.exp(-large) / torch.expm1(-large)
    )


LOSSES: dict[str, tuple[Callable[[Tensor, Tensor, Tensor, float, int], Tensor], float, bool]] = {
    "dpo": (dpo, 5000.0, True),
    "mapo": (mapo, 0.1, False),
}
"""`objective.preferences.loss` -> the losses (B,) of errors of chosen and rejected pictures; the authors' beta; whether it has a reference."""


@dataclass(frozen=True)
class Preferring:
    """The loss of each pair (B,). `plain`: what an error counts; `reference`: the base as it was, where the loss compares with it."""

    plain: Denoising
    loss: Callable[[Tensor, Tensor, Tensor, float, int], Tensor]
    beta: float
    reference: Denoise | None

    def __call__(self, denoiser: nn.Module, batch: Mapping[str, Any], noise: Tensor, timesteps: Tensor) -> Tensor:
        both, noise, timesteps = of_both(batch, noise, timesteps)
        leads = torch.zeros(len(noise) // 2, device=noise.device)
        if self.reference is not None:  # before there is a graph
            with torch.no_grad():
                kept, given_up = self.plain(self.reference, both, noise, timesteps).chunk(2)
                leads = given_up - kept
        chosen, rejected = self.plain(denoiser, both, noise, timesteps).chunk(2)
        losses = self.loss(chosen, rejected, leads, self.beta, self.plain.schedule.config.num_train_timesteps)
        return losses * batch["weights"] if "weights" in batch else losses


def objective(parts: Parts) -> Preferring:
    asked = parts.run.objective.preferences
    loss, usual, _ = LOSSES[asked.loss]
    return Preferring(parts.plain, loss, usual if asked.beta is None else asked.beta, parts.base)


def compares(run: RunConfig) -> bool:
    return LOSSES[run.objective.preferences.loss][2]


def passes(run: RunConfig) -> tuple[int, int]:
    return 2, 2 * compares(run)


PREFERENCES = Method(objective, compares, passes=passes, of_pairs=True)
