"""The best that a search may be expected to have found by then: a curve over the budget, in place of the one order in which trials were made.

Of n trials the best of k is, on the average over all choices of k of them (Tang et al., arXiv 2004.13705, section 3, who show that choosing
with replacement, as Dodge et al., arXiv 1909.03004, eq. 1, is biased downwards),

    E[max of k] = sum over i of v_(i) * C(i - 1, k - 1) / C(n, k)        v_(1) <= ... <= v_(n)

which is unbiased for k <= n, and says nothing beyond. It takes trials as if drawn from one distribution; those of a grid, and what a sampler
chose because of earlier ones, are not, so the curve describes these n trials and promises nothing of others.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass


def expected_best(values: Sequence[float]) -> list[float]:
    """The expected highest of k of `values` chosen without replacement, for k = 1 to all of them. Raises ValueError without values, and for
    one that is not finite."""
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"an expected best needs at least one value, all finite; got {list(values)}")
    ordered, count = sorted(values), len(values)
    return [
        math.fsum(value * math.comb(i, k - 1) for i, value in enumerate(ordered)) / math.comb(count, k)
        for k in range(1, count + 1)
    ]


@dataclass(frozen=True)
class Curve:
    """An expected best over time: `best[k - 1]` once k trials of `hours` each are made. It is known until the last of them."""

    hours: float
    best: tuple[float, ...]

    @property
    def ends(self) -> float:
        return self.hours * len(self.best)

    def at(self, time: float) -> float:
        """The value at `time` hours; raises ValueError before the first trial is made, and beyond the last."""
        count = math.floor(time / self.hours + 1e-9)
        if not 1 <= count <= len(self.best):
            raise ValueError(f"the curve is known from {self.hours:g} to {self.ends:g} h, not at {time:g} h")
        return self.best[count - 1]


@dataclass(frozen=True)
class Lead:
    """Which of two curves is ahead. `sign`: 1 the first, -1 the second, 0 neither, where both end; `since`: from when on, in hours; `crossings`:
    when the one that is ahead changes; `begins`, `ends`: what both curves are known in."""

    sign: int
    since: float
    crossings: tuple[float, ...]
    begins: float
    ends: float


def leading(first: Curve, second: Curve) -> Lead | None:
    """Who is ahead when, as far as both are known; None where there is no such time."""
    begins, ends = max(first.hours, second.hours), min(first.ends, second.ends)
    if begins > ends * (1 + 1e-9):
        return None
    steps = {curve.hours * k for curve in (first, second) for k in range(1, len(curve.best) + 1)}
    times = [begins, *sorted(time for time in steps if begins < time <= ends)]
    signs = [(a > b) - (a < b) for a, b in ((first.at(time), second.at(time)) for time in times)]
    since = len(times) - 1
    while since and signs[since - 1] == signs[-1]:
        since -= 1
    ahead = [(time, sign) for time, sign in zip(times, signs, strict=True) if sign]
    crossings = tuple(now[0] for before, now in itertools.pairwise(ahead) if before[1] != now[1])
    return Lead(signs[-1], times[since], crossings, begins, ends)
