"""Power against scipy's noncentral t where that can be computed, and against simulated studies."""

import numpy as np
import pytest
from scipy import stats

from t2ilib.statistics import power as power_module
from t2ilib.statistics.pooled import differences
from t2ilib.statistics.power import limits_drawn, power, seeds_needed, smallest_found


@pytest.mark.parametrize(("size", "seeds", "variants"), [(1.0, 2, 2), (0.5, 6, 3), (1.5, 12, 8), (0.0, 3, 4)])
def test_power_is_that_of_the_noncentral_t(size: float, seeds: int, variants: int, monkeypatch) -> None:
    df, shift = variants * (seeds - 1), size / np.sqrt(2 / seeds)
    limit = stats.t.isf(0.005, df)
    expected = stats.nct.sf(limit, df, shift) + stats.nct.cdf(-limit, df, shift)
    monkeypatch.setattr(power_module, "UNLIKE", 1e-300)  # noise is not looked at
    limits_drawn.cache_clear()
    assert power(size, 1.0, seeds, variants, alpha=0.01) == pytest.approx(expected, abs=0.01)
    limits_drawn.cache_clear()


def test_power_is_how_often_simulated_studies_show_a_difference() -> None:
    rng = np.random.default_rng(0)
    shown = []
    for _ in range(600):
        drawn = rng.normal(size=(4, 3)) * 2 + np.array([[0], [7], [0], [0]])
        values = {name: dict(enumerate(row)) for name, row in zip("abcd", drawn, strict=True)}
        found = differences(values, [(name, "a") for name in "bcd"])[0]
        shown.append(found.shown == 1)
        alpha = found.alpha
    expected = power(7, 2, 3, 4, alpha)
    assert np.mean(shown) == pytest.approx(expected, abs=0.04)


def test_as_many_seeds_as_are_needed_and_no_more() -> None:
    for size in (0.3, 1.0, 4.0):
        needed = seeds_needed(size, 1.0, 3, alpha=0.02)
        assert power(size, 1.0, needed, 3, 0.02) >= 0.8 > power(size, 1.0, needed - 1, 3, 0.02)
        assert size >= smallest_found(1.0, needed, 3, 0.02) > 0
        assert smallest_found(1.0, needed - 1, 3, 0.02) is None or size < smallest_found(1.0, needed - 1, 3, 0.02)
    assert seeds_needed(0.0, 1.0, 3) is None
    assert seeds_needed(0.001, 1.0, 3) is None, "over a thousand"
    assert seeds_needed(40.0, 1.0, 3) == 2
    assert power(1.0, 1.0, 1, 3) == 0, "one seed knows of no noise"
    assert smallest_found(1.0, 1, 3) is None


def test_a_base_that_takes_no_step_adds_no_noise() -> None:
    assert power(1.0, 1.0, 4, 3, still=True) > power(1.0, 1.0, 4, 3)
    assert power(1.0, 0.0, 4, 3) == 1
