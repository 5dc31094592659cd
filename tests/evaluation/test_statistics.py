"""Intervals against scipy, the sign-flip test against enumeration by hand, the adjustment against enumeration."""

import itertools

import numpy as np
import pytest
from scipy import stats

from t2ilib.evaluation.statistics import (
    PairedDifference,
    max_statistic,
    mean_interval,
    paired_difference,
    sign_flip_p,
    smallest_p,
    verdict,
)


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


def test_paired_difference_pairs_by_seed():
    values = {3: 0.9, 0: 0.5, 1: 0.6, 2: 0.8, 9: 100.0}
    reference = {0: 0.4, 1: 0.55, 2: 0.6, 3: 0.65, 7: -100.0}
    difference = paired_difference(values, reference)
    test = stats.ttest_rel([0.5, 0.6, 0.8, 0.9], [0.4, 0.55, 0.6, 0.65])
    expected = test.confidence_interval(0.95)
    assert difference.num_pairs == 4
    assert difference.mean == pytest.approx(0.15)
    assert (difference.low, difference.high) == pytest.approx((expected.low, expected.high))
    assert difference.p_value == 2 / 2**4  # all four favour the variant: only all-plus and all-minus are as extreme


def test_pairing_removes_what_seeds_share():
    seeds = range(8)
    shared = {seed: 10.0 * seed for seed in seeds}
    better = {seed: shared[seed] + 1 + 0.1 * (-1) ** seed for seed in seeds}
    assert paired_difference(better, shared).low > 0.8


def test_no_common_seed_is_an_error_and_one_is_not_tested():
    with pytest.raises(ValueError, match="no common seed"):
        paired_difference({0: 1.0}, {1: 1.0})
    assert paired_difference({0: 2.0}, {0: 1.5}) == PairedDifference(0.5, None, None, None, 1)


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


def test_one_variant_is_adjusted_for_nothing():
    differences = {seed: value for seed, value in enumerate([0.3, 0.1, -0.05, 0.2, 0.4, 0.15, 0.02])}
    assert max_statistic({"only": differences})["only"] == pytest.approx(sign_flip_p(differences.values()))


def test_adjustment_by_enumeration():
    """The single-step value of the strongest, and the last one's plain value, counted by loops over patterns."""
    rng = np.random.default_rng(3)
    values = {name: dict(enumerate(rng.normal(shift, 1, 7))) for name, shift in (("a", 2.0), ("b", 0.4), ("c", 0.0))}

    def strength(name, signs):
        numbers = list(values[name].values())
        return abs(sum(s * x for s, x in zip(signs, numbers, strict=True))) / np.sqrt(sum(x * x for x in numbers))

    patterns = list(itertools.product((1, -1), repeat=7))
    observed = {name: strength(name, [1] * 7) for name in values}
    ordered = sorted(values, key=observed.get, reverse=True)
    by_hand, highest = {}, 0.0
    for rank, name in enumerate(ordered):
        hits = [max(strength(other, signs) for other in ordered[rank:]) >= observed[name] - 1e-9 for signs in patterns]
        highest = max(highest, np.mean(hits))
        by_hand[name] = highest
    assert max_statistic(values) == pytest.approx(by_hand)


def test_six_seeds_can_decide_about_many_variants():
    steady = {f"v{i}": {seed: 1.0 + 0.1 * i * seed for seed in range(6)} for i in range(10)}
    assert set(max_statistic(steady).values()) == {2 / 2**6}


def test_false_alarms_over_the_family_stay_rare():
    """Ten variants without any effect, 300 studies: at most 5% (and noise) show a difference anywhere."""
    rng = np.random.default_rng(5)
    alarms = 0
    for _ in range(300):
        reference = rng.normal(size=6)
        family = {str(v): dict(enumerate(rng.normal(size=6) - reference)) for v in range(10)}
        alarms += min(max_statistic(family).values()) < 0.05
    assert alarms / 300 < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 300)


def test_what_is_not_tested_stays_none_and_costs_nothing():
    differences = {seed: 1.0 for seed in range(6)}
    assert max_statistic({"a": differences, "b": {0: 5.0}, "c": {}}) == {"a": 2 / 2**6, "b": None, "c": None}
    assert max_statistic({}) == {}


def test_no_difference_at_all_has_p_one():
    assert max_statistic({"same": dict.fromkeys(range(6), 0.0)}) == {"same": 1.0}


@pytest.mark.parametrize(
    ("mean", "p", "higher", "expected"),
    [
        (0.1, 0.01, True, "better"),
        (0.1, 0.01, False, "worse"),
        (-0.1, 0.01, True, "worse"),
        (-0.1, 0.01, False, "better"),
        (0.1, 0.05, True, "no difference shown"),
        (0.0, 0.001, True, "no difference shown"),
        (0.1, None, True, "not tested (one seed)"),
    ],
)
def test_verdict(mean, p, higher, expected):
    assert verdict(PairedDifference(mean, mean - 1, mean + 1, p, 6), p, higher) == expected


def test_verdict_of_one_seed_is_not_tested():
    assert verdict(PairedDifference(9.0, None, None, None, 1), None, True) == "not tested (one seed)"


def test_it_needs_no_torch():
    import subprocess
    import sys

    heavy = "{'torch', 'matplotlib.pyplot'}"
    code = f"import sys, t2ilib.evaluation.statistics, t2ilib.report; sys.exit(bool({heavy} & {{*sys.modules}}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
