"""One step of the loop, up to its gradients. A function of the run and the step's number; planning traces this same one."""

import contextlib
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from t2ilib.config import RunConfig
from t2ilib.seeds import seed_for
from t2ilib.training.objectives import addressed_noise
from t2ilib.training.processes import own_parts
from t2ilib.training.setups import Setup
from t2ilib.training.sharding import whole


def take_gradients(
    run: RunConfig,
    setup: Setup,
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    accelerator: Accelerator,
    step: int,
    ids: list[int],
) -> tuple[Tensor, Tensor]:
    """Adds up the gradients of the samples `ids` in micro-batches, those of this process, and clips their mean over all processes.

    `model`: `setup.model` as `accelerator` prepared it; `parameters`: those that it trains. Returns the loss of every sample of this
    process, without a graph, and the norm of the gradients before clipping.
    """
    losses, own = [], own_parts(ids, run.training.accumulation, accelerator)
    for number, share in own:
        last = number == own[-1][0]
        torch.manual_seed(seed_for(run.seed, "dropout", step, number))
        batch = setup.batch(share, step)
        if last and step + 1 < run.training.steps:
            parts = own_parts(setup.order(step + 1), run.training.accumulation, accelerator)
            setup.announce([i for _, part in parts for i in part], step + 1)
        shape = tuple(batch["latents"].shape[1:]) if "latents" in batch else ()
        noise, timesteps = addressed_noise(run.seed, step, share, shape, setup.num_timesteps, run.objective)
        noise, timesteps = noise.to(accelerator.device), timesteps.to(accelerator.device)
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            # weight(t) |model(x_t, t) - target|^2 of each sample; x_t is its latents with noise (`objectives`, and others in `methods`)
            with accelerator.autocast():  # for networks beside the model, which has it already
                per_sample = setup.objective(model, batch, noise, timesteps)
            accelerator.backward(per_sample.mean() / run.training.accumulation)
        losses.append(per_sample.detach())
    setup.hold(step)
    return torch.cat(losses), whole(accelerator.clip_grad_norm_(parameters, run.optimizer.max_grad_norm))
