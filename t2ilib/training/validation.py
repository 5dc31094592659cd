"""Held-out loss on a fixed grid of timesteps and noise.

Training noise and timesteps make one validation loss vary by some 7%; fixed, stratified timesteps with the same noise for
every checkpoint and every variant make two losses comparable: the difference between them has thousands of times less
variance than with fresh noise. The loss is the plain mean squared error, so that objectives' weights do not enter.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from t2ilib.data.cache import EncodedDataset
from t2ilib.evaluation.metrics import Metric
from t2ilib.memory import pictures_at_once
from t2ilib.seeds import generator_for

HELD_OUT = {
    "held_out_loss": Metric("held-out loss", "loss", "lower", table="Learned and kept", role="loss"),
    "held_out_pictures": Metric("held-out pictures", "count", None, True, table="Learned and kept"),
}
GRID_SEED = 0
"""The grid does not depend on the run's seed: all runs are measured with the same ruler."""
AT_ONCE = 32
"""Rows of the grid, a picture at a timestep each, in one pass of the UNet; fewer where they are large."""


@dataclass(frozen=True)
class HeldOutLoss:
    """`losses`: (N, K), by picture and timestep. `timesteps`: (K,)."""

    losses: Tensor
    timesteps: Tensor

    def metrics(self) -> dict[str, float]:
        """The mean, and the mean at each timestep, over so many pictures."""
        by_timestep = {
            f"held_out_loss/t{int(t):04d}": float(v) for t, v in zip(self.timesteps, self.losses.mean(0), strict=True)
        }
        told = {"held_out_loss": float(self.losses.mean()), "held_out_pictures": float(len(self.losses))}
        return told | by_timestep

    def by_picture(self) -> list[float]:
        return self.losses.mean(1).tolist()


@torch.no_grad()
def held_out_loss(
    denoiser: nn.Module,
    objective,
    held_out: EncodedDataset,
    num_train_timesteps: int,
    num_timesteps: int,
    device: torch.device,
) -> HeldOutLoss:
    """Loss of every held-out picture at `num_timesteps` timesteps, the middles of equal strata of the schedule."""
    timesteps = ((torch.arange(num_timesteps) + 0.5) / num_timesteps * num_train_timesteps).long()
    shape, count = held_out.latents.shape[1:], len(held_out) * num_timesteps
    pictures, places = torch.arange(count) // num_timesteps, torch.arange(count) % num_timesteps
    parts, noise = [], {}
    for part in torch.arange(count).split(pictures_at_once(8 * shape[-1], AT_ONCE)):
        ids = pictures[part].tolist()
        noise = {
            i: noise[i] if i in noise else torch.randn((num_timesteps, *shape), generator=generator_for(GRID_SEED, "held-out noise", i))
            for i in dict.fromkeys(ids)
        }  # fmt: skip
        its_own = torch.stack([noise[i][k] for i, k in zip(ids, places[part].tolist(), strict=True)])
        batch = held_out.batch(ids, [False] * len(ids), device)
        parts.append(objective(denoiser, batch, its_own.to(device), timesteps[places[part]].to(device)).cpu())
    return HeldOutLoss(torch.cat(parts).view(len(held_out), num_timesteps), timesteps)
