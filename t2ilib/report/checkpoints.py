"""Which checkpoint of each variant to keep: what its runs' checkpoints measured, read from their folders, and the choice.

Several training runs of a variant are one sample of it: curves are their means, the choice is one for all, over the checkpoints that all of
them have. What decides is the study's score (`studies.scoring`): learned and kept together, where both are shares and no formula says otherwise. What
the held-out loss alone would have chosen stands beside it. Imports no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from t2ilib.config import ConfigError
from t2ilib.evaluation.metrics import Metric, flagged
from t2ilib.evaluation.steps import BASE, LOSS, MeasuredSteps, load_steps
from t2ilib.statistics.choosing import Choice, Measured, Score, alone, choose_step, harmonic_mean
from t2ilib.studies.scoring import TOGETHER, scoring

ROLES = ("learned", "kept", "followed", "loss")
"""Roles of the metrics that are shown over the checkpoints, in this order."""


@dataclass(frozen=True)
class Deciding:
    """What decides: the score's `metric`, the metrics `parts` that it is made of, and how."""

    metric: Metric
    parts: tuple[str, ...]
    score: Score


@dataclass(frozen=True)
class VariantSteps:
    """The checkpoints of a variant, or of a run alone. `steps` rise; BASE among them is the base without an adapter. `metrics`: those with
    a role, each over all `steps` and runs, NaN where the base was not measured; `choice`: by what decides; `by_loss`: by the held-out loss.
    `left_out`: checkpoints that not all runs have; `flags`: checkpoint -> what a metric above its ceiling means there, in any run."""

    name: str
    title: str
    runs: tuple[Path, ...]
    seeds: tuple[int, ...]
    steps: tuple[int, ...]
    declared: Mapping[str, Metric]
    metrics: Mapping[str, Measured]
    deciding: Deciding
    choice: Choice
    by_loss: Choice | None
    left_out: tuple[int, ...]
    flags: Mapping[int, tuple[str, ...]]

    def speaking(self, role: str) -> str | None:
        """The metric that speaks for a role; None where none was measured."""
        return next((name for name in self.metrics if self.declared[name].role == role), None)

    def per_run(self) -> np.ndarray:
        """(S, C): the score of every run and step that was scored, `choice.steps`."""
        columns = [self.steps.index(step) for step in self.choice.steps]
        return self.deciding.score({name: self.metrics[name].values[:, columns] for name in self.deciding.parts})

    def shown_run(self) -> int:
        """The place of the run that stands for all of them in pictures: its score at the chosen step is nearest to their median."""
        scores = self.per_run()[:, self.choice.steps.index(self.choice.recommended)]
        return int(np.abs(scores - np.median(scores)).argmin())


def decide(
    results: Sequence[Mapping[str, float]], declared: Mapping[str, Metric], formula: str | None = None
) -> Deciding | None:
    """What decides, of the metrics that all `results` have: the study's `formula`, or the rule of `studies.scoring`, which raises what it
    raises there; None where nothing can."""
    scored = scoring(results, declared, formula)
    if scored is None:
        return None

    def score(metrics: Mapping[str, np.ndarray]) -> np.ndarray:
        columns = np.broadcast_arrays(*(metrics[name] for name in scored.parts))
        cells = zip(*(column.ravel().tolist() for column in columns), strict=True)
        values = [scored.of(dict(zip(scored.parts, cell, strict=True))) for cell in cells]
        return np.array(values).reshape(columns[0].shape)

    fast = {TOGETHER: harmonic_mean} | ({scored.metric: alone} if scored.formula.names == scored.parts else {})
    return Deciding(scored.metric, scored.parts, fast.get(scored.metric, score))


def read_variant_steps(
    name: str,
    title: str,
    folders: Sequence[Path],
    seeds: Sequence[int],
    only: Sequence[int] = (),
    formula: str | None = None,
) -> VariantSteps:
    """The checkpoints of a variant's runs (`folders`, by `seeds`), those of `only` where some are named. Raises ConfigError where nothing
    that could decide was measured of them, and where the runs have no checkpoint in common."""
    runs = [load_steps(folder) for folder in folders]
    there = [{step for step in run.metrics if step != BASE and (not only or step in only)} for run in runs]
    common = sorted(set.intersection(*there))
    if not common:
        raise ConfigError(f"{name}: no checkpoint was measured of all its runs ({', '.join(map(str, folders))})")
    results = [run.metrics[step] for run in runs for step in common]
    declared = runs[0].declared
    deciding = decide(results, declared, formula)
    if deciding is None:
        raise ConfigError(
            f"{name}: nothing was measured that tells which checkpoint is better: hold pictures out (data.validation_share), or name"
            " measures (evaluation.measures)"
        )
    steps = (BASE, *common) if all(BASE in run.metrics for run in runs) else tuple(common)
    chosen = chosen_metrics(results, declared, deciding)
    metrics = {key: gather(runs, steps, key) for key in chosen}
    parts = {key: metrics[key] for key in deciding.parts}
    choice = choose_at(steps, parts, deciding.score, deciding.metric.better == "higher")
    by_loss = choose_at(steps, {LOSS: metrics[LOSS]}, alone, False) if LOSS in metrics else None
    return VariantSteps(
        name,
        title,
        tuple(folders),
        tuple(seeds),
        steps,
        declared,
        metrics,
        deciding,
        choice,
        by_loss,
        tuple(sorted(set.union(*there) - set(common))),
        {step: told for step in common if (told := flags_of([run.metrics[step] for run in runs], declared))},
    )


def flags_of(results: Sequence[Mapping[str, float]], declared: Mapping[str, Metric]) -> tuple[str, ...]:
    """What the metrics that lie above their ceiling mean, each once."""
    metrics = [metric for own in results for metric in flagged(own, declared).values()]
    return tuple(dict.fromkeys(f"{metric.title}: {metric.flag}" for metric in metrics))


def chosen_metrics(
    results: Sequence[Mapping[str, float]], declared: Mapping[str, Metric], deciding: Deciding
) -> list[str]:
    """The metrics that are shown: what the score is made of, and of each role the first that was measured everywhere."""
    everywhere = [key for key, metric in declared.items() if metric.role and all(key in own for own in results)]
    first = [next((key for key in everywhere if declared[key].role == role), None) for role in ROLES]
    shown = dict.fromkeys(key for key in (*deciding.parts, *first) if key)
    order = {role: place for place, role in enumerate(ROLES)}
    return sorted(shown, key=lambda key: order.get(declared[key].role, len(ROLES)))


def gather(runs: Sequence[MeasuredSteps], steps: Sequence[int], name: str) -> Measured:
    """A metric over runs and steps, NaN where the base lacks it; by picture where all runs measured the same pictures at every step."""
    values = np.array([[run.metrics.get(step, {}).get(name, np.nan) for step in steps] for run in runs])
    cells = [[run.pictures.get(name, {}).get(step, {}) for step in steps] for run in runs]
    asked = [cell for row in cells for cell, step in zip(row, steps, strict=True) if cell or step != BASE]
    pictures = list(asked[0])
    if not pictures or any(cell.keys() != asked[0].keys() for cell in asked):
        return Measured(values)
    by_picture = [[[cell.get(picture, np.nan) for picture in pictures] for cell in row] for row in cells]
    group = f"{pictures[0].group}: {', '.join(str(picture.number) for picture in pictures)}"
    return Measured(values, np.array(by_picture), group)


def choose_at(steps: Sequence[int], metrics: Mapping[str, Measured], score: Score, higher_is_better: bool) -> Choice:
    """The choice by these metrics, without the base where it lacks one of them."""
    kept = [c for c, step in enumerate(steps) if step != BASE or all(np.isfinite(m.values[:, c]).all() for m in metrics.values())]  # fmt: skip
    asked = [steps[column] for column in kept]
    cut = {name: Measured(m.values[:, kept], None if m.pictures is None else m.pictures[:, kept], m.group) for name, m in metrics.items()}  # fmt: skip
    return choose_step(asked, cut, score, higher_is_better, BASE if BASE in asked else None)


def summary(variants: Sequence[VariantSteps], about: Mapping[str, Any]) -> dict[str, Any]:
    """All numbers and the choices, as JSON values; `about`: what was asked, written first."""
    return {"version": 1, "kind": "t2ilib checkpoints", **about, "variants": {own.name: numbers_of(own) for own in variants}}  # fmt: skip


def numbers_of(own: VariantSteps) -> dict[str, Any]:
    """A variant's part of the summary."""
    metric = own.deciding.metric
    return {
        "title": own.title,
        "runs": [str(folder) for folder in own.runs],
        "seeds": list(own.seeds),
        "steps": list(own.steps),
        "left_out": list(own.left_out),
        "flags": {str(step): list(told) for step, told in own.flags.items()},
        "score": {"title": metric.title, "unit": metric.unit, "better": metric.better, "made_of": list(own.deciding.parts)},
        "recommended": own.choice.recommended,
        "sentence": own.choice.sentence(),
        "reason": own.choice.reason(),
        "choice": choice_numbers(own.choice) | {"scores_of_runs": own.per_run().tolist()},
        "by_held_out_loss": own.by_loss and choice_numbers(own.by_loss),
        "metrics": {
            name: {"title": own.declared[name].title, "role": own.declared[name].role, "values": listed(measured.values)}
            for name, measured in own.metrics.items()
        },
    }  # fmt: skip


def choice_numbers(choice: Choice) -> dict[str, Any]:
    return asdict(choice) | {"told_apart": choice.told_apart}


def listed(values: np.ndarray) -> list[list[float | None]]:
    """Nested lists in which what was not measured is None."""
    return [[None if np.isnan(value) else float(value) for value in row] for row in values]
