"""The sign-flip test against enumeration by hand, its interval against a search."""

import itertools

import numpy as np
import pytest
from scipy import stats

from t2ilib.statistics.signs import exact_difference, flip_interval, sign_flip_p, smallest_p


def test_differences_are_taken_by_seed():
    values = {3: 0.9, 0: 0.5, 1: 0.6, 2: 0.8, 9: 100.0}
    reference = {0: 0.4, 1: 0.55, 2: 0.6, 3: 0.65, 7: -100.0}
    found = exact_difference(values, reference)
    assert (found.num_pairs, found.mean) == (4, pytest.approx(0.15))
    assert found.p_value == 2 / 2**4, "all four favour the variant: only all-plus and all-minus are as extreme"
    assert found.low is found.high is None, "fewer than six"
    assert exact_difference({0: 1.0}, {1: 1.0}) is None
    assert exact_difference({0: 2.0}, {0: 1.5}).p_value is None


def test_pairing_removes_what_seeds_share():
    shared = {seed: 10.0 * seed for seed in range(8)}
    better = {seed: shared[seed] + 1 + 0.1 * (-1) ** seed for seed in range(8)}
    assert exact_difference(better, shared).low > 0.8


def test_sign_flip_on_a_case_counted_by_hand():
    # |+-1 +-2 +-3|: 6, 4, 2, 0 twice each; the observed sum is 1 + 2 - 3 = 0, then -1 + 2 + 3 = 4.
    assert sign_flip_p([1, 2, -3]) == 1.0
    assert sign_flip_p([-1, 2, 3]) == 4 / 8
    assert sign_flip_p([0.0, 0.0, 0.0]) == 1.0


def test_sign_flip_is_scipys_permutation_test():
    differences = np.random.default_rng(0).normal(0.4, 1, 9)
    scipy_p = stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    assert sign_flip_p(differences) == pytest.approx(scipy_p)


def test_sign_flip_survives_rounding():
    # 0.1 + 0.2 + 0.3 in another order differs in the last bit; it must still count as extreme as itself.
    for order in itertools.permutations([0.1, 0.2, 0.3, 0.7, 1e-3]):
        assert sign_flip_p(order) == 2 / 2**5


def test_many_seeds_use_a_fixed_monte_carlo_near_the_exact_p():
    differences = np.random.default_rng(1).normal(0.5, 1, 16)
    signs = np.array(list(itertools.product((1, -1), repeat=16)))
    exact = (np.abs(signs @ differences) >= abs(differences.sum()) - 1e-12).mean()
    assert sign_flip_p(differences) == sign_flip_p(differences)
    assert sign_flip_p(differences) == pytest.approx(exact, abs=4 * np.sqrt(exact / 20_000))
    assert sign_flip_p([1.0] * 30) > 0


def test_fewer_than_six_seeds_cannot_reach_five_percent():
    assert sign_flip_p([1.0] * 5) == smallest_p(5) == 0.0625
    assert sign_flip_p([1.0] * 6) == smallest_p(6) == 0.03125
    assert smallest_p(1) is None


def by_seed(values) -> dict[int, float]:
    return dict(enumerate(map(float, values)))


ZERO = by_seed([0.0] * 40)


def test_the_interval_of_sign_flips_is_the_shifts_that_the_test_does_not_refuse():
    """Against a search along shifts, which knows nothing of subsets."""
    rng = np.random.default_rng(2)
    for count in (6, 7, 8, 9):
        differences = rng.normal(0.3, 1, count)
        low, high = flip_interval(differences)
        kept = [shift for shift in np.linspace(-4, 4, 4001) if sign_flip_p(differences - shift) >= 0.05]
        assert (low, high) == pytest.approx((min(kept), max(kept)), abs=0.0021)
    six = rng.normal(size=6)
    assert flip_interval(six) == pytest.approx((six.min(), six.max()))
    assert flip_interval(rng.normal(size=5)) is None
    low, high = flip_interval(rng.normal(0.0, 1, 30))  # random patterns; Student's is as wide, more or less
    assert 0.4 < high - low < 1.2
