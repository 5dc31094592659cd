"""The average of the trained weights (EMA), and what its horizon means in steps."""

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from t2ilib.config import TrainingConfig

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel

log = logging.getLogger(__name__)

POWER = 0.75
"""Of the warm-up: after n steps the decay is 1 - n^-0.75 at most, so that the weights before training are gone after the first (K. Crowson's,
in diffusers' `EMAModel`)."""
FEW = 3


def build_average(parameters: Sequence[nn.Parameter], config: TrainingConfig) -> "EMAModel":
    """The average of `parameters`: shadow <- d shadow + (1 - d) weights in every step, with d = min(1 - 1 / horizon, 1 - n^-0.75) in the
    n-th."""
    from diffusers.training_utils import EMAModel

    return EMAModel(parameters, decay=1 - 1 / config.ema_horizon, use_ema_warmup=True, power=POWER)


def rest_on_host(average: "EMAModel", device: torch.device) -> None:
    """The weights of an `EMAModel` to host memory, pinned if they must come from there to a GPU."""
    average.to("cpu")
    if device.type == "cuda":
        average.pin_memory()


@contextlib.contextmanager
def at_hand(average: "EMAModel", device: torch.device) -> Iterator[None]:
    """The weights of an `EMAModel` on `device` for as long as the scope lasts, wherever they rest."""
    resting = average.shadow_params
    average.to(device, non_blocking=True)
    yield
    for rests, works in zip(resting, average.shadow_params, strict=True):
        if rests is not works:
            rests.copy_(works)
    average.shadow_params = resting


def tell_average(config: TrainingConfig) -> None:
    """Says how far the average reaches back, and warns where the run is too short for its horizon."""
    horizon, steps = config.ema_horizon, config.steps
    reached, at_end = math.ceil(horizon ** (1 / POWER)), max(1, round(min(horizon, steps**POWER)))
    log.info(
        "the average of the weights reaches back n^%g steps at step n, at most %d, from step %d on: %d at the end",
        POWER,
        horizon,
        reached,
        at_end,
    )
    if steps < FEW * horizon:
        log.warning(
            "training.ema_horizon is %d, and the run has %d steps: its average will reach back %d of them and lag behind what is learned"
            " last. A horizon of a tenth of the steps would be %d",
            horizon,
            steps,
            at_end,
            max(1, steps // 10),
        )
