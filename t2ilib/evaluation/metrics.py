"""What a number is: its title, unit, which way is better, and what part it plays in a report. Imports no torch.

Whatever measures something declares its metrics here, in these words, beside the code that measures. A run writes the
declarations next to the numbers, so a report knows a metric by them and by nothing else: one that a user adds is shown like one
that ships.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from t2ilib.config import ConfigError, check_choice
from t2ilib.text import write_whole

UNITS = ("share", "loss", "score", "count", "mib", "rate", "seconds")
ROLES = ("learned", "kept", "loss", "followed", "memory", "host", "size", "speed")
PHASES = ("loading", "encoding", "training", "validating", "drawing", "measuring")
"""Of a run, each with its own peak of memory: `memory.Peaks`."""
DECLARATIONS = "metrics.about.json"
"""Beside a run's metrics.json: metric -> the fields of its `Metric`."""


@dataclass(frozen=True)
class Metric:
    """How a measured number is named, written and judged.

    `unit`: share (0 to 1, written in percent), loss, score, count, mib, rate (1/s), or seconds. `better`: higher, lower, or None where
    neither is.
    `exact`: decided by the settings, not by the seed: two values differ or they do not, and there is nothing to test.
    `table`: the report's table that shows it; None keeps it out of the report. `role`: what it says about a variant (`followed` its
    prompts; `memory` is the device's, `host` that of the process); of the metrics of one role the first that was measured speaks for it. `headline`: how
    the report's first lines name the leader. `quantity`: what exactly a run measured, where runs may mean different things by one name:
    numbers of different quantities are shown and not compared. `ceiling`: the metric of the same run above which a value is no merit, and what
    it then means (`flag`). `note`: what the number is, for who has not met it.
    """

    title: str
    unit: str = "score"
    better: str | None = None
    exact: bool = False
    table: str | None = "Measured"
    role: str | None = None
    headline: str | None = None
    quantity: str | None = None
    ceiling: str | None = None
    flag: str | None = None
    note: str | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError for a unit, direction or role that does not exist."""
        for name, allowed in {"unit": UNITS, "better": ("higher", "lower", None), "role": (*ROLES, None)}.items():
            check_choice(getattr(self, name), allowed, f"metric {self.title!r}: {name}")


PEAKS = {
    f"memory/{phase}/peak_{kind}_mib": Metric(f"{title}, {phase}", "mib", "lower", table="Peak memory by phase, MiB")
    for kind, title in (("device", "GPU"), ("process", "process"))
    for phase in PHASES
}


def as_written(metric: Metric) -> dict[str, Any]:
    """The fields of a metric as they stand in a file: those that are not the default."""
    return {f.name: value for f in fields(metric) if (value := getattr(metric, f.name)) != f.default}


def flagged(values: Mapping[str, float], metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """Those of `metrics` whose value lies above their ceiling's, where both were measured."""
    known = {name: metric for name, metric in metrics.items() if {name, metric.ceiling} <= values.keys()}
    return {name: metric for name, metric in known.items() if values[name] > values[metric.ceiling]}


def declare(folder: Path, metrics: Mapping[str, Metric]) -> None:
    """Puts those of `metrics` that a table shows in front of what a run's folder says of its numbers: what is declared last is
    shown first."""
    path = folder / DECLARATIONS
    known = json.loads(path.read_text()) if path.exists() else {}
    new = {name: as_written(metric) for name, metric in metrics.items() if metric.table}
    write_whole(path, json.dumps(new | {name: about for name, about in known.items() if name not in new}, indent=1))


BUILT_IN = ("checker", "clip", "likeness", "drift", "diversity", "memorising", "copies", "step_counts")
"""The names in `measures.MEASURES`, for those who must not import torch to know them."""
ENTRY_POINTS = "t2ilib.measures"
"""The group under which an installed package offers measures by name."""


def check_measures(names: Iterable[str]) -> None:
    """Raises ConfigError for the name of a measure that does not exist, or whose Python file does not; none is imported."""
    installed = {entry.name for entry in metadata.entry_points(group=ENTRY_POINTS)}
    for name in names:
        path, colon, _ = name.rpartition(":")
        if not colon:
            check_choice(name, [*BUILT_IN, *sorted(installed), "<file>.py:<name>"], "evaluation.measures:")
        elif Path(path).suffix != ".py" or not Path(path).expanduser().is_file():
            raise ConfigError(f"evaluation.measures {name!r}: there is no Python file {path}")
