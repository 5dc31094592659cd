"""Pairs of pictures of one caption, one chosen and one rejected: how a batch holds both, and what held-out ones say of a model.

A model's implicit reward of a picture is how much better than the base it denoises it (arXiv 2311.12908, eq. 11 to 14, without beta). It is measured
on a fixed grid of timesteps and noise, as the held-out loss is: two checkpoints, or two variants, are asked the same.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from t2ilib.evaluation.metrics import Metric
from t2ilib.training.objectives import Denoising, Objective
from t2ilib.training.others import Denoise
from t2ilib.training.validation import HeldOutLoss

TABLE = "Preferences"
RANKED = {
    "pairs/ranked": Metric(
        "held-out pairs ranked as they were chosen",
        "share",
        "higher",
        table=TABLE,
        note="pairs of which the model denoises the chosen picture better than the rejected one",
    ),
    "pairs/held_out": Metric("held-out pairs", "count", None, True, table=TABLE),
}
AGAINST_THE_BASE = {
    "pairs/accuracy": Metric(
        "implicit reward accuracy",
        "share",
        "higher",
        table=TABLE,
        note="held-out pairs whose chosen picture gained more on the rejected one than in the base; where nothing was learned a half",
    ),
    "pairs/margin": Metric(
        "implicit reward margin",
        "loss",
        "higher",
        table=TABLE,
        note="by how much, without beta: the mean lead in squared error over the base's",
    ),
    "pairs/distance": Metric(
        "distance from the base",
        "loss",
        None,
        table=TABLE,
        note="mean squared difference of what model and base predict of held-out chosen pictures",
    ),
}


def of_both(batch: Mapping[str, Any], noise: Tensor, timesteps: Tensor) -> tuple[dict[str, Any], Tensor, Tensor]:
    """The batch of 2B of a batch of B pairs: the chosen pictures, then the rejected ones, under the same noise at the same timesteps. Weights are
    left out: they are of pairs."""
    both = {}
    for name, value in rejected_of(batch).items():
        own = batch[name]
        both[name] = torch.cat([own, value]) if isinstance(value, Tensor) else [*own, *value]
    both.pop("weights", None)
    return both, torch.cat([noise] * 2), torch.cat([timesteps] * 2)


def rejected_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch of the rejected pictures of a batch of pairs, with all that is theirs."""
    theirs = {"latents": "rejected", "time_ids": "rejected_time_ids"}
    return {name: batch[theirs.get(name, name)] for name in batch if name not in theirs.values()}


class HeldOutPairs:
    """What held-out pairs say of a model. `base`: the base as it was, None where it is not at hand; `on_grid`: of a denoiser an objective's losses
    of every pair on the fixed grid."""

    def __init__(self, plain: Denoising, base: Denoise | None, on_grid: Callable[[Denoise, Objective], HeldOutLoss]):
        self.plain, self.base, self.on_grid = plain, base, on_grid
        self.led: Tensor | None = None
        """How much better the base denoises the chosen picture of each pair (N,)."""

    def declared(self) -> dict[str, Metric]:
        return RANKED if self.base is None else RANKED | AGAINST_THE_BASE

    def rejected(self, denoiser: Denoise, batch: Mapping[str, Any], noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.plain(denoiser, rejected_of(batch), noise, timesteps)

    def apart(self, denoiser: Denoise, batch: Mapping[str, Any], noise: Tensor, timesteps: Tensor) -> Tensor:
        noisy = self.plain.schedule.add_noise(batch["latents"], noise, timesteps)
        between = denoiser(noisy, timesteps, batch) - self.base(noisy, timesteps, batch)
        return between.square().mean(dim=(1, 2, 3))

    def leads(self, denoiser: Denoise, chosen: Tensor | None = None) -> Tensor:
        """(N,): how much better it denoises the chosen picture. `chosen`: its losses of those (N, K), where they are known."""
        chosen = self.on_grid(denoiser, self.plain).losses if chosen is None else chosen
        return (self.on_grid(denoiser, self.rejected).losses - chosen).mean(1)

    def measure(self, denoiser: Denoise, chosen: Tensor) -> dict[str, float]:
        """The metrics of RANKED and, where the base is at hand, AGAINST_THE_BASE. `chosen`: as of `leads`."""
        leads = self.leads(denoiser, chosen)
        metrics = {"pairs/ranked": share_above(leads), "pairs/held_out": float(len(leads))}
        if self.base is None:
            return metrics
        if self.led is None:
            self.led = self.leads(self.base)
        gained = leads - self.led
        return metrics | {
            "pairs/accuracy": share_above(gained),
            "pairs/margin": float(gained.mean()),
            "pairs/distance": float(self.on_grid(denoiser, self.apart).losses.mean()),
        }


def share_above(values: Tensor) -> float:
    """Of `values` (N,) those above 0, and half of those that are 0."""
    return float((values > 0).double().mean() + (values == 0).double().mean() / 2)
