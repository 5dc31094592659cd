"""Pooled comparisons against scipy's Dunnett and Tukey, and against simulated studies of few seeds."""

import numpy as np
import pytest
from scipy import stats

from t2ilib.statistics.pooled import Difference, differences, fit_noise, leads, verdict


def by_seed(values) -> dict[int, float]:
    return dict(enumerate(map(float, values)))


def alike(seed: int, variants: int = 4, seeds: int = 3) -> dict[str, dict[int, float]]:
    """Values without a variant that seems noisier than the others."""
    rng = np.random.default_rng(seed)
    while True:
        values = {name: by_seed(row) for name, row in zip("abcdefgh", rng.normal(size=(variants, seeds)), strict=False)}
        if not fit_noise(values).own:
            return values


def columns(values) -> list[np.ndarray]:
    return [np.array(list(own.values())) for own in values.values()]


def test_against_one_it_is_dunnetts_test() -> None:
    values = alike(0)
    found = differences(values, [(name, "a") for name in "bcd"])
    control, *others = columns(values)
    test = stats.dunnett(*others, control=control, rng=np.random.default_rng(0))
    expected = test.confidence_interval(0.95)
    assert [one.p_value for one in found] == pytest.approx(test.pvalue, abs=0.02)
    assert [one.together[0] for one in found] == pytest.approx(expected.low, abs=0.05)
    assert [one.together[1] for one in found] == pytest.approx(expected.high, abs=0.05)


@pytest.mark.parametrize("seeds", [2, 6])
def test_against_all_it_is_tukeys_test(seeds: int) -> None:
    values = alike(1, seeds=seeds)
    found = leads(values, "b")
    test = stats.tukey_hsd(*columns(values))
    expected = test.confidence_interval(0.95)
    for place, name in ((0, "a"), (2, "c"), (3, "d")):
        assert found[name].p_value == pytest.approx(test.pvalue[1, place], abs=0.01)
        assert found[name].together == pytest.approx((expected.low[1, place], expected.high[1, place]), rel=0.02)


def test_runs_that_are_missing_are_tukey_and_kramers() -> None:
    values = alike(2)
    values = values | {"a": by_seed([0.3, -0.2]), "c": by_seed([0.1, 0.9, -1.1, 0.4, 0.2])}
    assert not fit_noise(values).own
    test = stats.tukey_hsd(*columns(values))
    expected = test.confidence_interval(0.95)
    found = leads(values, "c")
    assert found["a"].together == pytest.approx((expected.low[2, 0], expected.high[2, 0]), rel=0.02)
    assert found["a"].runs == (5, 2)


def test_one_alone_is_students_test_with_pooled_noise() -> None:
    values = alike(3, variants=2)
    (found,) = differences(values, [("b", "a")])
    test = stats.ttest_ind(*reversed(columns(values)))
    expected = test.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.together == pytest.approx((found.low, found.high), rel=0.01)
    assert found.p_value == pytest.approx(test.pvalue, abs=0.005)
    low, high = stats.ttest_ind(*reversed(columns(values))).confidence_interval(0.95)
    assert (found.df, found.mean) == (4, pytest.approx((low + high) / 2))


def test_a_base_that_takes_no_step_has_no_noise_and_no_say() -> None:
    values = {"lora": by_seed([1.30, 1.42]), "dora": by_seed([1.36, 1.28]), "base": by_seed([2.88, 2.88])}
    noise = fit_noise(values, still=["base"])
    assert noise.deviation == pytest.approx(np.sqrt((0.06**2 * 2 + 0.04**2 * 2) / 2))
    (found,) = differences(values, [("base", "lora")], still=["base"])
    expected = stats.t.isf(0.025, 2) * noise.deviation / np.sqrt(2)
    assert (found.mean, found.high - found.mean) == (pytest.approx(1.52), pytest.approx(expected))
    assert verdict(found, higher_is_better=False) == "worse", "two seeds are enough for what is plain"
    assert verdict(differences(values, [("dora", "lora")], still=["base"])[0], False) == "undecided"


def test_a_variant_that_varies_more_stands_with_its_own_noise() -> None:
    """Welch's test of two variants, each with its own variance, where only one is above the pool."""
    rng = np.random.default_rng(4)
    values = {name: by_seed(row) for name, row in zip("abcdefg", rng.normal(size=(7, 4)), strict=True)}
    values["loud"] = by_seed([1.5, -1.0, 2.0, -2.5])
    noise = fit_noise(values)
    assert noise.own == {"loud": (pytest.approx(np.std([1.5, -1, 2, -2.5], ddof=1)), 3)}
    found = differences(values, [("loud", "a"), ("b", "a")])
    assert found[0].noisier == ("loud",)
    assert found[1].noisier == ()
    parts = (noise.own["loud"][0] ** 2 / 4, noise.deviation**2 / 4)
    assert found[0].error == pytest.approx(np.sqrt(sum(parts)))
    assert found[0].df == pytest.approx(sum(parts) ** 2 / (parts[0] ** 2 / 3 + parts[1] ** 2 / 24))
    half = stats.t.isf(found[0].alpha / 2, found[0].df) * found[0].error
    assert found[0].together[1] - found[0].mean == pytest.approx(half)


def test_what_varies_far_more_hides_nothing_of_what_the_others_tell() -> None:
    """The noisiest first, and then the next; what only seems noisier keeps its say."""
    rng = np.random.default_rng(4)
    rows = rng.normal(size=(6, 6)) * np.array([1, 1, 1, 1, 30, 900])[:, None]
    values = {name: by_seed(row) for name, row in zip("abcdef", rows, strict=True)}
    noise = fit_noise(values)
    calm = fit_noise({name: values[name] for name in "abcd"})
    assert (noise.deviation, noise.df) == (calm.deviation, calm.df) == (pytest.approx(1, rel=0.4), 20)
    assert noise.own.keys() - calm.own.keys() == {"e", "f"}
    assert noise.own["f"] == (pytest.approx(np.std(rows[5], ddof=1)), 5)
    found = differences(values, [("b", "a"), ("e", "a")])
    assert found[0].df == 20
    assert found[1].noisier == ("e",)
    still = {name: by_seed([0.5] * 3) for name in "abc"} | {"d": by_seed([0.1, 0.5, 0.9])}
    assert fit_noise(still).deviation > 0, "of those that never vary nothing is known that one could be held against"


def test_nothing_is_known_of_noise_where_no_variant_has_two_seeds() -> None:
    assert fit_noise({"a": {0: 1.0}, "b": {0: 2.0}}) is None
    (found,) = differences({"a": {0: 1.0}, "b": {0: 2.5}}, [("b", "a")])
    assert found == Difference(1.5, (1, 1))
    assert (found.shown, verdict(found, True)) == (None, "not tested (one seed)")
    assert leads({"a": {0: 1.0}, "b": {0: 2.5}}, "b")["a"].mean == 1.5
    assert leads({"a": {0: 1.0, 1: 2.0}}, "a") == {}


def test_one_run_is_judged_by_the_noise_of_the_others() -> None:
    values = {"a": by_seed([1.0, 1.1, 0.9]), "b": by_seed([1.05, 0.95, 1.0]), "newcomer": {7: 3.0}}
    (found,) = differences(values, [("newcomer", "a")])
    assert (found.runs, found.shown) == ((1, 3), 1)


def test_wrong_values_are_told() -> None:
    with pytest.raises(ValueError, match="values of a are not all finite"):
        fit_noise({"a": {0: 1.0, 1: float("nan")}})
    with pytest.raises(ValueError, match="b has no value to compare"):
        differences({"a": {0: 1.0, 1: 1.0}, "b": {}}, [("b", "a")])


def test_no_difference_at_all() -> None:
    same = {"a": by_seed([0.5] * 3), "b": by_seed([0.5] * 3)}
    (found,) = differences(same, [("b", "a")])
    assert (found.mean, found.together, found.p_value, found.above) == (0.0, (0.0, 0.0), 1.0, 0.5)
    assert verdict(found, True) == "undecided"
    assert verdict(found, True, margin=0.01) == "equivalent"
    apart = {"a": by_seed([0.5] * 3), "b": by_seed([0.7] * 3)}
    (found,) = differences(apart, [("b", "a")])
    assert (found.p_value, found.above, verdict(found, True)) == (0.0, 1.0, "better")


def test_the_probability_that_a_new_run_lies_above() -> None:
    rng = np.random.default_rng(5)
    values = {"a": by_seed(rng.normal(0, 1, 400)), "b": by_seed(rng.normal(1, 1, 400))}
    (found,) = differences(values, [("b", "a")])
    fresh = rng.normal(1, 1, 100_000) > rng.normal(0, 1, 100_000)
    assert found.above == pytest.approx(fresh.mean(), abs=0.03)


def test_verdict_interval_and_p_never_contradict_each_other() -> None:
    """Over random studies of every number of seeds, many of them shares of few pictures with ties and zeros."""
    rng = np.random.default_rng(6)
    seen = set()
    for _ in range(500):
        variants, seeds, questions = int(rng.integers(2, 7)), int(rng.integers(1, 7)), int(rng.choice([1, 3]))
        drawn = rng.normal(rng.choice([0, 0, 1, 4], (variants, 1)), 1, (variants, seeds))
        drawn = drawn if rng.random() < 0.5 else np.round(drawn * 1.5) / 96
        values = {str(name): by_seed(row) for name, row in enumerate(drawn)}
        pairs = [(name, "0") for name in values if name != "0"]
        margin = float(rng.choice([0.01, 3.0]))
        for found in differences(values, pairs, questions=questions):
            said = verdict(found, True, margin)
            seen.add(said.split(" (")[0])
            if seeds == 1:
                assert (said, found.together) == ("not tested (one seed)", None)
                continue
            low, high = found.together
            assert (found.shown != 0) == (low > 0 or high < 0) == (found.p_value < 0.05)
            assert (said == "equivalent") == (-margin < low and high < margin)
            assert said != "better" or low > 0
            assert said != "worse" or high < 0
            assert low <= found.low <= found.mean <= found.high <= high
            assert (found.above > 0.5) == (found.mean > 0)
    assert seen == {"better", "worse", "equivalent", "undecided", "not tested"}


def false_alarms(noise, variants: int, seeds: int, studies: int = 300) -> float:
    """The share of studies, of variants that are all alike, in which some is said to be better or worse than the first."""
    rng, alarms = np.random.default_rng(7), 0
    for _ in range(studies):
        values = {str(name): by_seed(row) for name, row in enumerate(noise(rng, variants, seeds))}
        alarms += any(found.shown for found in differences(values, [(name, "0") for name in values if name != "0"]))
    return alarms / studies


NOISE = {
    "normal": lambda rng, variants, seeds: rng.normal(size=(variants, seeds)),
    "skewed": lambda rng, variants, seeds: rng.lognormal(size=(variants, seeds)),
    "shared by seed": lambda rng, variants, seeds: 2 * rng.normal(size=(1, seeds)) + rng.normal(size=(variants, seeds)),
    "shares of 96": lambda rng, variants, seeds: rng.binomial(96, 0.7, (variants, seeds)) / 96,
}


@pytest.mark.parametrize("seeds", [2, 3, 6])
@pytest.mark.parametrize("noise", NOISE)
def test_at_most_5_of_100_studies_call_a_difference_that_is_not_there(noise: str, seeds: int) -> None:
    assert false_alarms(NOISE[noise], 6, seeds) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 300)


def test_one_that_is_five_times_as_noisy_is_no_alarm_from_three_seeds_on() -> None:
    """Pooled noise alone would call something in one study of five."""

    def loud(rng, variants: int, seeds: int) -> np.ndarray:
        return rng.normal(size=(variants, seeds)) * np.r_[np.ones(variants - 1), 5][:, None]

    assert false_alarms(loud, 8, 3) <= 0.10
    assert false_alarms(loud, 8, 6) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 300)


def test_a_lead_pays_for_all_pairs_and_for_the_other_questions() -> None:
    values = alike(8)
    noise = fit_noise(values)
    leader = max(values, key=lambda name: np.mean(list(values[name].values())))
    single, double = leads(values, leader), leads(values, leader, questions=2)
    assert single.keys() == values.keys() - {leader}
    for name in single:
        assert double[name].together[0] < single[name].together[0]
        assert double[name].p_value == pytest.approx(min(1, 2 * single[name].p_value))
        assert single[name].together[0] < differences(values, [(leader, name)])[0].together[0]
    assert noise.df == 8


def test_it_needs_no_torch() -> None:
    import subprocess
    import sys

    heavy = "{'torch', 'matplotlib.pyplot'}"
    code = f"import sys, t2ilib.statistics.pooled, t2ilib.report; sys.exit(bool({heavy} & {{*sys.modules}}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
