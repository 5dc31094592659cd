"""Intervals of a mean, against scipy."""

import numpy as np
import pytest
from scipy import stats

from t2ilib.statistics.means import mean_interval


def test_mean_interval_is_scipys():
    values = [0.61, 0.72, 0.55, 0.68, 0.70]
    interval = mean_interval(values, level=0.9)
    low, high = stats.t.interval(0.9, 4, loc=np.mean(values), scale=stats.sem(values))
    assert (interval.mean, interval.low, interval.high) == pytest.approx((np.mean(values), low, high))
    assert interval.count == 5
    assert interval.half_width == pytest.approx((high - low) / 2)


def test_one_value_has_no_interval_and_none_is_an_error():
    interval = mean_interval([3.0])
    assert (interval.mean, interval.low, interval.high, interval.half_width, interval.count) == (
        3.0,
        None,
        None,
        None,
        1,
    )
    for wrong in ([], [1.0, float("nan")], [float("inf")]):
        with pytest.raises(ValueError, match="at least one value, all finite"):
            mean_interval(wrong)
    with pytest.raises(ValueError, match="level"):
        mean_interval([1.0, 2.0], level=95)
