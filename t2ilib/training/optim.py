"""Optimizers by name, over named groups of parameters, each with its own learning rate, and the schedule of those rates.

On a CPU `adamw8bit` costs some 35 times fused AdamW a step: it is there to be the same optimizer, not to be fast.
"""

import contextlib
import logging
from collections.abc import Callable

import torch
from torch import nn

from t2ilib.adapters.tokens import VECTORS
from t2ilib.config import OptimizerConfig

log = logging.getLogger(__name__)


BLOCK_OF_MOMENTS = 256
"""Elements that bitsandbytes quantizes together. Its own limit for 8-bit moments is 4,096 elements, under which the matrices of a
small adapter all stay: a comparison of 8-bit moments would compare none."""


def adamw(groups: list[dict], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Decoupled weight decay (arXiv 1711.05101)."""
    return torch.optim.AdamW(groups, betas=config.betas, weight_decay=config.weight_decay, fused=True)


def adamw8bit(groups: list[dict], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW with block-wise 8-bit moments (arXiv 2110.02861); tensors smaller than a block keep 32-bit moments."""
    import bitsandbytes as bnb

    return bnb.optim.AdamW8bit(
        groups, betas=config.betas, weight_decay=config.weight_decay, min_8bit_size=BLOCK_OF_MOMENTS
    )


def prodigy(groups: list[dict], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Prodigy (arXiv 2306.06101): estimates the step size; `learning_rate` multiplies it and is best left at 1."""
    from prodigyopt import Prodigy

    with contextlib.redirect_stdout(None):  # it prints that it decouples the weight decay
        return Prodigy(
            groups,
            betas=config.betas,
            weight_decay=config.weight_decay,
            decouple=True,
            use_bias_correction=True,
            safeguard_warmup=True,
        )


OPTIMIZERS: dict[str, Callable[[list[dict], OptimizerConfig], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "adamw8bit": adamw8bit,
    "prodigy": prodigy,
}


def share_of_8bit_moments(optimizer: torch.optim.Optimizer) -> float | None:
    """Of the elements of an optimizer's moments, those that are kept in 8 bits; None before the first step, and of an optimizer whose
    moments have as many bits as its parameters."""
    moments = [
        tensor
        for state in optimizer.state.values()
        for name, tensor in state.items()
        if name in ("state1", "state2") and isinstance(tensor, torch.Tensor)
    ]
    total = sum(tensor.numel() for tensor in moments)
    return sum(tensor.numel() for tensor in moments if tensor.dtype == torch.uint8) / total if total else None


def parameter_groups(modules: dict[str, nn.Module], config: OptimizerConfig) -> list[dict]:
    """One group for each module with trainable parameters; text encoders take `text_encoder_learning_rate` where given. Their new
    words are a group without weight decay, which takes `token_learning_rate`.

    With `lora_plus_ratio` the B of every adapter is a group of its own, whose rate is that many times A's (LoRA+, arXiv
    2402.12354).
    """
    groups = []
    for name, module in modules.items():
        rate = config.learning_rate
        if name.startswith("text_encoder") and config.text_encoder_learning_rate is not None:
            rate = config.text_encoder_learning_rate
        parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        faster = [n for n in parameters if config.lora_plus_ratio is not None and ".lora_B." in n]
        words = [n for n in parameters if n.endswith(VECTORS)]
        rest = [p for n, p in parameters.items() if n not in (*faster, *words)]
        if rest:
            groups.append({"name": name, "params": rest, "lr": rate})
        if faster:
            group = {"name": f"{name}.lora_B", "params": [parameters[n] for n in faster]}
            groups.append(group | {"lr": rate * config.lora_plus_ratio})
        if words:
            group = {"name": f"{name}.words", "params": [parameters[n] for n in words], "weight_decay": 0.0}
            groups.append(group | {"lr": config.token_learning_rate or config.learning_rate})
    return groups


def build_optimizer(groups: list[dict], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer `config.name` over `groups`; warns of a rate that is far from what such an optimizer wants."""
    if config.name == "prodigy" and not 0.1 <= config.learning_rate <= 10:
        log.warning(
            "optimizer.learning_rate is %g, and prodigy multiplies its own estimate of the step size by it: far below 1 nothing"
            " moves, far above nothing is learned. Leave it out, or set it to 1",
            config.learning_rate,
        )
    return OPTIMIZERS[config.name](groups, config)


def build_schedule(
    optimizer: torch.optim.Optimizer, config: OptimizerConfig, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over `warmup_steps`, then constant, cosine or linear to zero at `steps`."""
    from diffusers.optimization import get_scheduler

    if config.warmup_steps >= steps > 0:
        log.warning(
            "optimizer.warmup_steps is %d and the run has %d steps: its learning rate only rises; make it smaller",
            config.warmup_steps,
            steps,
        )
    name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    return get_scheduler(name, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=steps)
