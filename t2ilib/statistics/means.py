"""A mean and how far it can be trusted: Student's interval.

What cannot be computed is None, never NaN.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
SLACK = 1e-9
"""Of a sum of absolute values: sums that are equal on paper differ in the last bits."""


@dataclass(frozen=True)
class Interval:
    """A mean in the unit of the values; `low` and `high` are None for a single value, which says nothing about
    spread."""

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def half_width(self) -> float | None:
        return None if self.low is None else (self.high - self.low) / 2


def mean_interval(values: Iterable[float], level: float = LEVEL) -> Interval:
    """Student's t-interval of the mean (Student 1908): mean +- t(n-1) * s / sqrt(n). Raises ValueError without finite
    values."""
    numbers = np.asarray(list(values), dtype=float)
    if numbers.size == 0 or not np.isfinite(numbers).all():
        raise ValueError(f"a mean needs at least one value, all finite; got {numbers.tolist()}")
    if not 0 < level < 1:
        raise ValueError(f"level {level} is not between 0 and 1")
    mean = float(numbers.mean())
    if numbers.size == 1:
        return Interval(mean, None, None, 1)
    half = float(stats.t.ppf((1 + level) / 2, numbers.size - 1) * numbers.std(ddof=1) / math.sqrt(numbers.size))
    return Interval(mean, mean - half, mean + half, int(numbers.size))
