"""Measures: what judges the pictures that a trained model draws, chosen by name like everything else.

A measure is a function `(pictures, prompts, context) -> {metric: value}` with the declarations of its metrics; what it says of
single pictures it gives as a list, whose mean is the metric (`evaluation.rows`). The checker of the shapes world, the CLIP score
and a user's own are the same to `measure`, which draws each group of prompts once and asks every measure about it. A metric that
was not measured is missing, never zero.
"""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from PIL import Image

from t2ilib.config import ConfigError, RunConfig, check_choice
from t2ilib.environment import note_environment
from t2ilib.evaluation import clip
from t2ilib.evaluation.context import Context, Measure
from t2ilib.evaluation.drift import DRIFT
from t2ilib.evaluation.likeness import DIVERSITY_OF_GROUPS, LIKENESS
from t2ilib.evaluation.memorising import COPIED, MEMORISING
from t2ilib.evaluation.metrics import ENTRY_POINTS, Metric, check_measures, declare, flagged
from t2ilib.evaluation.references import keep_base_pictures
from t2ilib.evaluation.rows import Row, Value, split, write_rows
from t2ilib.evaluation.sampling import draw, save_pictures
from t2ilib.evaluation.speed import METRICS as COSTS
from t2ilib.evaluation.speed import drawing_costs
from t2ilib.evaluation.step_counts import STEP_COUNTS
from t2ilib.memory import Peaks
from t2ilib.models.components import Components
from t2ilib.models.load import name_of_device
from t2ilib.pyfile import module_at
from t2ilib.shapes import checker
from t2ilib.shapes.world import Scene, caption
from t2ilib.text import write_whole
from t2ilib.tracking.tracker import NullTracker, Tracker

log = logging.getLogger(__name__)

SHOWN = 8
"""Pictures that are kept for the report's grid, of each group as many."""


def check_pictures(pictures: Sequence[Image.Image], prompts: Sequence[str], context: Context) -> dict[str, Value]:
    """The shapes checker; {} for a group whose scenes nobody knows."""
    return checker.checked(context.group, context.scenes, pictures) if context.scenes else {}


def score_by_clip(pictures: Sequence[Image.Image], prompts: Sequence[str], context: Context) -> dict[str, Value]:
    """The CLIP score of the run's CLIP, or of the one that lies beside its base."""
    return {f"clip_score/{context.group}": clip.clip_scores(*clip.shared_clip(context), pictures, prompts)}


MEASURES: dict[str, Measure] = {
    "checker": Measure(check_pictures, checker.METRICS, checker.lacks),
    "clip": Measure(score_by_clip, clip.METRICS, clip.lacks),
    "likeness": LIKENESS,
    "drift": DRIFT,
    "diversity": DIVERSITY_OF_GROUPS,
    "memorising": MEMORISING,
    "copies": COPIED,
    "step_counts": STEP_COUNTS,
}


def find_measures(run: RunConfig) -> dict[str, Measure]:
    """Name -> measure, as `run.evaluation.measures` says. Raises ConfigError for one that does not exist, or that the run lacks
    something for; without names those of MEASURES that apply."""
    names = run.evaluation.measures
    if names is None:
        return {name: measure for name, measure in MEASURES.items() if measure.lacks(run) is None}
    found = {name: find_measure(name) for name in names}
    for name, measure in found.items():
        if reason := measure.lacks(run):
            raise ConfigError(f"evaluation.measures: {name} cannot measure this run: {reason}")
    return found


def tell_lacking(run: RunConfig) -> None:
    """Warns of measures that are about a run's groups of prompts and cannot be asked, where none was named."""
    for name in ("likeness", "drift") if run.evaluation.measures is None and run.evaluation.prompt_groups else ():
        if reason := MEASURES[name].lacks(run):
            log.warning("%s is not measured: %s", name, reason)


def find_measure(name: str) -> Measure:
    """A measure of MEASURES, of an installed package's entry point, or `file.py:name`; raises ConfigError where there is none."""
    check_measures([name])
    path, colon, attribute = name.rpartition(":")
    if colon:
        module = module_at(Path(path), "evaluation.measures")
        offered = [key for key, value in vars(module).items() if isinstance(value, Measure)]
        return getattr(module, check_choice(attribute, offered, f"evaluation.measures: in {path}, a Measure called"))
    if name in MEASURES:
        return MEASURES[name]
    found = metadata.entry_points(group=ENTRY_POINTS)[name].load()
    if not isinstance(found, Measure):
        raise ConfigError(f"evaluation.measures: the entry point {name} gives a {type(found).__name__}, not a Measure")
    return found


def prompt_groups(run: RunConfig, prompts: Sequence[str] = ()) -> dict[str, tuple[list[str], tuple[Scene, ...] | None]]:
    """Group -> prompts, and their scenes where they are known: the drawn world's test scenes, and the run's groups of prompts, or where it
    has neither its own prompts.

    `prompts`: for a run on pictures of one's own that names none.
    """
    scenes = checker.checked_scenes(run)
    groups = {group: ([caption(scene) for scene in own], tuple(own)) for group, own in scenes.items()}
    if run.evaluation.prompt_groups:
        groups |= {group: (list(asked), None) for group, asked in run.evaluation.prompt_groups.named().items()}
    if groups:
        return groups
    asked = run.evaluation.prompts or (prompts if run.data.source != "shapes" else ())
    return {"prompts": (list(asked), None)} if asked else {}


@dataclass(frozen=True)
class Judged:
    """What the pictures of a model measured. `metrics`: by name, means over pictures where they are of single ones; `rows`: those by picture;
    `declared`: what they are; `shown`: some prompts with their pictures."""

    metrics: dict[str, float]
    rows: list[Row]
    declared: dict[str, Metric]
    shown: list[tuple[str, Image.Image]]


def judge(
    run: RunConfig,
    components: Components,
    prompts: Sequence[str] = (),
    step: int | None = None,
    shared: dict[str, Any] | None = None,
    peaks: Peaks | None = None,
) -> Judged:
    """Draws test prompts with a model as it is, and measures the pictures; writes nothing. The same prompts are drawn from the same noise
    whatever the weights.

    `step`: of the weights, the run's last without it; `shared`: what is kept from one call to the next of the same run and base (see
    `Context`); the rest as in `measure`, which raises the same.
    """
    measures = find_measures(run)
    found = Judged({}, [], {}, [])
    shared, peaks = {} if shared is None else shared, peaks or Peaks()
    groups = prompt_groups(run, prompts)
    for group, (asked, scenes) in groups.items():
        with peaks.during("measuring"):
            pictures = draw(components, asked, run.evaluation, resolution=run.data.resolution)
            few = SHOWN // len(groups)
            found.shown.extend(list(zip(asked, pictures, strict=True))[:: max(1, len(asked) // few)][:few])
            if run.evaluation.prompt_groups and scenes is None:
                keep_base_pictures(run, components, asked, pictures)
            context = Context(group, run, components, scenes, shared)
            told: dict[str, Value] = {}
            for name, chosen in measures.items():
                values, declared = chosen.function(pictures, asked, context), chosen.declared(group, run)
                if unknown := sorted(values.keys() - declared.keys()):
                    raise ConfigError(f"the measure {name} does not declare what it returned: {', '.join(unknown)}")
                told |= values
                found.declared.update({key: metric for key, metric in declared.items() if key in values})
            means, single = split(told, run.training.steps if step is None else step, group, asked)
            found.metrics.update(means)
            found.rows.extend(single)
    return found


def measure(
    run: RunConfig,
    components: Components,
    tracker: Tracker | None = None,
    metrics: Mapping[str, float] | None = None,
    prompts: Sequence[str] = (),
) -> dict[str, float]:
    """Draws test prompts, measures the pictures and what drawing costs, and writes all of a run's final numbers to `metrics.json` in its
    output, and what single pictures measured to `rows.jsonl`.

    `metrics`: what training gave (`TrainResult.metrics`), written along. `prompts` (`TrainResult.prompts`): what is drawn where
    `evaluation.prompts` names nothing; the drawn world has test prompts of its own. Also keeps some pictures for the report.
    Raises ConfigError as `find_measures` does, and for a metric that its measure does not declare.
    """
    tell_lacking(run)
    peaks = Peaks()
    judged = judge(run, components, prompts, peaks=peaks)
    found = judged.metrics
    for name, metric in (flagged(found, judged.declared) if run.trains != "nothing" else {}).items():
        log.warning(
            "%s: %.3g, and at most %.3g is usual: %s", metric.title, found[name], found[metric.ceiling], metric.flag
        )
    write_rows(run.output, judged.rows)
    if judged.shown:
        with peaks.during("measuring"):
            found |= drawing_costs(run, components)
    declare(run.output, judged.declared | (COSTS if judged.shown else {}))
    note_environment(run.output, name_of_device(components.device))
    shutil.rmtree(run.output / "pictures", ignore_errors=True)  # of other prompts, perhaps
    if judged.shown:
        save_pictures([picture for _, picture in judged.shown], run.output / "pictures")
        (run.output / "pictures" / "prompts.json").write_text(json.dumps([text for text, _ in judged.shown], indent=1))
    metrics = dict(metrics or {})
    found |= {name: max(value, metrics.get(name, 0.0)) for name, value in peaks.metrics().items()}
    (tracker or NullTracker()).log_metrics(found, run.training.steps)
    metrics |= found
    write_whole(run.output / "metrics.json", json.dumps(metrics, indent=1))
    return metrics
