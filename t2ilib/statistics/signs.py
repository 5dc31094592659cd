"""The test of a difference that assumes least: flipping the signs of differences by seed.

`exact_difference` compares two variants by the seeds that they share, and assumes of noise only that it is as likely to favour
the one as the other. **Few seeds cannot show anything by it**: with five its least p is 1/16. It stands beside the pooled
comparison (`pooled`), which decides, as a check.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from t2ilib.seeds import numpy_generator_for
from t2ilib.statistics.means import LEVEL, SLACK

MAX_EXACT_PAIRS = 14
MONTE_CARLO_FLIPS = 20_000


@dataclass(frozen=True)
class ExactDifference:
    """Mean of value - reference over the seeds that both have. `p_value`: of the sign-flip test, None below two pairs;
    `low`, `high`: the shifts that it does not refuse at 5%, None below six pairs."""

    mean: float
    p_value: float | None
    low: float | None
    high: float | None
    num_pairs: int


def exact_difference(values: Mapping[int, float], reference: Mapping[int, float]) -> ExactDifference | None:
    """value - reference by seed (`{seed: value}`), over the seeds that both have; None where they share none."""
    common = sorted(values.keys() & reference.keys())
    if not common:
        return None
    found = np.array([values[seed] - reference[seed] for seed in common])
    found[np.abs(found) <= SLACK * np.abs(found).max()] = 0.0
    low, high = flip_interval(found) or (None, None)
    return ExactDifference(float(found.mean()), sign_flip_p(found), low, high, len(common))


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
