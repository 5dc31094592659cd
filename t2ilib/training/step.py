"""One step of the loop, up to its gradients. A function of the run and the step's number; planning traces this same one."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from t2ilib.config import RunConfig
from t2ilib.seeds import seed_for
from t2ilib.training.objectives import addressed_noise
from t2ilib.training.setups import Setup


def take_gradients(
    run: RunConfig,
    setup: Setup,
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    accelerator: Accelerator,
    step: int,
    ids: list[int],
) -> tuple[Tensor, Tensor]:
    """Adds up the gradients of the samples `ids` in micro-batches, and clips them.

    `model`: `setup.model` as `accelerator` prepared it; `parameters`: those that it trains. Returns the loss of every sample (B,),
    without a graph, and the norm of the gradients before clipping.
    """
    losses = []
    for micro, share in enumerate(micro_batches(ids, run.training.accumulation)):
        torch.manual_seed(seed_for(run.seed, "dropout", step, micro))
        batch = setup.batch(share, step)
        noise, timesteps = addressed_noise(run.seed, step, share, setup.noise_shape, setup.num_timesteps)
        noise, timesteps = noise.to(accelerator.device), timesteps.to(accelerator.device)
        # weight(t) |model(x_t, t) - target|^2 of each sample; x_t is its latents with noise (`objectives`)
        per_sample = setup.objective(model, batch, noise, timesteps)
        accelerator.backward(per_sample.mean() / run.training.accumulation)
        losses.append(per_sample.detach())
    return torch.cat(losses), accelerator.clip_grad_norm_(parameters, run.optimizer.max_grad_norm)


def micro_batches(ids: list[int], accumulation: int) -> list[list[int]]:
    """A batch in `accumulation` equal parts; the config has made sure that it divides."""
    size = len(ids) // accumulation
    return [ids[i : i + size] for i in range(0, len(ids), size)]
