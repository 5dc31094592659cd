"""Pictures of one prompt in order: what a measure says of each of them, and which pairs follow.

Any measure of `evaluation.measures` that gives a value a picture can rank, one's own too. In the drawn world the checker's value is the share of
what was asked for that is right, attribute by attribute: whether all of it is right, which it reports, is the same for most pictures of a
prompt.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from t2ilib.config import ConfigError, RunConfig, check_choice
from t2ilib.drawing.loaded import Loaded
from t2ilib.drawing.settings import DrawSettings
from t2ilib.evaluation.context import Context, Measure
from t2ilib.evaluation.measures import find_measure
from t2ilib.runfile import build_run, override_values
from t2ilib.shapes.checker import read, verdicts_on
from t2ilib.shapes.world import Scene

CHECKER = "checker"
GROUP = "prompts"
AT_ONCE = 32
"""Pictures that a measure is asked about together: what it says of one must not depend on the others."""
CLOSE = 1e-9
"""Values that differ by less are equal: shares such as 2 / 3 are not exact."""


@dataclass(frozen=True)
class Ranker:
    """`name`: of the measure; `metric`: which of its numbers decides, None where it gives one of single pictures; `run`: what it is told of."""

    name: str
    metric: str | None
    run: RunConfig

    def values(
        self,
        files: Sequence[Path],
        prompts: Sequence[str],
        scenes: Sequence[Scene] | None,
        loaded: Loaded,
        settings: DrawSettings,
    ) -> tuple[str, list[float | None]]:
        """By which metric pictures are ranked, and of each a value, higher the better; None of one that it is not about.

        `loaded`: where a measure finds the model that drew, by `settings`. Raises ConfigError for a measure that says nothing of single
        pictures, or several things.
        """
        if self.name == CHECKER:
            return CHECKER, [share_right(file, scene) for file, scene in zip(files, scenes, strict=True)]
        measure, shared, chosen, found = find_measure(self.name), dict[str, Any](), "", list[float | None]()
        for start in range(0, len(files), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            components = loaded.components or loaded.take(settings)
            own = tuple(scenes[part]) if scenes else None
            told = measure.function(
                [opened(file) for file in files[part]], prompts[part], Context(GROUP, self.run, components, own, shared)
            )
            single = {name: list(value) for name, value in told.items() if not np.isscalar(value)}
            chosen = self.deciding(measure, single)
            found += single[chosen]
        if measure.declared(GROUP, self.run)[chosen].better == "lower":
            found = [None if value is None else -value for value in found]
        return chosen, [None if value is None else float(value) for value in found]

    def deciding(self, measure: Measure, single: Iterable[str]) -> str:
        """Which of the metrics of single pictures ranks them."""
        declared = measure.declared(GROUP, self.run)
        known = [name for name in single if declared[name].better]
        if known and self.metric is not None:
            return check_choice(self.metric, known, f"--metric of {self.name}:")
        if len(known) != 1:
            several = f"several things of single pictures ({', '.join(known)}): name one by --metric"
            none = "nothing of single pictures that says which is better: rank by clip, or by a measure of your own"
            raise ConfigError(f"--rank-by {self.name} says {several if known else none}")
        return known[0]


def build_ranker(
    name: str, metric: str | None, settings: DrawSettings, scenes: bool, overrides: Sequence[str] = ()
) -> Ranker:
    """`scenes`: whether prompts are those of the drawn world. `overrides`: settings of measures, as `--set` gives them (`evaluation.clip_model=...`).
    Raises ConfigError for a measure that does not exist or lacks something."""
    if name == CHECKER:
        if not scenes:
            raise ConfigError("--rank-by checker knows the drawn world alone: give --prompts shapes, or rank by clip")
        if metric is not None:
            raise ConfigError(
                "--metric: the checker ranks by the share of what was asked for that is right: leave it out"
            )
    values = {"adapter": {}, "model": settings.model.model_dump(), "evaluation": {"measures": [name]}}
    run = build_run(override_values(values, list(overrides)), "the command")
    if name != CHECKER and (reason := find_measure(name).lacks(run)):
        raise ConfigError(f"--rank-by {name}: {reason} (--set gives a measure its settings)")
    return Ranker(name, metric, run)


def opened(file: Path) -> Image.Image:
    with Image.open(file) as picture:
        return picture.convert("RGB")


def share_right(file: Path, scene: Scene) -> float:
    """Of the attributes that a scene has, the share that a picture shows as they are."""
    (verdict,) = verdicts_on([scene], [read(opened(file))])
    return sum(verdict.values()) / len(verdict)


def ranked_pairs(values: Sequence[float | None], least: float = 0.0, every: bool = False) -> list[tuple[int, int]]:
    """Numbers of a better and a worse picture: of the best and the worst, or with `every` of all twos, where their values differ, by `least` or
    more. Of equal pictures the first counts as the best or the worst. None has no place in the order."""
    known = [number for number, value in enumerate(values) if value is not None]
    if not known:
        return []
    ends = [(max(known, key=values.__getitem__), min(known, key=values.__getitem__))]
    twos = itertools.permutations(known, 2) if every else ends
    return [(one, other) for one, other in twos if values[one] - values[other] >= max(least - CLOSE, CLOSE)]
