"""Held-out loss on a fixed grid of timesteps and noise.

Training noise and timesteps make one validation loss vary by some 7%; fixed, stratified timesteps with the same noise for
every checkpoint and every variant make two losses comparable: the difference between them has thousands of times less
variance than with fresh noise. The loss is the plain mean squared error over the whole schedule, so that objectives' weights, losses,
offsets and choices of timesteps do not enter; under another noise schedule or prediction it is another ruler.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from t2ilib.data.cache import EncodedDataset
from t2ilib.evaluation.metrics import Metric
from t2ilib.memory import pictures_at_once
from t2ilib.models.components import Components
from t2ilib.seeds import generator_for
from t2ilib.training.objectives import Denoising

HELD_OUT = {
    "held_out_loss": Metric("held-out loss", "loss", "lower", table="Learned and kept", role="loss"),
    "held_out_pictures": Metric("held-out pictures", "count", None, True, table="Learned and kept"),
}
GRID_SEED = 0
"""The grid does not depend on the run's seed: all runs are measured with the same ruler."""
AT_ONCE = 32
"""Rows of the grid, a picture at a timestep each, in one pass of the UNet; fewer where they are large."""


def declared(objective: Denoising, components: Components) -> dict[str, Metric]:
    """HELD_OUT, with what exactly the loss is of: the prediction, the noise and the space."""
    config = objective.schedule.config
    betas = () if config.beta_schedule == "squaredcos_cap_v2" else (config.beta_start, config.beta_end)
    zero = ("zero terminal SNR",) if config.rescale_betas_zero_snr else ()
    space = (
        ((components.config and components.config.vae) or components.path) if components.family.has_vae else "pixels"
    )
    told = " ".join(map(str, (objective.predicts, config.beta_schedule, *betas, *zero, space)))
    return HELD_OUT | {"held_out_loss": replace(HELD_OUT["held_out_loss"], quantity=told)}


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
    losses = torch.empty(len(held_out), num_timesteps)
    for ids in held_out.samples.of_one_size():
        losses[ids] = losses_of(denoiser, objective, held_out, ids, timesteps, device)
    return HeldOutLoss(losses, timesteps)


def losses_of(
    denoiser: nn.Module, objective, held_out: EncodedDataset, ids: list[int], timesteps: Tensor, device: torch.device
) -> Tensor:
    """Losses (N, K) of these pictures, which have one size, at `timesteps` (K,)."""
    num_timesteps, side = len(timesteps), max(held_out.samples.targets[ids[0]])
    rows = [(i, k) for i in ids for k in range(num_timesteps)]
    at_once, parts, noise = pictures_at_once(side, AT_ONCE), [], {}
    for start in range(0, len(rows), at_once):
        part = rows[start : start + at_once]
        pictures, places = (list(column) for column in zip(*part, strict=True))
        batch = held_out.batch(pictures, 0, [False] * len(part), device)
        shape = batch["latents"].shape[1:]
        noise = {
            i: noise[i] if i in noise else torch.randn((num_timesteps, *shape), generator=generator_for(GRID_SEED, "held-out noise", i))
            for i in dict.fromkeys(pictures)
        }  # fmt: skip
        its_own = torch.stack([noise[i][k] for i, k in part])
        parts.append(objective(denoiser, batch, its_own.to(device), timesteps[places].to(device)).cpu())
    return torch.cat(parts).view(len(ids), num_timesteps)
