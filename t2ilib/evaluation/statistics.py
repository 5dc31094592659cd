"""Telling a difference from seed noise: intervals, paired differences, and the price of asking many questions.

Variants of a study share their seeds, so what a seed does to all of them (its data order, noise, initial weights)
cancels in the differences by seed; unpaired comparisons would drown in it. A difference is shown where its interval
leaves out zero, and that is the only rule: what a table shows and what it says cannot contradict each other.

That interval, `together`, is the wider of two. Student's, at a level that the questions share (Bonferroni), holds all
true differences of a table in 95% of studies if seed noise is roughly normal; symmetric noise with longer tails makes
it hold more often. The interval that flipping signs gives, for one question alone, assumes only symmetry. **Few seeds
cannot show anything**: with fewer than six it has no end.

Measured on 4,000 simulated studies each, of six seeds and 6 or 8 variants that are all alike: the lead of whoever
happens to lead is called shown over some other in 3.5 and 2.7% of them with normal seed noise, 0.3% with lognormal,
3.2 and 3.3% where seeds move all variants together, 2.2 and 1.9% where one is five times as noisy; in 8% where the
noise of half the variants leans one way and of the others the other (exponential), which six seeds cannot see. The
price: of seven variants with normal noise, one that is ahead by 3, 4 or 6 standard deviations of it is shown over all
six others in 6, 36 and 96% of studies, and over 46, 78 and 99% of them on the average.

What cannot be computed is None, never NaN. Leaves out: Bayesian estimates, tests over prompts rather than seeds.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from t2ilib.seeds import numpy_generator_for

MAX_EXACT_PAIRS = 14
MONTE_CARLO_FLIPS = 20_000
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


@dataclass(frozen=True)
class PairedDifference:
    """Mean of value - reference over the common seeds. `low`, `high`: its t-interval, taken alone (None for one
    pair); `together`: the interval that decides, in which the other questions of its family are paid for (None below
    six pairs); `p_value`: below 0.05 where `together` leaves out zero (None for one pair)."""

    mean: float
    low: float | None
    high: float | None
    together: tuple[float, float] | None
    p_value: float | None
    num_pairs: int

    @property
    def shown(self) -> int | None:
        """1 or -1 where the difference is shown to be positive or negative, 0 where it is not, None where nothing is
        tested."""
        if self.together is None:
            return None
        low, high = self.together
        return (low > 0) - (high < 0)


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


def paired_difference(
    values: Mapping[int, float], reference: Mapping[int, float], questions: int = 1
) -> PairedDifference:
    """value - reference by seed (`{seed: value}`), over the seeds that both have; one of so many `questions`. Raises
    ValueError where they share no seed."""
    common = sorted(values.keys() & reference.keys())
    if not common:
        raise ValueError(f"no common seed: values have {sorted(values)}, the reference has {sorted(reference)}")
    differences = np.array([values[seed] - reference[seed] for seed in common])
    differences[np.abs(differences) <= SLACK * np.abs(differences).max()] = 0.0
    alone = mean_interval(differences)
    if len(common) == 1:
        return PairedDifference(alone.mean, None, None, None, None, 1)
    shared, flipped = mean_interval(differences, 1 - (1 - LEVEL) / questions), flip_interval(differences)
    together = flipped and (min(shared.low, flipped[0]), max(shared.high, flipped[1]))
    p = max(min(1.0, questions * student_p(differences)), sign_flip_p(differences))
    return PairedDifference(alone.mean, alone.low, alone.high, together, p, len(common))


def leads(values: Mapping[str, Mapping[int, float]], leader: str, questions: int = 1) -> dict[str, PairedDifference]:
    """Leader - other, for every other one that shares a seed with it (`values`: name -> {seed: value}).

    Data that pick the leader have looked at all pairs, so all pairs are paid for, times the `questions` of which this
    is one.
    """
    pairs = math.comb(len(values), 2)
    return {
        name: paired_difference(values[leader], other, pairs * questions)
        for name, other in values.items()
        if name != leader and values[leader].keys() & other.keys()
    }


def student_p(differences: np.ndarray) -> float:
    """Two-sided p-value of Student's test that the mean is zero; 0 or 1 for values that are all the same."""
    error = differences.std(ddof=1) / math.sqrt(differences.size)
    if error <= SLACK * abs(differences.mean()):
        return float(not differences.any())
    return float(2 * stats.t.sf(abs(differences.mean()) / error, differences.size - 1))


def sign_flip_p(differences: Iterable[float]) -> float | None:
    """Two-sided sign-flip permutation test of "symmetric around zero" (Fisher 1935, section 21); None below two values.

    All 2^n sign patterns up to n = 14. Beyond, 20,000 random patterns at a fixed address, the observed one counted
    among them, (hits + 1) / (flips + 1), so that p is never 0 (Phipson & Smyth 2010, eq. 2).
    """
    numbers = np.asarray(list(differences), dtype=float)
    if numbers.size < 2:
        return None
    threshold = abs(numbers.sum()) - SLACK * np.abs(numbers).sum()
    return float((np.abs(sign_patterns(numbers.size) @ numbers) >= threshold).mean())


def flip_interval(differences: np.ndarray) -> tuple[float, float] | None:
    """The shifts of `differences` that `sign_flip_p` does not refuse at 5%, from the lowest to the highest; None
    where it refuses none.

    A pattern is as extreme as the observed one where the mean of those that it flips, or of those that it leaves,
    lies beyond the shift. So the ends are means of subsets, Hartigan's typical values (1969, J. Am. Stat. Assoc. 64,
    1303); of six values the lowest and the highest.
    """
    patterns = sign_patterns(differences.size)
    flipped = (patterns < 0).astype(float)
    counts = flipped.sum(1)
    proper = (counts > 0) & (counts < differences.size)  # the others are as extreme at any shift
    refused = math.ceil((1 - LEVEL) * len(patterns) - (~proper).sum() - SLACK)
    if refused < 1:
        return None
    sums = np.stack([flipped @ differences, (1 - flipped) @ differences])[:, proper]
    sums[np.abs(sums) <= SLACK * np.abs(differences).sum()] = 0.0
    means = sums / np.stack([counts, differences.size - counts])[:, proper]
    return float(np.sort(means.min(0))[refused - 1]), float(np.sort(means.max(0))[-refused])


def smallest_p(num_pairs: int) -> float | None:
    """The least p-value that a sign-flip test of `num_pairs` seeds can give: 2 / 2^n."""
    return None if num_pairs < 2 else 2.0 ** (1 - num_pairs)


@functools.lru_cache(maxsize=4)
def sign_patterns(num_seeds: int) -> np.ndarray:
    """(P, n) of +1 and -1: all patterns up to n = 14, else random ones at a fixed address, the observed one first."""
    if num_seeds <= MAX_EXACT_PAIRS:
        return np.array(list(itertools.product((1.0, -1.0), repeat=num_seeds)))
    drawn = numpy_generator_for(0, "sign-flip", num_seeds).choice((-1.0, 1.0), (MONTE_CARLO_FLIPS, num_seeds))
    return np.concatenate([np.ones((1, num_seeds)), drawn])


def verdict(difference: PairedDifference, higher_is_better: bool) -> str:
    """ "better", "worse", "no difference shown" (which is not "the same"), or "not tested (3 seeds)"."""
    if difference.shown is None:
        return not_tested(difference.num_pairs)
    if difference.shown == 0:
        return "no difference shown"
    return "better" if (difference.shown > 0) == higher_is_better else "worse"


def not_tested(seeds: int) -> str:
    return f"not tested ({'one seed' if seeds == 1 else f'{seeds} seeds'})"
