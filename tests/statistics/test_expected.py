"""Expected bests, held against every choice of k trials, and leads against both curves looked at in small steps."""

import itertools
import statistics

import numpy as np
import pytest

from t2ilib.statistics.expected import Curve, expected_best, leading


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_the_expected_best_is_the_mean_over_all_choices(count: int) -> None:
    values = np.random.default_rng(count).normal(size=count).round(1).tolist()  # with ties
    by_hand = [statistics.fmean(map(max, itertools.combinations(values, k))) for k in range(1, count + 1)]
    assert expected_best(values) == pytest.approx(by_hand)


def test_it_is_unbiased_where_choosing_with_replacement_is_not() -> None:
    """Of 4,000 searches of six trials each: the mean of the estimate for three, beside the mean of maxima of three fresh draws, 0.75."""
    drawn = np.random.default_rng(0).uniform(size=(4000, 6))
    estimates = [expected_best(row)[2] for row in drawn.tolist()]
    replaced = [np.sum(np.sort(row) * np.diff((np.arange(7) / 6) ** 3)) for row in drawn]
    assert np.mean(estimates) == pytest.approx(0.75, abs=0.01)
    assert np.mean(replaced) < 0.72


def test_what_has_no_value_is_refused() -> None:
    for values in ([], [1.0, float("nan")]):
        with pytest.raises(ValueError, match=r"at least one value, all finite"):
            expected_best(values)
    with pytest.raises(ValueError, match=r"known from 0.5 to 1 h, not at 0.2 h"):
        Curve(0.5, (1.0, 2.0)).at(0.2)


def test_leads_are_those_that_small_steps_show() -> None:
    chance = np.random.default_rng(1)
    crossed = 0
    for _ in range(200):
        curves = [
            Curve(float(hours), tuple(expected_best(chance.normal(size=count).tolist())))
            for hours, count in zip(chance.choice([0.5, 0.75, 1.0, 1.25], 2), chance.integers(4, 9, 2), strict=True)
        ]
        found = leading(*curves)
        times = np.arange(0, 12, 0.05) + 0.025  # never where a curve steps
        times = [t for t in times if all(curve.hours < t < curve.ends for curve in curves)]
        signs = [int(np.sign(curves[0].at(t) - curves[1].at(t))) for t in times]
        changes = [t for t, before, now in zip(times[1:], signs, signs[1:], strict=False) if before != now]
        crossed += bool(changes)
        # at the very end the longer curve may step once more
        at_end = int(np.sign(curves[0].at(found.ends) - curves[1].at(found.ends)))
        assert found.sign == at_end
        expected = changes + ([found.ends] if signs[-1] != at_end else [])
        assert found.crossings == pytest.approx(expected, abs=0.03)
        assert found.since == pytest.approx(expected[-1] if expected else found.begins, abs=0.03)
    assert crossed > 20


def test_curves_that_are_never_known_at_once_have_no_lead() -> None:
    assert leading(Curve(1.0, (1.0, 2.0)), Curve(3.0, (1.0,))) is None
    alike = leading(Curve(1.0, (1.0, 2.0)), Curve(1.0, (1.0, 2.0)))
    assert (alike.sign, alike.since, alike.crossings) == (0, 1.0, ())
