"""A small study of two variants on the tiny SDXL, without notebooks and MLflow: train and measure for each variant and seed, then a
row that compares them by seed, as a report would."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gpu_record import Figures, NotHere, Row

from t2ilib.evaluation.measures import measure
from t2ilib.runfile import build_run, merge
from t2ilib.statistics.pooled import differences
from t2ilib.training.loop import train

COMMON: dict[str, Any] = {
    "model": {"base": "tiny-sdxl"},
    "adapter": {"rank": 16, "alpha": 16.0, "targets": "many"},
    "data": {"source": "shapes"},
    "shapes": {"scenes": ["heart"], "num_pictures": 48, "checked_prompts": 24},
    "training": {"steps": 150, "batch_size": 8},
    "evaluation": {"prompts": ["a red heart"], "validate_every": 0, "sample_every": 0},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"kind": "lora"}},
    "dora": {"adapter": {"kind": "dora"}},
}
SEEDS = (0, 1)
COMPARED = (
    "held_out_loss",
    "concept/all",
    "base_kept/all",
    "clip_score/concept",
    "steps_per_second",
    "peak_device_mib",
    "peak_process_mib",
)


class Study:
    """What the runs measured: variant -> seed -> metric -> value."""

    def __init__(self, scratch: Path, common: Mapping[str, Any] = COMMON, seeds: Sequence[int] = SEEDS):
        self.scratch, self.common, self.seeds = scratch, common, seeds
        self.found: dict[str, dict[int, dict[str, float]]] = {name: {} for name in VARIANTS}

    def settings(self, variant: str, seed: int) -> dict[str, Any]:
        output = str(self.scratch / f"study-{variant}-seed{seed}")
        return merge(self.common, VARIANTS[variant], {"output": output, "seed": seed})

    def run(self, variant: str, seed: int, figures: Figures) -> None:
        run = build_run(self.settings(variant, seed))
        result = train(run)
        metrics = measure(run, result.components, metrics=result.metrics)
        figures |= {name: metrics[name] for name in COMPARED if name in metrics}
        self.found[variant][seed] = dict(figures)

    def compare(self, figures: Figures) -> None:
        """The second variant against the first. Two seeds show how large a difference is, and can show none to be real."""
        one, other = VARIANTS
        if not self.found[one].keys() & self.found[other].keys():
            raise NotHere("there is no seed that both variants finished")
        for name in COMPARED:
            values = {
                variant: {seed: metrics[name] for seed, metrics in by_seed.items() if name in metrics}
                for variant, by_seed in self.found.items()
            }
            if values[one].keys() & values[other].keys():
                (difference,) = differences(values, [(other, one)])
                figures[name] = {variant: list(by_seed.values()) for variant, by_seed in values.items()}
                figures |= {f"{name}: difference": difference.mean, f"{name}: p": difference.p_value}

    def rows(self) -> list[Row]:
        shown = ("held_out_loss", "concept/all", "base_kept/all", "steps_per_second")
        runs = [
            Row("study", f"{variant}, seed {seed}", 15, partial(self.run, variant, seed), self.settings(variant, seed), shown)
            for seed in self.seeds
            for variant in VARIANTS
        ]  # fmt: skip
        against = " against ".join(reversed(VARIANTS))
        return [
            *runs,
            Row("study", f"comparison: {against}", 1, self.compare, {}, tuple(f"{name}: difference" for name in shown)),
        ]
