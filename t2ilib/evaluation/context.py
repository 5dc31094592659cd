"""What a measure is and what it is told, apart from `measures`, which chooses and asks them: so those that ship can be written in
modules of their own, each beside what it computes.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from t2ilib.config import RunConfig
from t2ilib.evaluation.metrics import Metric
from t2ilib.evaluation.rows import Value
from t2ilib.models.components import Components
from t2ilib.shapes.world import Scene


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
    `lacks(run)`: why a run cannot be measured by it, or None. `models(run)`: what `{model}` in a name or title stands for, each in
    turn, the one that decides first."""

    function: Callable[[Sequence[Image.Image], Sequence[str], Context], Mapping[str, Value]]
    metrics: Mapping[str, Metric]
    lacks: Callable[[RunConfig], str | None] = lambda run: None
    models: Callable[[RunConfig], Iterable[str]] = lambda run: ()

    def declared(self, group: str, run: RunConfig) -> dict[str, Metric]:
        """Metric -> what it is, for a group of prompts, in the order in which they speak for their roles."""
        found = {}
        for model in [*self.models(run), ""]:
            named = [name for name in self.metrics if ("{model}" in name) == bool(model)]
            found |= {name.format(group=group, model=model): told(self.metrics[name], group, model) for name in named}
        return found


def told(metric: Metric, group: str, model: str) -> Metric:
    """A declaration about this group of prompts and this model."""
    ceiling = metric.ceiling and metric.ceiling.format(group=group, model=model)
    return replace(metric, title=metric.title.format(group=group.replace("_", " "), model=model), ceiling=ceiling)
