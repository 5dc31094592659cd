"""How many seeds a difference needs: the power of the pooled test, before the runs are made or from those that are there.

Power is the probability that a difference of a given size is shown, with noise as it was estimated: of Student's t under
a shift (Johnson & Welch 1940), at the level that one question of the family has. It is asked about a difference that
would matter (a margin), not about the one that was seen: power for what was seen says no more than its p (Hoenig & Heisey
2001, Am. Stat. 55, 19). Where a study names no margin there is nothing else to ask about, and whoever tells it says so.
"""

import math
from collections.abc import Sequence

from scipy import stats

from t2ilib.statistics.means import LEVEL

POWER = 0.8
"""What is asked for (Cohen 1988, Statistical Power Analysis, sec. 2.4)."""
MOST = 1000


def power(size: float, deviation: float, seeds: int, variants: int, alpha: float = 1 - LEVEL, still: bool = False) -> float:
    """The probability that a difference of `size` between two variants of `seeds` runs each is shown, either way, in a study
    of so many trained `variants` whose runs vary by `deviation`; `alpha`: two-sided, of this question; `still`: the other side
    takes no step. 0 where no variant has two runs."""
    df = variants * (seeds - 1)
    if df < 1:
        return 0.0
    if deviation <= 0:
        return float(size != 0)
    shift = abs(size) / (deviation * math.sqrt((1 if still else 2) / seeds))
    limit = float(stats.t.isf(alpha / 2, df))
    if shift > 40:  # beyond which the noncentral t underflows
        return float(stats.norm.sf(limit - shift)) if df > 30 else float(stats.chi2.cdf(df * (shift / limit) ** 2, df))
    return float(stats.nct.sf(limit, df, shift) + stats.nct.cdf(-limit, df, shift))


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
        low, high = (low, middle) if power(size, deviation, middle, variants, alpha, still) >= wanted else (middle, high)
    return high


def smallest_found(
    deviation: float, seeds: int, variants: int, alpha: float = 1 - LEVEL, wanted: float = POWER
) -> float | None:
    """The smallest difference that so many seeds show with the probability `wanted`; None for one seed a variant."""
    if variants * (seeds - 1) < 1:
        return None
    low, high = 0.0, deviation
    while power(high, deviation, seeds, variants, alpha) < wanted:
        high *= 2
        if high > 1e6 * deviation:
            return None
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle, deviation, seeds, variants, alpha) >= wanted else (middle, high)
    return high


def power_rows(
    sizes: Sequence[float], seeds: Sequence[int], deviation: float, variants: int, alpha: float = 1 - LEVEL
) -> list[list[float]]:
    """Power of each size (rows) with each number of seeds (columns)."""
    return [[power(size, deviation, count, variants, alpha) for count in seeds] for size in sizes]
