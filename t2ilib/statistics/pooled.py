"""Telling a difference from seed noise when seeds are few: what runs vary by is pooled over all variants of a study.

A run's number is its variant's own plus noise, y = mu(variant) + e. With two or three seeds a variant says next to
nothing of its own noise, but all variants together do: the pooled variance, as in the analysis of variance (Fisher
1925), has as many degrees of freedom as there are runs beyond the first of each variant. Runs are not paired by seed:
between different methods what a seed does to one says nearly nothing of what it does to the other.

**Assumed:** noise is independent, roughly normal, and the same for all variants. The last is looked at: a variant whose
own variance is above the others' (F test at 10%) stands with its own, at its own few degrees of freedom (Satterthwaite
1946, Biometrics Bull. 2, 110; Welch 1947), and is told. So much of such a find is chance that it keeps its say in the pool,
which would be too small without it; one that is found by FAR has none, the noisiest first, and then the next, as it would
hide what the others tell of each other. The untouched base takes no step, so it has no noise, nor a say in the pool.

Differences of one table are one family: the interval that decides, `together`, holds all their true values in 95% of
studies. Its width is the quantile of the largest |t| among them, given which variants they share (Dunnett 1955, J. Am.
Stat. Assoc. 50, 1096, where all are held against one; Tukey 1953 and Kramer 1956, Biometrics 12, 307, for all pairs),
drawn 100,000 times at a fixed address. Verdict, interval and p cannot contradict each other.

What it is worth, measured where the truth is known, is told in results/verdicts. Leaves out: noise of prompts
(`crossed`), the test that assumes least (`signs`), Bayesian estimates.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from t2ilib.seeds import numpy_generator_for
from t2ilib.statistics.means import LEVEL, SLACK

DRAWS = 100_000
UNLIKE = 0.10
"""A variant whose variance lies so far above the others' that only this share would, by chance, has its own."""
FAR = 0.001
"""Where in only this share of studies any would lie so far above, by chance, it has no say in what the others vary by either."""

Values = Mapping[str, Mapping[int, float]]
"""Variant -> {seed: value}."""


@dataclass(frozen=True)
class Noise:
    """What runs of a study vary by. `deviation`: of one run, in the unit of the values, and `df`, its degrees of freedom;
    `own`: variants that are noisier than the others -> (deviation, df) of theirs; `still`: variants without noise, which
    take no step; `counts`: runs of each variant."""

    deviation: float
    df: int
    own: Mapping[str, tuple[float, int]]
    still: frozenset[str]
    counts: Mapping[str, int]

    def of(self, variant: str) -> tuple[float, int]:
        """(deviation of one run, its degrees of freedom) of a variant."""
        return (0.0, self.df) if variant in self.still else self.own.get(variant, (self.deviation, self.df))


@dataclass(frozen=True)
class Difference:
    """One variant minus another, means over their runs.

    `low`, `high`: 95% interval of this difference alone; `together`: the interval that decides, in which the other
    questions of its family are paid for; `p_value`: below 0.05 where `together` leaves out zero; `above`: the probability
    that a new run of the one lies above a new run of the other. All None where nothing is known of noise: no variant
    has two runs. `error`, `df`: the standard error and its degrees of freedom; `alpha`: the level, two-sided, of one
    question of the family; `runs`: how many of each; `noisier`: which of both stand with their own noise.
    """

    mean: float
    runs: tuple[int, int]
    low: float | None = None
    high: float | None = None
    together: tuple[float, float] | None = None
    p_value: float | None = None
    above: float | None = None
    error: float | None = None
    df: float | None = None
    alpha: float | None = None
    noisier: tuple[str, ...] = ()

    @property
    def shown(self) -> int | None:
        """1 or -1 where the difference is shown to be positive or negative, 0 where it is not, None where nothing is
        tested."""
        if self.together is None:
            return None
        low, high = self.together
        return (low > 0) - (high < 0)

    def within(self, margin: float) -> bool:
        """Whether it is shown to be smaller than `margin` either way: two one-sided tests (Schuirmann 1987, J.
        Pharmacokinet. Biopharm. 15, 657), both of which the interval that decides passes where it lies within."""
        return self.together is not None and -margin < self.together[0] and self.together[1] < margin


def fit_noise(values: Values, still: Sequence[str] = ()) -> Noise | None:
    """The noise of a study's runs; None where no variant but those that are `still` has two runs. Raises ValueError for
    values that are not finite."""
    columns = {name: np.array(list(own.values()), float) for name, own in values.items() if own}
    if bad := [name for name, column in columns.items() if not np.isfinite(column).all()]:
        raise ValueError(f"values of {bad[0]} are not all finite: {columns[bad[0]].tolist()}")
    counts = {name: column.size for name, column in columns.items()}
    moving = {name: column for name, column in columns.items() if name not in still and column.size > 1}
    if not moving:
        return None
    spread = {name: (sum_of_squares(column), column.size - 1) for name, column in moving.items()}
    own = {}
    while len(spread) > 1:
        name = max(spread, key=lambda one: spread[one][0] / spread[one][1])
        others_vary = any(square for other, (square, _) in spread.items() if other != name)
        if not others_vary or chance_of(name, spread) >= FAR / len(spread):
            break
        own[name] = deviation_of(spread.pop(name))
    of_all = tuple(map(sum, zip(*spread.values(), strict=True)))
    for name, (square, df) in spread.items():
        if square / df > of_all[0] / of_all[1] and chance_of(name, spread) < UNLIKE:
            own[name] = deviation_of((square, df))
    return Noise(*deviation_of(of_all), own, frozenset(still), counts)


def chance_of(name: str, spread: Mapping[str, tuple[float, int]]) -> float:
    """The probability of a variance this far above the others' where all are alike (F test); 0 where the others have none, 1 where there
    are none. `spread`: of each its sum of squares and degrees of freedom."""
    (square, mine), others = spread[name], [part for other, part in spread.items() if other != name]
    squares, df = map(sum, zip(*others, strict=True)) if others else (0.0, 0)
    return 1.0 if not df else float(stats.f.sf(square / mine / (squares / df), mine, df)) if squares > 0 else 0.0


def deviation_of(part: tuple[float, int]) -> tuple[float, int]:
    """(deviation of one run, its degrees of freedom) of a sum of squares and its own."""
    square, df = part
    return math.sqrt(square / df), df


def sum_of_squares(column: np.ndarray) -> float:
    """About its mean; 0 where values differ in their last bits alone."""
    spread = column - column.mean()
    return 0.0 if np.abs(spread).max() <= SLACK * np.abs(column).max() else float((spread**2).sum())


def differences(
    values: Values, pairs: Sequence[tuple[str, str]], still: Sequence[str] = (), questions: int = 1
) -> list[Difference]:
    """For each (one, other) one - other. The pairs are a family, and one of so many `questions` of its kind.

    Raises ValueError for a pair of which one has no value.
    """
    for pair in pairs:
        if lacking := [name for name in pair if not values.get(name)]:
            raise ValueError(f"{lacking[0]} has no value to compare {' and '.join(pair)} by")
    noise = fit_noise(values, still)
    if noise is None or not pairs:
        return [Difference(mean_of(values, pair), counts_of(values, pair)) for pair in pairs]
    family = Family.of(noise, pairs, questions)
    return [difference(values, noise, pair, family) for pair in pairs]


def mean_of(values: Values, pair: tuple[str, str]) -> float:
    one, other = (np.array(list(values[name].values()), float) for name in pair)
    return clean(float(one.mean() - other.mean()), max(np.abs(one).max(), np.abs(other).max()))


def clean(mean: float, scale: float) -> float:
    """A difference of the last bits is none."""
    return 0.0 if abs(mean) <= SLACK * scale else mean


def counts_of(values: Values, pair: tuple[str, str]) -> tuple[int, int]:
    return len(values[pair[0]]), len(values[pair[1]])


def difference(values: Values, noise: Noise, pair: tuple[str, str], family: "Family") -> Difference:
    mean, runs = mean_of(values, pair), counts_of(values, pair)
    parts = [(deviation**2 / count, df) for (deviation, df), count in zip(map(noise.of, pair), runs, strict=True)]
    error = math.sqrt(sum(variance for variance, _ in parts))
    noisier = tuple(name for name in pair if name in noise.own)
    df = satterthwaite(parts) if noisier else float(noise.df)
    alone, decides = (float(stats.t.isf(alpha / 2, df)) * error for alpha in (1 - LEVEL, family.alpha))
    single = math.hypot(error, *(noise.of(name)[0] for name in pair))
    above = float(stats.t.cdf(mean / single, df)) if single > 0 else 0.5 + 0.5 * np.sign(mean)
    p = family.p_value(2 * float(stats.t.sf(abs(mean) / error, df)) if error > 0 else float(mean == 0))
    together = (mean - decides, mean + decides)
    return Difference(
        mean, runs, mean - alone, mean + alone, together, p, above, error, df, family.alpha, noisier
    )  # fmt: skip


def satterthwaite(parts: Sequence[tuple[float, float]]) -> float:
    """Degrees of freedom of a sum of independent variances, each with its own (Satterthwaite 1946)."""
    total = sum(variance for variance, _ in parts)
    return total**2 / sum(variance**2 / df for variance, df in parts) if total > 0 else float(parts[0][1])


@dataclass(frozen=True)
class Family:
    """The price of asking several questions together. `alpha`: two-sided, for one of them alone; `largest`: the largest
    |t| of the family in each draw, rising, at `df` degrees of freedom; `questions`: how many such families there are."""

    alpha: float
    largest: np.ndarray
    df: int
    questions: int

    @classmethod
    def of(cls, noise: Noise, pairs: Sequence[tuple[str, str]], questions: int = 1) -> "Family":
        """Of differences whose variants have the pooled noise and so many runs each. Those with noise of their own pay the same
        price in probability."""
        names = sorted({name for pair in pairs for name in pair})
        places = tuple(tuple(map(names.index, pair)) for pair in pairs)
        weights = tuple(0.0 if name in noise.still else 1 / noise.counts[name] for name in names)
        largest = largest_t(weights, places, noise.df)
        refused = math.ceil((1 - LEVEL - SLACK) / questions * largest.size)
        drawn = 2 * float(stats.t.sf(largest[largest.size - refused], noise.df))
        return cls(min(drawn, (1 - LEVEL) / questions), largest, noise.df, questions)

    def p_value(self, alone: float) -> float:
        """Of a question whose p-value, if it were the only one, is `alone`: the share of draws in which some difference of the
        family is as large by chance."""
        if alone <= 0:
            return 0.0
        as_large = self.largest.size - np.searchsorted(self.largest, stats.t.isf(alone / 2, self.df), side="left")
        return min(1.0, self.questions * max(alone, float(as_large) / self.largest.size))


@functools.lru_cache(maxsize=64)
def largest_t(weights: tuple[float, ...], pairs: tuple[tuple[int, int], ...], df: int) -> np.ndarray:
    """The largest |t| among differences of means, where all true ones are zero, in each of 100,000 draws, rising.
    `weights`: of each mean its variance in units of one run's."""
    generator = numpy_generator_for(0, "largest t", len(weights), len(pairs), df)
    means = generator.normal(size=(DRAWS, len(weights))) * np.sqrt(weights)
    scale = np.sqrt(generator.chisquare(df, DRAWS) / df)
    found = np.zeros(DRAWS)
    for one, other in pairs:
        error = math.sqrt(weights[one] + weights[other])
        if error > 0:
            np.maximum(found, np.abs(means[:, one] - means[:, other]) / error, out=found)
    return np.sort(found / scale)


def leads(values: Values, leader: str, questions: int = 1) -> dict[str, Difference]:
    """Leader - other, for every other one (`values`: those that compete).

    Data that pick the leader have looked at all pairs, so all pairs are paid for, and the `questions` of which this is
    one.
    """
    names = sorted(name for name, own in values.items() if own)
    noise = fit_noise(values)
    others = [name for name in names if name != leader]
    if noise is None or not others:
        return {name: Difference(mean_of(values, (leader, name)), counts_of(values, (leader, name))) for name in others}
    pairs = [(one, other) for number, one in enumerate(names) for other in names[number + 1 :]]
    family = Family.of(noise, pairs, questions)
    return {name: difference(values, noise, (leader, name), family) for name in others}


def verdict(difference: Difference, higher_is_better: bool, margin: float | None = None) -> str:
    """ "better", "worse", "equivalent" (shown to be smaller than `margin` either way), "undecided", or "not tested (one
    seed)" where nothing is known of noise."""
    if difference.shown is None:
        return not_tested(max(difference.runs))
    if difference.shown and not (margin and difference.within(margin)):
        return "better" if (difference.shown > 0) == higher_is_better else "worse"
    return "equivalent" if margin and difference.within(margin) else "undecided"


def not_tested(seeds: int) -> str:
    return f"not tested ({'one seed' if seeds == 1 else f'{seeds} seeds'})"
