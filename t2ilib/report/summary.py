"""One finished run's numbers, as a person wants them: those that matter, by their titles, and how many more there are.

Which matter is not listed here: what measured them has declared it (`evaluation.metrics`), in the run's folder.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from t2ilib.config import ConfigError
from t2ilib.evaluation.metrics import DECLARATIONS, PEAKS, Metric
from t2ilib.report.tables import write_number
from t2ilib.text import shown

FIRST = ("learned", "kept", "followed", "loss", "speed", "memory", "host", "size")
"""Roles of metrics, in the order in which they are told; what has none comes behind them."""
OWN_TABLE = Metric("").table
"""Of metrics that say nothing of a table: people's own measures."""


def summarize(folder: Path | str) -> str:
    """The numbers of a finished run, a line each with their titles: what was learned and kept, the loss, speed, memory, size, and what stands beside
    them in a report; those by attribute or phase, and what nobody declared, are counted.

    `folder`: the run's (`TrainResult.output`), in which `measure` left its metrics. Raises ConfigError where it has not.
    """
    folder = Path(folder)
    try:
        values = json.loads((folder / "metrics.json").read_text())
    except FileNotFoundError:
        raise ConfigError(f"{shown(folder)} has no metrics.json: `t2ilib.measure` writes it, after training") from None
    told = list(matter(folder, values))
    width = max((len(metric.title) for _, metric in told), default=0)
    lines = [f"{metric.title:{width}s}  {write_number(values[name], metric):>12s}" for name, metric in told]
    if rest := len(values) - len(told):
        lines.append(f"{rest} more in {shown(folder / 'metrics.json')}")
    return "\n".join(lines)


def matter(folder: Path, values: dict[str, float]) -> Iterator[tuple[str, Metric]]:
    """Those of the metrics in `values` that are declared for a table in which something has a role, as FIRST orders their roles."""
    file = folder / DECLARATIONS
    declared = {name: Metric(**about) for name, about in json.loads(file.read_text()).items()} if file.exists() else {}
    known = {name: metric for name, metric in declared.items() if name in values and name not in PEAKS}
    tables = {metric.table for metric in known.values() if metric.role} | {OWN_TABLE}
    known = {name: metric for name, metric in known.items() if metric.table in tables}
    for role in (*FIRST, None):
        yield from ((name, metric) for name, metric in known.items() if metric.role == role)
