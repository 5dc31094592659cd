"""Telling a difference from seed noise: intervals, paired differences, an exact test, and the price of asking many questions.

Variants of a study share their seeds, so what a seed does to all of them (its data order, noise, initial weights) cancels in
the differences by seed; unpaired comparisons would drown in it. A handful of seeds says little about the shape of a
distribution, so the p-value comes from flipping signs, which assumes only that differences are symmetric under "no effect".
The t-intervals do assume roughly normal seed noise: they say how large an effect may be, the test says whether there is one.

**Few seeds cannot show anything.** With n seeds the smallest two-sided p-value is 2/2^n: 0.0625 for five, 0.031 for six, so
fewer than six seeds never reach p < 0.05, whatever was measured, and after Holm's adjustment over m variants it takes more.

What cannot be computed is None, never NaN. Leaves out: Bayesian estimates, tests over prompts rather than seeds.
"""

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from t2ilib.seeds import numpy_generator_for

MAX_EXACT_PAIRS = 14
MONTE_CARLO_FLIPS = 20_000


@dataclass(frozen=True)
class Interval:
    """A mean in the unit of the values; `low` and `high` are None for a single value, which says nothing about spread."""

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def half_width(self) -> float | None:
        return None if self.low is None else (self.high - self.low) / 2


@dataclass(frozen=True)
class PairedDifference:
    """Mean of value - reference over the common seeds, its t-interval, and the sign-flip p-value (None below two pairs)."""

    mean: float
    low: float | None
    high: float | None
    p_value: float | None
    num_pairs: int


def mean_interval(values: Iterable[float], level: float = 0.95) -> Interval:
    """Student's t-interval of the mean (Student 1908): mean +- t(n-1) * s / sqrt(n). Raises ValueError without finite values."""
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


def paired_difference(
    values: Mapping[int, float], reference: Mapping[int, float], level: float = 0.95
) -> PairedDifference:
    """value - reference by seed (`{seed: value}`), over the seeds that both have. Raises ValueError where they share none."""
    common = sorted(values.keys() & reference.keys())
    if not common:
        raise ValueError(f"no common seed: values have {sorted(values)}, the reference has {sorted(reference)}")
    differences = [values[seed] - reference[seed] for seed in common]
    interval = mean_interval(differences, level)
    return PairedDifference(interval.mean, interval.low, interval.high, sign_flip_p(differences), len(common))


def sign_flip_p(differences: Iterable[float]) -> float | None:
    """Two-sided sign-flip permutation test of "symmetric around zero" (Fisher 1935, section 21); None below two values.

    All 2^n sign patterns up to n = 14. Beyond, 20,000 random patterns at a fixed address, the observed one counted among
    them, (hits + 1) / (flips + 1), so that p is never 0 (Phipson & Smyth 2010, eq. 2).
    """
    numbers = np.asarray(list(differences), dtype=float)
    if numbers.size < 2:
        return None
    observed = abs(numbers.sum())
    # Sums that are equal on paper differ in the last bits; without slack a pattern might not count as extreme as itself.
    threshold = observed - 1e-9 * np.abs(numbers).sum()
    if numbers.size <= MAX_EXACT_PAIRS:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=numbers.size)))
        return float((np.abs(signs @ numbers) >= threshold).mean())
    signs = numpy_generator_for(0, "sign-flip", int(numbers.size)).choice(
        (-1.0, 1.0), (MONTE_CARLO_FLIPS, numbers.size)
    )
    return float((np.sum(np.abs(signs @ numbers) >= threshold) + 1) / (MONTE_CARLO_FLIPS + 1))


def smallest_p(num_pairs: int, num_tests: int = 1) -> float | None:
    """The least adjusted p-value that `num_pairs` seeds can give when Holm adjusts `num_tests` such tests at once."""
    return None if num_pairs < 2 else min(1.0, num_tests * 2.0 ** (1 - num_pairs))


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Holm's step-down adjustment (Holm 1979): the chance of any false "difference" stays below alpha over the whole family.

    Keys and their order are kept; None (not tested) stays None and does not count towards the family.
    """
    tested = sorted((p, name) for name, p in p_values.items() if p is not None)
    adjusted: dict[str, float | None] = dict.fromkeys(p_values)
    highest = 0.0
    for rank, (p, name) in enumerate(tested):
        highest = max(highest, min(1.0, (len(tested) - rank) * p))
        adjusted[name] = highest
    return adjusted


def verdict(difference: PairedDifference, adjusted_p: float | None, higher_is_better: bool, alpha: float = 0.05) -> str:
    """ "better", "worse", "no difference shown" (which is not "the same"), or "not tested (one seed)"."""
    if difference.num_pairs < 2 or adjusted_p is None:
        return "not tested (one seed)"
    if adjusted_p >= alpha or difference.mean == 0:
        return "no difference shown"
    return "better" if (difference.mean > 0) == higher_is_better else "worse"
