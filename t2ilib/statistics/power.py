"""How many seeds a difference needs: the power of the pooled test, before the runs are made or from those that are there.

Power is the probability that a difference of a given size is shown, with noise as it was estimated: that of Student's t under
a shift (Johnson & Welch 1940), at the level that one question of the family has, less what it costs that noise is looked at. It is asked about a difference that
would matter (a margin), not about the one that was seen: power for what was seen says no more than its p (Hoenig & Heisey
2001, Am. Stat. 55, 19). Where a study names no margin there is nothing else to ask about, and whoever tells it says so.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from t2ilib.seeds import numpy_generator_for
from t2ilib.statistics.means import LEVEL
from t2ilib.statistics.pooled import UNLIKE

POWER = 0.8
"""What is asked for (Cohen 1988, Statistical Power Analysis, sec. 2.4)."""
MOST = 1000
DRAWS = 4000


def power(
    size: float, deviation: float, seeds: int, variants: int, alpha: float = 1 - LEVEL, still: bool = False
) -> float:
    """The probability that a difference of `size` between two variants of `seeds` runs each is shown, either way, in a study
    of so many trained `variants` whose runs vary by `deviation`; `alpha`: two-sided, of this question; `still`: the other side
    takes no step. 0 where no variant has two runs."""
    if variants * (seeds - 1) < 1:
        return 0.0
    if deviation <= 0:
        return float(size != 0)
    limits = limits_drawn(seeds, variants, alpha, still)
    shift = abs(size) / (deviation * math.sqrt((1 if still else 2) / seeds))
    return float(np.mean(stats.norm.sf(limits - shift) + stats.norm.sf(limits + shift)))


@functools.lru_cache(maxsize=512)
def limits_drawn(seeds: int, variants: int, alpha: float, still: bool) -> np.ndarray:
    """How far from zero a difference must lie to be shown, in its true standard errors, in each of 4,000 studies: the noise of
    one or two variants and of all others is drawn, at a fixed address, and estimated as `pooled` does, which now and then takes one
    for noisier than it is."""
    mine, df = seeds - 1, variants * (seeds - 1)
    sides = 1 if still else min(2, variants)
    rng = numpy_generator_for(0, "power", seeds, variants, sides)
    own = rng.chisquare(mine, (DRAWS, sides))
    rest = df - sides * mine
    total = own.sum(1) + (rng.chisquare(rest, DRAWS) if rest else 0.0)
    pooled = total / df
    of_side, free = np.broadcast_to(pooled[:, None], own.shape).copy(), np.full(own.shape, float(df))
    if df > mine:
        others = (total[:, None] - own) / (df - mine)
        noisier = (own / mine > pooled[:, None]) & (own / mine > others * stats.f.isf(UNLIKE, mine, df - mine))
        of_side[noisier], free[noisier] = own[noisier] / mine, mine
    variance = of_side.sum(1)
    alike = (free == df).all(1)
    reach = np.where(alike, df, variance**2 / (of_side**2 / free).sum(1))
    return stats.t.isf(alpha / 2, reach) * np.sqrt(variance / sides)


def seeds_needed(
    size: float, deviation: float, variants: int, alpha: float = 1 - LEVEL, still: bool = False, wanted: float = POWER
) -> int | None:
    """The fewest seeds a variant with which a difference of `size` is shown with the probability `wanted`; None above 1,000, or
    for a difference of nothing."""
    if size == 0 or power(size, deviation, MOST, variants, alpha, still) < wanted:
        return None
    low, high = 1, MOST  # power rises with seeds
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (
            (low, middle) if power(size, deviation, middle, variants, alpha, still) >= wanted else (middle, high)
        )
    return high


def smallest_found(
    deviation: float, seeds: int, variants: int, alpha: float = 1 - LEVEL, still: bool = False, wanted: float = POWER
) -> float | None:
    """The smallest difference that so many seeds show with the probability `wanted`; None for one seed a variant."""
    if variants * (seeds - 1) < 1 or deviation <= 0:
        return None
    low, high = 0.0, deviation
    while power(high, deviation, seeds, variants, alpha, still) < wanted:
        high *= 2
        if high > 1e6 * deviation:
            return None
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (
            (low, middle) if power(middle, deviation, seeds, variants, alpha, still) >= wanted else (middle, high)
        )
    return high


def power_rows(
    sizes: Sequence[float], seeds: Sequence[int], deviation: float, variants: int, alpha: float = 1 - LEVEL
) -> list[list[float]]:
    """Power of each size (rows) with each number of seeds (columns)."""
    return [[power(size, deviation, count, variants, alpha) for count in seeds] for size in sizes]
