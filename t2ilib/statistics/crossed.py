"""Seeds and prompts both vary: what a difference between two variants would be for other seeds *and* other prompts.

Prompts are a sample as seeds are, and all seeds of all variants answer the same ones from the same noise: a crossed
design, as of readers and cases in radiology. Values of single pictures are taken as y = mu(variant) + seed within
variant + prompt + variant x prompt + rest, seeds and prompts at random. The variance of a difference then has the part
of seeds, which `pooled` estimates from whole runs, and that of prompts, estimated from the differences prompt by prompt;
what the rest put into both is taken off once (Hillis 2007, Stat. Med. 26, 596, for readers and cases; Brennan 2001,
Generalizability Theory, ch. 6), and degrees of freedom are Satterthwaite's.

Because the prompt stands in both variants, what it does to both cancels; `Pairing` says how much that saves, and how much
pairing by seed would. Leaves out: prompts of which one variant has no picture.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from t2ilib.statistics.means import LEVEL
from t2ilib.statistics.pooled import Difference, Values

Prompt = tuple[str, int]
"""Group and number."""
Pictures = Mapping[int, Mapping[Prompt, float]]
"""Of one variant: seed -> {prompt: value}."""


@dataclass(frozen=True)
class Crossed:
    """A difference for other seeds and other prompts. `mean`; `error`, `df`: its standard error and degrees of freedom;
    `low`, `high`: 95% interval of it alone; `together`: at the level of the family that it belongs to; `seeds`, `prompts`:
    standard errors by seeds alone and by prompts alone; `num_prompts`; `pairing`: what pairing by prompt saves."""

    mean: float
    error: float
    df: float
    low: float
    high: float
    together: tuple[float, float]
    seeds: float
    prompts: float
    num_prompts: int
    pairing: "Pairing"


@dataclass(frozen=True)
class Pairing:
    """What it saves to answer the same questions: `correlation` of both sides' values, and `saved`, by what the variance of
    the difference is divided; below 1 it costs. None where neither side varies."""

    correlation: float | None
    saved: float | None


def cross(one: Pictures, other: Pictures, difference: Difference) -> Crossed | None:
    """The two-way interval of one - other, whose seed noise is `difference`'s. None where there are fewer than two prompts
    that all runs of both answered, or nothing is known of seed noise."""
    prompts = sorted(set.intersection(*(set(own) for side in (one, other) for own in side.values())))
    if len(prompts) < 2 or difference.error is None:
        return None
    first, second = (table(side, prompts) for side in (one, other))
    by_prompt = first.mean(0) - second.mean(0)
    count = len(prompts)
    of_prompts = float(by_prompt.var(ddof=1)) / count
    parts = [(difference.error**2, difference.df), (of_prompts, count - 1.0)]
    rests = [rest_of(side) for side in (first, second)]
    twice = [
        (mean_square / side.size, df) for side, (mean_square, df) in zip((first, second), rests, strict=True) if df
    ]
    variance = sum(part for part, _ in parts) - sum(part for part, _ in twice)
    variance = max(variance, *(part for part, _ in parts))
    df = variance**2 / sum(part**2 / free for part, free in (*parts, *twice)) if variance > 0 else parts[0][1]
    error, mean = math.sqrt(variance), float(by_prompt.mean())
    alone, decides = (float(stats.t.isf(alpha / 2, df)) * error for alpha in (1 - LEVEL, difference.alpha))
    return Crossed(
        mean=mean,
        error=error,
        df=df,
        low=mean - alone,
        high=mean + alone,
        together=(mean - decides, mean + decides),
        seeds=difference.error,
        prompts=math.sqrt(of_prompts),
        num_prompts=count,
        pairing=pairing(first.mean(0), second.mean(0)),
    )


def table(side: Pictures, prompts: Sequence[Prompt]) -> np.ndarray:
    """(seeds, prompts) of one variant."""
    return np.array([[own[prompt] for prompt in prompts] for own in side.values()], float)


def rest_of(side: np.ndarray) -> tuple[float, int]:
    """Mean square of what is neither seed's nor prompt's, and its degrees of freedom; (0, 0) for one seed."""
    seeds, prompts = side.shape
    if seeds < 2:
        return 0.0, 0
    left = side - side.mean(0) - side.mean(1, keepdims=True) + side.mean()
    df = (seeds - 1) * (prompts - 1)
    return float((left**2).sum()) / df, df


def pairing(one: np.ndarray, other: np.ndarray) -> Pairing:
    """Of values that stand opposite each other, two at least."""
    apart, together = one.var(ddof=1) + other.var(ddof=1), (one - other).var(ddof=1)
    if apart <= 0:
        return Pairing(None, None)
    correlation = float(np.corrcoef(one, other)[0, 1]) if min(one.var(), other.var()) > 0 else None
    return Pairing(correlation, float(apart / together) if together > 0 else math.inf)


def pairing_by_seed(values: Values, pairs: Sequence[tuple[str, str]]) -> Pairing:
    """What pairing runs by seed saves over all `pairs` of variants, those with two seeds or more in common: the correlation
    within pairs, and the ratio of sums of variances."""
    apart = together = products = 0.0
    for pair in pairs:
        seeds = sorted(values[pair[0]].keys() & values[pair[1]].keys())
        if len(seeds) > 1:
            one, other = (np.array([values[name][seed] for seed in seeds], float) for name in pair)
            apart += one.var(ddof=1) + other.var(ddof=1)
            together += (one - other).var(ddof=1)
            products += 2 * np.cov(one, other)[0, 1]
    if apart <= 0:
        return Pairing(None, None)
    return Pairing(float(products / apart), float(apart / together) if together > 0 else math.inf)
