"""Telling a difference from seed noise: intervals, paired differences, an exact test, and the price of asking many questions.

Variants of a study share their seeds, so what a seed does to all of them (its data order, noise, initial weights) cancels in
the differences by seed; unpaired comparisons would drown in it. A handful of seeds says little about the shape of a
distribution, so the p-value comes from flipping signs, which assumes only that differences are symmetric under "no effect".
The t-intervals do assume roughly normal seed noise: they say how large an effect may be, the test says whether there is one.

**Few seeds cannot show anything.** With n seeds the smallest two-sided p-value is 2/2^n: 0.0625 for five, 0.031 for six, so
fewer than six seeds never reach p < 0.05, whatever was measured.

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
    return float((np.abs(sign_patterns(numbers.size) @ numbers) >= threshold).mean())


def smallest_p(num_pairs: int) -> float | None:
    """The least p-value that a sign-flip test of `num_pairs` seeds can give, adjusted by `max_statistic` or not: 2 / 2^n."""
    return None if num_pairs < 2 else 2.0 ** (1 - num_pairs)


def max_statistic(differences: Mapping[str, Mapping[int, float]]) -> dict[str, float | None]:
    """p-values of several variants' differences by seed, adjusted for asking about all of them (Westfall & Young 1993, step-down).

    `differences`: name -> {seed: value - reference}. A seed's sign is flipped in all variants at once, which keeps what seeds
    do to them together; the largest of the standardised sums |sum d| / sqrt(n sum d^2) over the variants still standing is
    what each is held against. The chance of any false "difference" stays below alpha, and unlike Bonferroni's or Holm's
    adjustment of the same tests it costs no resolution: with six seeds the least p is 0.031 for one variant and for ten.
    None for a variant with fewer than two seeds, which does not count towards the family.
    """
    tested = {name: by_seed for name, by_seed in differences.items() if len(by_seed) > 1}
    adjusted: dict[str, float | None] = dict.fromkeys(differences)
    if not tested:
        return adjusted
    seeds = sorted(set().union(*tested.values()))
    values = np.array([[by_seed.get(seed, 0.0) for seed in seeds] for by_seed in tested.values()])
    counts = np.array([len(by_seed) for by_seed in tested.values()])
    scale = np.sqrt(counts * np.square(values).sum(1))
    standard = values / np.where(scale > 0, scale, 1.0)[:, None]
    flipped = np.abs(sign_patterns(len(seeds)) @ standard.T)
    observed = np.abs(standard.sum(1))
    names, highest = list(tested), 0.0
    order = np.argsort(-observed, kind="stable")
    for rank, index in enumerate(order):
        rivals = flipped[:, order[rank:]].max(1)
        highest = max(highest, float((rivals >= observed[index] - 1e-9).mean()))
        adjusted[names[index]] = highest
    return adjusted


def sign_patterns(num_seeds: int) -> np.ndarray:
    """(P, n) of +1 and -1: all patterns up to n = 14, else random ones at a fixed address, the observed one first."""
    if num_seeds <= MAX_EXACT_PAIRS:
        return np.array(list(itertools.product((1.0, -1.0), repeat=num_seeds)))
    drawn = numpy_generator_for(0, "sign-flip", num_seeds).choice((-1.0, 1.0), (MONTE_CARLO_FLIPS, num_seeds))
    return np.concatenate([np.ones((1, num_seeds)), drawn])


def verdict(difference: PairedDifference, adjusted_p: float | None, higher_is_better: bool, alpha: float = 0.05) -> str:
    """ "better", "worse", "no difference shown" (which is not "the same"), or "not tested (one seed)"."""
    if difference.num_pairs < 2 or adjusted_p is None:
        return "not tested (one seed)"
    if adjusted_p >= alpha or difference.mean == 0:
        return "no difference shown"
    return "better" if (difference.mean > 0) == higher_is_better else "worse"
