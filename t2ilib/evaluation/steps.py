"""What a run's checkpoints measured, as it lies in the run's folder: `steps.json` beside the rows of every picture.

    {"version": 1,
     "about": {metric: {fields of its Metric}},
     "steps": {"0": {"how": "<digest>", "metrics": {metric: value}}, "100": {...}}}

`how`: a digest of all that decides what a step measures, by which is known whether it must be measured again; step 0 is the base without an
adapter. `drawing.judging` writes it. The held-out losses, which training writes, lie in `held_out/step-000100.json`, by picture. Imports no
torch.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from t2ilib.config import ConfigError
from t2ilib.evaluation.metrics import DECLARATIONS, Metric
from t2ilib.evaluation.rows import read_rows
from t2ilib.text import read_text, write_whole

STEPS = "steps.json"
VERSION = 1
BASE = 0
LOSS = "held_out_loss"


@dataclass(frozen=True)
class Picture:
    """What a metric has a value for: a prompt by its `number` in its `group`, or a held-out picture by its name."""

    group: str
    number: int
    text: str


@dataclass(frozen=True)
class MeasuredSteps:
    """`declared`: metrics, those first that checkpoints were measured by; `metrics`: step -> metric -> value; `pictures`: metric -> step ->
    picture -> value, of metrics that have one for each."""

    folder: Path
    declared: Mapping[str, Metric]
    metrics: Mapping[int, Mapping[str, float]]
    pictures: Mapping[str, Mapping[int, Mapping[Picture, float]]]


def read_steps(folder: Path) -> dict[str, Any]:
    """What `steps.json` of a run says, empty where there is none. Raises ConfigError for a file that is none, and one that a later t2ilib
    wrote."""
    path = folder / STEPS
    if not path.exists():
        return {"version": VERSION, "about": {}, "steps": {}}
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is no JSON ({error}): delete it, and checkpoints are measured again") from None
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise ConfigError(
            f"{path} is not of version {VERSION}: a later t2ilib wrote it, or nobody did. Update t2ilib, or delete it"
        )
    return content


def write_step(folder: Path, known: dict[str, Any], step: int, how: str, metrics: Mapping[str, float]) -> None:
    """Puts a step's metrics among those that are `known` and writes them; its rows are to be there before."""
    known["steps"][str(step)] = {"how": how, "metrics": dict(metrics)}
    known["steps"] = dict(sorted(known["steps"].items(), key=lambda item: int(item[0])))
    write_whole(folder / STEPS, json.dumps(known, indent=1))


def losses_file(folder: Path, step: int) -> Path:
    """Where a run has the held-out losses of a step, by picture."""
    return folder / "held_out" / f"step-{step:06d}.json"


def load_steps(folder: Path) -> MeasuredSteps:
    """All that is known of a run's checkpoints. Raises ConfigError as `read_steps`, and for rows that are none."""
    known = read_steps(folder)
    declarations = folder / DECLARATIONS
    told = json.loads(read_text(declarations)) if declarations.is_file() else {}
    declared = {name: Metric(**fields) for name, fields in {**known["about"], **told}.items()}
    metrics: dict[int, dict[str, float]] = {int(step): dict(own["metrics"]) for step, own in known["steps"].items()}
    pictures: dict[str, dict[int, dict[Picture, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in read_rows(folder):
        for name, value in row.values.items() if row.step in metrics else ():
            pictures[name][row.step][Picture(row.group, row.number, row.prompt)] = value
    for step in metrics:
        path = losses_file(folder, step)
        rows = json.loads(read_text(path)) if path.is_file() else []
        if rows:
            metrics[step][LOSS] = float(np.mean([row["loss"] for row in rows]))
            own = {Picture("held out", i, row["picture"]): row["loss"] for i, row in enumerate(rows)}
            pictures[LOSS][step] = own
    return MeasuredSteps(folder, declared, metrics, {name: dict(by_step) for name, by_step in pictures.items()})
