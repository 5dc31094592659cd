"""Intervals against scipy, the sign-flip test against enumeration by hand, verdicts against simulated studies."""

import itertools

import numpy as np
import pytest
from scipy import stats

from t2ilib.evaluation.statistics import (
    PairedDifference,
    flip_interval,
    leads,
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
    assert difference.together is difference.shown is None  # fewer than six


def test_pairing_removes_what_seeds_share():
    seeds = range(8)
    shared = {seed: 10.0 * seed for seed in seeds}
    better = {seed: shared[seed] + 1 + 0.1 * (-1) ** seed for seed in seeds}
    assert paired_difference(better, shared).low > 0.8


def test_no_common_seed_is_an_error_and_one_is_not_tested():
    with pytest.raises(ValueError, match="no common seed"):
        paired_difference({0: 1.0}, {1: 1.0})
    assert paired_difference({0: 2.0}, {0: 1.5}) == PairedDifference(0.5, None, None, None, None, 1)


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


def test_the_interval_that_decides_is_the_wider_of_two():
    values = by_seed([1.2, 0.7, 0.9, 1.4, 1.1, 0.2])
    numbers = list(values.values())
    for questions in (1, 6, 21):
        low, high = stats.t.interval(1 - 0.05 / questions, 5, loc=np.mean(numbers), scale=stats.sem(numbers))
        found = paired_difference(values, ZERO, questions)
        assert found.together == pytest.approx((min(low, 0.2), max(high, 1.4)))
    p = stats.ttest_1samp(numbers, 0).pvalue
    assert paired_difference(values, ZERO, 21).p_value == pytest.approx(21 * p)
    assert paired_difference(values, ZERO, 1).p_value == 2 / 2**6, "the flips' own, which is larger"


def test_verdict_interval_and_p_never_contradict_each_other():
    """Over random differences of every number of seeds, many of them counts of few pictures with ties and zeros."""
    rng = np.random.default_rng(4)
    seen = set()
    for _ in range(1500):
        count, questions = int(rng.integers(2, 13)), int(rng.choice([1, 3, 28]))
        shift = rng.choice([0, 0, 1, 2, 5])
        drawn = rng.normal(shift, 1, count) if rng.random() < 0.5 else np.round(rng.normal(shift, 1.5, count)) / 96
        found = paired_difference(by_seed(drawn * rng.choice([-1, 1])), ZERO, questions)
        said = verdict(found, higher_is_better=True)
        seen.add(said.split(" (")[0])
        if count < 6:
            assert (said, found.together) == (f"not tested ({count} seeds)", None)
            continue
        low, high = found.together
        assert (said in ("better", "worse")) == (low > 0 or high < 0) == (found.p_value < 0.05)
        assert said != "better" or low > 0
        assert said != "worse" or high < 0
        assert low <= found.low <= found.mean <= found.high <= high
    assert seen == {"better", "worse", "no difference shown", "not tested"}


NOISE = {
    "normal": lambda rng, variants: rng.normal(size=(6, variants)),
    "skewed": lambda rng, variants: rng.lognormal(size=(6, variants)),
    "shared by seed": lambda rng, variants: 2 * rng.normal(size=(6, 1)) + rng.normal(size=(6, variants)),
    "one variant noisier": lambda rng, variants: rng.normal(size=(6, variants)) * np.r_[5, np.ones(variants - 1)],
    "pairs of near twins": lambda rng, variants: (
        np.repeat(rng.normal(size=(6, variants // 2)), 2, 1) + 0.2 * rng.normal(size=(6, variants))
    ),
}


@pytest.mark.parametrize("variants", [6, 8])
@pytest.mark.parametrize("noise", NOISE)
def test_some_lead_is_called_shown_in_at_most_5_of_100_studies_without_any(noise: str, variants: int):
    """Six seeds; the leader is whoever leads. The slack is two standard errors of 500 studies."""
    rng = np.random.default_rng(5)
    alarms = 0
    for _ in range(500):
        drawn = NOISE[noise](rng, variants)
        values = {str(name): by_seed(column) for name, column in enumerate(drawn.T)}
        leader = str(drawn.mean(0).argmax())
        alarms += any(difference.shown for difference in leads(values, leader).values())
    assert alarms / 500 <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 500)


def test_a_lead_that_is_there_is_found():
    """Six deviations of seed noise ahead of six others: shown against all of them in most studies of six seeds."""
    rng = np.random.default_rng(6)
    found = 0
    for _ in range(100):
        values = {
            str(name): by_seed(column) for name, column in enumerate(rng.normal(size=(7, 6)) + 6 * np.eye(7)[:, :1])
        }
        shown = [difference.shown for difference in leads(values, "0").values()]
        assert len(shown) == 6
        found += shown == [1] * 6
    assert found > 85


def test_a_lead_pays_for_all_pairs_and_for_the_other_questions():
    values = {name: by_seed(np.random.default_rng(seed).normal(seed, 1, 6)) for seed, name in enumerate("abcd")}
    for questions in (1, 3):
        found = leads(values, "d", questions)
        assert found.keys() == {*"abc"}
        assert found["a"] == paired_difference(values["d"], values["a"], 6 * questions)
    assert leads({"a": {0: 1.0}, "b": {1: 2.0}}, "b") == {}


def test_no_difference_at_all_has_p_one():
    same = paired_difference(ZERO, ZERO, 5)
    assert (same.p_value, same.together, same.shown) == (1.0, (0.0, 0.0), 0)
    assert verdict(same, True) == "no difference shown"


@pytest.mark.parametrize(
    ("together", "higher", "expected"),
    [
        ((0.1, 0.2), True, "better"),
        ((0.1, 0.2), False, "worse"),
        ((-0.2, -0.1), True, "worse"),
        ((-0.2, -0.1), False, "better"),
        ((0.0, 0.2), True, "no difference shown"),
        ((-0.1, 0.2), True, "no difference shown"),
        (None, True, "not tested (6 seeds)"),
    ],
)
def test_verdict(together, higher, expected):
    assert verdict(PairedDifference(0.0, -1.0, 1.0, together, 0.5, 6), higher) == expected


def test_verdict_of_one_seed_is_not_tested():
    assert verdict(PairedDifference(9.0, None, None, None, None, 1), True) == "not tested (one seed)"


def test_it_needs_no_torch():
    import subprocess
    import sys

    heavy = "{'torch', 'matplotlib.pyplot'}"
    code = f"import sys, t2ilib.evaluation.statistics, t2ilib.report; sys.exit(bool({heavy} & {{*sys.modules}}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
