"""Which checkpoint to keep: the one whose score leads, how sure that is, and the earliest that is as good.

    choice = choose_step([0, 100, 200, 300], {"learned": learned, "kept": kept}, harmonic_mean, base=0)
    print(choice.sentence())  # step 200 (best in 71% of resamples; 100 to 300 in 95%)

All checkpoints drew the same prompts from the same noise. So prompts are what is resampled, the same ones at every
checkpoint, and, of several training runs, the runs (the pigeonhole bootstrap, Owen 2007, Ann. Appl. Stat. 1, 386: for
two crossed samples it errs on the wide side); n - 1 of n are drawn, which leaves the variance of a mean unbiased where
n is small (Rao & Wu 1988, J. Am. Stat. Assoc. 83, 231).

What is recommended is the earliest checkpoint that is less than one standard error behind the best (Breiman et al.
1984, Classification and Regression Trees, section 3.4.3; Hastie et al. 2009, section 7.10). The standard error is of
the paired difference, not of the best one's own score: what makes a prompt hard is hard at every checkpoint.

A checkpoint is *behind* where the model confidence set leaves it out (Hansen, Lunde & Nason 2011, Econometrica 79, 453):
while the hypothesis that all that are left score alike is refused at 5%, by the largest of their studentized distances
below their mean, the one with that distance goes. What is left holds the best in 95% of cases, and of checkpoints that
are all alike anyone goes in 5%. No error counts as smaller than their median: where few pictures are right, that of a
checkpoint may be nearly nothing by chance (measured on flat curves of 8 checkpoints and 100 prompts, 10 and 3% of the
pictures right: 24 and 43% false alarms without this, 8 and 2% with it). Where none goes, nothing tells the checkpoints
apart, and the choice says so. The share of resamples in which a checkpoint is best is no probability that it truly is: whoever
leads has had luck with these prompts, and resamples keep some of it. Imports no torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from t2ilib.config import ConfigError
from t2ilib.seeds import numpy_generator_for

RESAMPLES = 4000
LEVEL = 0.95
SLACK = 1e-9
"""Of the scores' size: differences and errors below it are rounding."""

Score = Callable[[Mapping[str, np.ndarray]], np.ndarray]
"""Of metrics as arrays of one shape the scores, of that shape."""


@dataclass(frozen=True)
class Measured:
    """A metric over checkpoints. `values`: (S, C), by training run and checkpoint. `pictures`: (S, C, N), what it is the mean of, NaN for a
    picture that it is not about; None where it is of all pictures together, and cannot be resampled. `group`: metrics of the same pictures
    have the same, and are resampled together."""

    values: np.ndarray
    pictures: np.ndarray | None = None
    group: str = ""


@dataclass(frozen=True)
class Choice:
    """What came of it. `scores`, and the ends of their 95% intervals (None: cannot be told), are by `steps`; `base` is the step of the
    base without an adapter, which is scored and no candidate.

    `share`: of resamples in which `best` is best; `earliest`, `latest`: between these lies the best step of 95% of them. `as_good`: the
    candidates that are not more than one standard error behind, `behind`: those that are shown to be behind. `over_base`: how much better
    than the base the recommended one is, with its 95% interval.
    """

    steps: tuple[int, ...]
    scores: tuple[float, ...]
    low: tuple[float, ...] | None
    high: tuple[float, ...] | None
    base: int | None
    best: int
    recommended: int
    share: float | None
    earliest: int | None
    latest: int | None
    as_good: tuple[int, ...]
    behind: tuple[int, ...]
    over_base: tuple[float, float | None, float | None] | None
    num_runs: int
    num_pictures: int

    @property
    def candidates(self) -> tuple[int, ...]:
        return tuple(step for step in self.steps if step != self.base)

    @property
    def told_apart(self) -> bool | None:
        """Whether any checkpoint is shown to be behind the best; None where nothing could be resampled, or there is one alone."""
        return None if self.share is None or len(self.candidates) < 2 else bool(self.behind)

    def score_of(self, step: int) -> float:
        return self.scores[self.steps.index(step)]

    def sentence(self) -> str:
        """The recommended step, with how sure it is."""
        if self.share is None:
            return f"step {self.recommended} (how sure that is cannot be told: one run, and nothing was measured picture by picture)"
        spread = f"{self.earliest} to {self.latest} in {LEVEL:.0%}" if self.earliest != self.latest else ""
        sure = "; ".join(filter(None, (f"best in {self.share:.0%} of resamples", spread)))
        if self.recommended == self.best:
            return f"step {self.best} ({sure})"
        return f"step {self.recommended}, as good as step {self.best} ({sure})"

    def reason(self) -> str:
        """Why this step, in words."""
        if len(self.candidates) == 1:
            return "It is the only checkpoint."
        over = f"{len(self.behind)} of the other {len(self.candidates) - 1}"
        if self.told_apart is None:
            return "It scored best. One run was measured, and no picture alone, so nobody can say by how much chance."
        if not self.told_apart:
            return (
                f"The checkpoints cannot be told apart: no difference from the best, step {self.best}, is larger than chance makes it. Of"
                " those that are as good the earliest is named; more prompts or more training runs would tell more."
            )
        if self.recommended == self.best:
            return f"It scored best, and none before it is within one standard error; {over} are shown to be behind it."
        return (
            f"The best score is step {self.best}'s; step {self.recommended} is the earliest within one standard error of it, and what was"
            f" trained less has forgotten less. {over} are shown to be behind the best."
        )


def harmonic_mean(metrics: Mapping[str, np.ndarray]) -> np.ndarray:
    """The harmonic mean of all metrics, 0 where one is, as F1 is of precision and recall."""
    columns = np.stack([np.asarray(column, dtype=float) for column in metrics.values()])
    some = (columns > 0).all(0)
    inverse = np.where(columns > 0, 1 / np.where(columns > 0, columns, 1.0), 0.0).sum(0)
    return np.where(some, len(columns) / np.where(some, inverse, 1.0), 0.0)


def alone(metrics: Mapping[str, np.ndarray]) -> np.ndarray:
    """The score that is one metric."""
    (column,) = metrics.values()
    return np.asarray(column, dtype=float)


def choose_step(
    steps: Sequence[int],
    metrics: Mapping[str, Measured],
    score: Score,
    higher_is_better: bool = True,
    base: int | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Choice:
    """The checkpoint to keep. `metrics`: those that `score` is made of, each over all `steps`, which rise; `base`: which of them is no
    checkpoint. Raises ConfigError where there is none to choose, and for arrays of other shapes."""
    candidates = [column for column, step in enumerate(steps) if step != base]
    if not candidates:
        raise ConfigError("there is no checkpoint to choose: the run kept none")
    num_runs = require_shapes(steps, metrics)
    way = 1.0 if higher_is_better else -1.0
    scores = way * score({name: metric.values for name, metric in metrics.items()}).mean(0)
    drawn = resample(metrics, score, num_runs, resamples, seed)
    best = max(candidates, key=lambda column: scores[column])
    pictures = max((np.shape(metric.pictures)[2] for metric in metrics.values() if metric.pictures is not None), default=0)  # fmt: skip
    told = {
        "steps": tuple(steps),
        "scores": tuple((way * scores).tolist()),
        "base": base,
        "best": steps[best],
        "num_runs": num_runs,
        "num_pictures": pictures,
    }
    if drawn is None:
        over = None if base is None else (float(scores[best] - scores[steps.index(base)]), None, None)
        return Choice(**told, recommended=steps[best], as_good=(steps[best],), behind=(), over_base=over, **UNKNOWN)
    drawn = way * drawn
    errors, behind = (drawn[:, [best]] - drawn).std(0), left_behind(scores, drawn, candidates)
    as_good = [c for c in candidates if scores[best] - scores[c] <= errors[c] + SLACK * abs(scores[best])]
    recommended = as_good[0]
    winners = np.array(candidates)[drawn[:, candidates].argmax(1)]
    ends = np.quantile(winners, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
    low, high = (way * interval(drawn))[:: int(way)]
    return Choice(
        **told,
        low=tuple(low.tolist()),
        high=tuple(high.tolist()),
        recommended=steps[recommended],
        share=float((winners == best).mean()),
        earliest=steps[ends[0]],
        latest=steps[ends[1]],
        as_good=tuple(steps[c] for c in as_good),
        behind=tuple(steps[c] for c in behind),
        over_base=None if base is None else lead_over(scores, drawn, recommended, list(steps).index(base)),
    )


UNKNOWN = {"low": None, "high": None, "share": None, "earliest": None, "latest": None}


def require_shapes(steps: Sequence[int], metrics: Mapping[str, Measured]) -> int:
    """The number of training runs; raises ConfigError where metrics are not of the same runs and of these checkpoints."""
    shapes = {name: np.shape(metric.values) for name, metric in metrics.items()}
    runs = {shape[0] for shape in shapes.values()}
    if len(runs) != 1 or any(shape[1:] != (len(steps),) for shape in shapes.values()):
        raise ConfigError(f"metrics of other runs or checkpoints than {len(steps)} of the same runs: {shapes}")
    return runs.pop()


def resample(
    metrics: Mapping[str, Measured], score: Score, num_runs: int, resamples: int, seed: int
) -> np.ndarray | None:
    """(R, C): the scores of resamples, means over training runs; None where there is nothing to resample."""
    groups = {metric.group for metric in metrics.values() if metric.pictures is not None}
    if not groups and num_runs < 2:
        return None
    weights: dict[str, np.ndarray] = {}
    usable: dict[str, np.ndarray] = {}
    for group in sorted(groups):
        own = [m.pictures for m in metrics.values() if m.pictures is not None and m.group == group]
        usable[group] = np.logical_and.reduce([np.isfinite(pictures).all((0, 1)) for pictures in own])
        weights[group] = draw_weights(int(usable[group].sum()), resamples, seed, "prompts", group)
    columns = {}
    for name, metric in metrics.items():
        if metric.pictures is None:
            columns[name] = np.broadcast_to(metric.values, (resamples, *metric.values.shape))
        else:
            pictures = metric.pictures[:, :, usable[metric.group]]
            columns[name] = np.einsum("rn,scn->rsc", weights[metric.group], pictures, optimize=True)
    return np.einsum("rs,rsc->rc", draw_weights(num_runs, resamples, seed, "runs"), score(columns))


def draw_weights(count: int, resamples: int, seed: int, *address: str) -> np.ndarray:
    """(R, count): the share that each of `count` has in a resample, of which `count - 1` are drawn with replacement."""
    if count < 2:
        return np.ones((resamples, count))
    drawn = numpy_generator_for(seed, "resample checkpoints", *address)
    return drawn.multinomial(count - 1, np.full(count, 1 / count), size=resamples) / (count - 1)


def left_behind(scores: np.ndarray, drawn: np.ndarray, candidates: Sequence[int]) -> list[int]:
    """The candidates that the model confidence set leaves out, in their order."""
    kept, rounding = list(candidates), SLACK * np.abs(scores).max()
    while len(kept) > 1:
        below = scores[kept].mean() - scores[kept]
        if below.max() <= rounding:
            break
        moved = drawn[:, kept].mean(1, keepdims=True) - drawn[:, kept] - below
        errors = moved.std(0)
        errors = np.maximum(errors, max(rounding, float(np.median(errors))))
        distance = below / errors
        if ((moved / errors).max(1) >= distance.max()).mean() >= 1 - LEVEL:
            break
        del kept[int(distance.argmax())]
    return [column for column in candidates if column not in kept]


def lead_over(scores: np.ndarray, drawn: np.ndarray, column: int, other: int) -> tuple[float, float, float]:
    """The difference of two columns with its 95% interval."""
    low, high = interval(drawn[:, [column]] - drawn[:, [other]])
    return float(scores[column] - scores[other]), float(low[0]), float(high[0])


def interval(drawn: np.ndarray) -> np.ndarray:
    """(2, C): the ends of the percentile intervals of resamples (R, C)."""
    return np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
