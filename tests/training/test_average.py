"""What a horizon means is told in steps; the average itself is checked on a run, in test_loop."""

import pytest
import torch
from torch import nn

from t2ilib.config import TrainingConfig
from t2ilib.training.average import build_average, tell_average


@pytest.mark.parametrize(
    ("horizon", "steps", "told", "warned"),
    [
        (100, 10_000, "at most 100, from step 465 on: 100 at the end", None),
        (1000, 5000, "at most 1000, from step 10000 on: 595 at the end", None),
        (1000, 200, "at most 1000, from step 10000 on: 53 at the end", "the run has 200 steps: its average will reach back 53"),
    ],
)  # fmt: skip
def test_a_horizon_is_told_in_steps(caplog, horizon, steps, told, warned) -> None:
    caplog.set_level("INFO")
    tell_average(TrainingConfig(ema_horizon=horizon, steps=steps))
    messages = {record.levelname: record.getMessage() for record in caplog.records}
    assert told in messages["INFO"]
    assert ("WARNING" in messages) == (warned is not None)
    assert warned is None or warned in messages["WARNING"]


def test_it_reaches_back_as_far_as_is_told() -> None:
    """The mean age of what is averaged, of weights that are the number of their step; the first one's share is gone."""
    weight = nn.Parameter(torch.tensor([1e6], dtype=torch.float64))
    average = build_average([weight], TrainingConfig(ema_horizon=100))
    for step in range(1, 3001):
        weight.data.fill_(float(step))
        average.step([weight])
    assert 3000 - float(average.shadow_params[0]) == pytest.approx(99, rel=1e-3)
