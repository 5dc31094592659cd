"""Measures: what judges the pictures that a trained model draws, chosen by name like everything else.

A measure is a function `(pictures, prompts, context) -> {metric: value}` with the declarations of its metrics; what it says of
single pictures it gives as a list, whose mean is the metric (`evaluation.rows`). The checker of the shapes world, the CLIP score
and a user's own are the same to `measure`, which draws each group of prompts once and asks every measure about it. A metric that
was not measured is missing, never zero.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from PIL import Image

from t2ilib.config import ConfigError, RunConfig, check_choice
from t2ilib.environment import note_environment
from t2ilib.evaluation import clip
from t2ilib.evaluation.metrics import ENTRY_POINTS, Metric, check_measures, declare
from t2ilib.evaluation.rows import Row, Value, split, write_rows
from t2ilib.evaluation.sampling import draw, save_pictures
from t2ilib.memory import Peaks
from t2ilib.models.components import Components
from t2ilib.models.load import name_of_device
from t2ilib.pyfile import module_at
from t2ilib.shapes import checker
from t2ilib.shapes.world import Scene, caption
from t2ilib.text import write_whole
from t2ilib.tracking.tracker import NullTracker, Tracker

SHOWN = 8
"""Pictures that are kept for the report's grid, of each group as many."""


@dataclass(frozen=True)
class Context:
    """What a measure may want to know besides pictures and prompts: the `group` of prompts (it is part of the metrics' names),
    the run, the model that drew, and, in the drawn world, the scene that each prompt asks for. `shared`: kept from one group to
    the next, for a model that a measure loads."""

    group: str
    run: RunConfig
    components: Components
    scenes: tuple[Scene, ...] | None = None
    shared: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Measure:
    """`function(pictures, prompts, context)` returns metrics by name, each declared in `metrics`, where `{group}` in a name or
    title stands for the group of prompts: a number, or a list of one a picture, None for a picture that the metric is not about.
    `lacks(run)`: why a run cannot be measured by it, or None."""

    function: Callable[[Sequence[Image.Image], Sequence[str], Context], Mapping[str, Value]]
    metrics: Mapping[str, Metric]
    lacks: Callable[[RunConfig], str | None] = lambda run: None

    def declared(self, group: str) -> dict[str, Metric]:
        return {
            name.format(group=group): replace(metric, title=metric.title.format(group=group.replace("_", " ")))
            for name, metric in self.metrics.items()
        }


def check_pictures(pictures: Sequence[Image.Image], prompts: Sequence[str], context: Context) -> dict[str, Value]:
    """The shapes checker; {} for a group whose scenes nobody knows."""
    return checker.checked(context.group, context.scenes, pictures) if context.scenes else {}


def score_by_clip(pictures: Sequence[Image.Image], prompts: Sequence[str], context: Context) -> dict[str, Value]:
    """The CLIP score of the run's CLIP, or of the one that lies beside its base."""
    if "clip" not in context.shared:
        context.shared["clip"] = clip.load_clip(context.run, context.components.device)
    model, tokenizer = context.shared["clip"]
    return {f"clip_score/{context.group}": clip.clip_scores(model, tokenizer, pictures, prompts)}


MEASURES: dict[str, Measure] = {
    "checker": Measure(check_pictures, checker.METRICS, checker.lacks),
    "clip": Measure(score_by_clip, clip.METRICS, clip.lacks),
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
    """Group -> prompts, and their scenes where they are known: the drawn world's test scenes, or the run's own prompts.

    `prompts`: for a run on pictures of one's own that names none.
    """
    scenes = checker.checked_scenes(run)
    if scenes:
        return {group: ([caption(scene) for scene in own], tuple(own)) for group, own in scenes.items()}
    asked = run.evaluation.prompts or (prompts if run.data.source != "shapes" else ())
    return {"prompts": (list(asked), None)} if asked else {}


def measure(
    run: RunConfig,
    components: Components,
    tracker: Tracker | None = None,
    metrics: Mapping[str, float] | None = None,
    prompts: Sequence[str] = (),
) -> dict[str, float]:
    """Draws test prompts, measures the pictures, and writes all of a run's final numbers to `metrics.json` in its output, and
    what single pictures measured to `rows.jsonl`.

    `metrics`: what training gave (`TrainResult.metrics`), written along. `prompts` (`TrainResult.prompts`): what is drawn where
    `evaluation.prompts` names nothing; the drawn world has test prompts of its own. Also keeps some pictures for the report.
    Raises ConfigError as `find_measures` does, and for a metric that its measure does not declare.
    """
    measures = find_measures(run)
    found: dict[str, float] = {}
    rows: list[Row] = []
    shown: list[tuple[str, Image.Image]] = []
    shared, known, peaks = {}, {}, Peaks()
    groups = prompt_groups(run, prompts)
    for group, (asked, scenes) in groups.items():
        with peaks.during("measuring"):
            pictures = draw(components, asked, run.evaluation, resolution=run.data.resolution)
            few = SHOWN // len(groups)
            shown += list(zip(asked, pictures, strict=True))[:: max(1, len(asked) // few)][:few]
            context = Context(group, run, components, scenes, shared)
            told: dict[str, Value] = {}
            for name, chosen in measures.items():
                values, declared = chosen.function(pictures, asked, context), chosen.declared(group)
                if unknown := sorted(values.keys() - declared.keys()):
                    raise ConfigError(f"the measure {name} does not declare what it returned: {', '.join(unknown)}")
                told |= values
                known |= {key: metric for key, metric in declared.items() if key in values}
            means, single = split(told, run.training.steps, group, asked)
            found, rows = found | means, rows + single
    write_rows(run.output, rows)
    declare(run.output, known)
    note_environment(run.output, name_of_device(components.device))
    shutil.rmtree(run.output / "pictures", ignore_errors=True)  # of other prompts, perhaps
    if shown:
        save_pictures([picture for _, picture in shown], run.output / "pictures")
        (run.output / "pictures" / "prompts.json").write_text(json.dumps([text for text, _ in shown], indent=1))
    metrics = dict(metrics or {})
    found |= {name: max(value, metrics.get(name, 0.0)) for name, value in peaks.metrics().items()}
    (tracker or NullTracker()).log_metrics(found, run.training.steps)
    metrics |= found
    write_whole(run.output / "metrics.json", json.dumps(metrics, indent=1))
    return metrics
