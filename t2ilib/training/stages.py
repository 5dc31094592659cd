"""Resolution stages: a training whose first steps see smaller pictures (`data.stages`), as those of Stable Diffusion did.

Each stage has samples of its own, of the same pictures: their sizes, crops, buckets and micro-conditioning are those of its resolution, and so
are what is kept of them on disk and the order in which its batches come. Which stage a step belongs to is a function of its number, so
that a run goes on across a border as if it had never stopped. Captions and their conditioning are the same in all. Pictures that are
measured, and those that are drawn, have the last resolution.
"""

import logging
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch

from t2ilib.config import RunConfig
from t2ilib.data.cache import EncodedDataset
from t2ilib.data.dataset import Dataset
from t2ilib.data.loader import Order
from t2ilib.data.prior import build_order
from t2ilib.data.samples import Samples

log = logging.getLogger(__name__)


class StagedOrder:
    """The orders of the stages as one. `number(step)`: the stage of a step."""

    def __init__(self, orders: Sequence[Order], number: Callable[[int], int]):
        self.orders, self.number = orders, number

    def __call__(self, step: int) -> list[int]:
        return self.orders[self.number(step)](step)

    def epoch(self, step: int) -> int:
        """How many passes the first `step` steps have made, as the stage of the last of them counts."""
        return self.orders[self.number(max(0, step - 1))].epoch(step)


class StagedDataset:
    """An `EncodedDataset` whose batches are of the stage that a step belongs to. `stages`: from the first to that of `data.resolution`, whose
    `samples` stand for all where their sizes do not matter."""

    def __init__(self, run: RunConfig, stages: Sequence[EncodedDataset]):
        self.stages, self.samples, self.text = list(stages), stages[-1].samples, stages[-1].text
        self.ends = list(accumulate(run.data.stages.values()))
        num_class = self.samples.dataset.num_class
        self.order = StagedOrder(
            [build_order(run, len(stage) - num_class, num_class, stage.samples.buckets) for stage in self.stages],
            self.number,
        )

    def __len__(self) -> int:
        return len(self.samples)

    def number(self, step: int) -> int:
        """Which stage a step belongs to."""
        return bisect_right(self.ends, step)

    def batch(self, ids: Sequence[int], step: int, dropped: Sequence[bool], device: torch.device) -> dict[str, Any]:
        return self.stages[self.number(step)].batch(ids, step, dropped, device)

    def announce(self, ids: Sequence[int], step: int) -> None:
        self.stages[self.number(step)].announce(ids, step)

    def waited(self) -> float:
        return sum(stage.waited() for stage in self.stages)


def earlier_samples(run: RunConfig, training: Dataset, multiple: int) -> tuple[Samples, ...]:
    """The samples of the stages before `data.resolution`; tells when each begins."""
    if not run.data.stages:
        return ()
    starts = (0, *accumulate(run.data.stages.values()))
    told = [
        f"{side} pixels from step {start}"
        for side, start in zip((*run.data.stages, run.data.resolution), starts, strict=True)
    ]
    log.info("stages: %s", ", ".join(told))
    return tuple(
        Samples(training, run.data.model_copy(update={"resolution": side}), run.seed, run.training.batch_size, multiple)
        for side in run.data.stages
    )
