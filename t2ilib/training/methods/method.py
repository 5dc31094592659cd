"""What an objective beside denoising is to the rest: what it needs, what it adds to a batch, what it minimises.

A method knows the model as every objective does, as a denoiser, and what it learns from or is held to, the base as it was, as another one
(`training.others`). So loop, planner, checkpoints and proof of training see one objective more, and ask nothing about it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from t2ilib.config import RunConfig
from t2ilib.data.cache import EncodedDataset
from t2ilib.evaluation.metrics import Metric
from t2ilib.models.denoiser import Denoiser
from t2ilib.training.objectives import Denoising, Objective
from t2ilib.training.others import Denoise


@dataclass(frozen=True)
class Parts:
    """What a method makes its objective of. `plain`: denoising as the run's `objective` section has it; `denoiser`: what is trained, as it is
    before the loop wraps it; `base`: the base as it was, where `Method.needs_base` asked for it."""

    run: RunConfig
    plain: Denoising
    denoiser: Denoiser
    base: Denoise | None


def never(run: RunConfig) -> bool:
    return False


def one_pass(run: RunConfig) -> tuple[int, int]:
    return 1, 0


def nothing_more(run: RunConfig, encoded: EncodedDataset, ids: Sequence[int], step: int) -> dict[str, Tensor]:
    return {}


def one_term(objective: Objective, plain: Denoising) -> dict[str, tuple[Metric, Objective]]:
    return {}


@dataclass(frozen=True)
class Method:
    """`objective`: what is minimised. `needs_base`: whether that takes the base as it was. `more`: what a batch has beside pictures and captions,
    of these samples at this step. `passes`: of the UNet for each sample, those that learn and those without gradients. `of_pairs`: whether it
    learns from pairs, and from nothing else. `terms`: of what is minimised, by the name of its metric, what held-out pictures are measured by on their own, with an error counted
    plainly."""

    objective: Callable[[Parts], Objective]
    needs_base: Callable[[RunConfig], bool] = never
    more: Callable[[RunConfig, EncodedDataset, Sequence[int], int], dict[str, Tensor]] = nothing_more
    passes: Callable[[RunConfig], tuple[int, int]] = one_pass
    of_pairs: bool = False
    terms: Callable[[Objective, Denoising], Mapping[str, tuple[Metric, Objective]]] = one_term
