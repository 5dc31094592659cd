"""A study's folder as data: what was asked, which runs finished, what they measured, and which runs are missing.

What a run did not measure stays absent: nothing here fills in zeros. Leaves out everything that MLflow knows beyond the files,
so a report can be made on another machine from a copied folder.
"""

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from t2ilib.config import ConfigError, check_choice


@dataclass(frozen=True)
class Metric:
    """How a measured number is named, written and judged. `kind`: share (0 to 1), loss, score, count, mib, or rate (1/s)."""

    title: str
    kind: str
    higher_is_better: bool | None
    exact: bool = False
    """Decided by the settings, not by the seed: two values differ or they do not, and there is nothing to test."""


METRICS = {
    "concept/learned": Metric("concept learned", "share", True),
    "concept/heart": Metric("heart", "share", True),
    "concept/striped": Metric("striped", "share", True),
    "concept/blueprint": Metric("blueprint", "share", True),
    "concept/all": Metric("concept prompt all right", "share", True),
    "concept/chance": Metric("concept by chance", "share", None),
    "base_kept/all": Metric("base kept", "share", True),
    "held_out_loss": Metric("held-out loss", "loss", False),
    "clip_score/concept": Metric("CLIP score, concept", "score", True),
    "clip_score/base_kept": Metric("CLIP score, base", "score", True),
    "trainable_parameters": Metric("trainable parameters", "count", False, exact=True),
    "adapter_mib": Metric("adapter, MiB", "mib", False, exact=True),
    "peak_process_mib": Metric("peak process memory, MiB", "mib", False),
    "peak_device_mib": Metric("peak GPU memory, MiB", "mib", False),
    "steps_per_second": Metric("steps per second", "rate", True),
}
"""What a report knows, in the order of its columns. Other metrics of a run are kept in `Run.metrics` and not shown."""

GROUPS = {
    "Learned and kept": ("concept/learned", "concept/all", "concept/chance", "base_kept/all", "held_out_loss"),
    "By concept, and CLIP scores": (
        "concept/heart",
        "concept/striped",
        "concept/blueprint",
        "clip_score/concept",
        "clip_score/base_kept",
    ),
    "Cost": ("trainable_parameters", "adapter_mib", "peak_process_mib", "peak_device_mib", "steps_per_second"),
}
"""The same in tables that fit a page."""


@dataclass(frozen=True)
class Run:
    """A finished run. `history`: metric -> {step: value}, from metrics.jsonl."""

    variant: str
    seed: int
    folder: Path
    seconds: float | None
    parameters: Mapping[str, Any]
    metrics: Mapping[str, float]
    history: Mapping[str, Mapping[int, float]]
    mlflow_run_id: str | None = None


@dataclass(frozen=True)
class Variant:
    """What the study file says of a variant; `parameters` is its delta from the study's base settings."""

    title: str
    overview: str = ""
    hypothesis: str = ""
    how_it_helps: str = ""
    origin: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StudyReport:
    """A study as far as it has run. `seeds`: those of the study file, then those that were run beyond it; `missing`: (variant,
    seed) that did not finish; `not_finite`: metrics that were dropped, as text."""

    folder: Path
    name: str
    question: str
    preset: str
    reference: str
    base: str | None
    seeds: tuple[int, ...]
    variants: Mapping[str, Variant]
    runs: Mapping[tuple[str, int], Run]
    missing: tuple[tuple[str, int], ...]
    not_finite: tuple[str, ...]

    @property
    def trained(self) -> list[str]:
        """The variants that compete: all but the untouched base."""
        return [name for name in self.variants if name != self.base]

    def runs_of(self, variant: str) -> list[Run]:
        check_choice(variant, self.variants, "variant")
        return [run for (name, _), run in self.runs.items() if name == variant]

    def values(self, variant: str, metric: str) -> dict[int, float]:
        """{seed: value} of the runs that measured it; empty where none did."""
        return {run.seed: run.metrics[metric] for run in self.runs_of(variant) if metric in run.metrics}

    def measured(self, *metrics: str) -> list[str]:
        """Those of `metrics` (all known ones if none is named) that at least one run measured."""
        return [name for name in metrics or METRICS if any(name in run.metrics for run in self.runs.values())]


def load_report(folder: Path | str) -> StudyReport:
    """Reads `folder/study.json` and every finished run. Raises ConfigError for a folder or file that is not what it should be."""
    folder = Path(folder)
    if not (folder / "study.json").exists():
        raise ConfigError(f"{folder} holds no study.json: give the folder that a study wrote, results/<study>-<preset>")
    study = read_json(folder / "study.json")
    lacking = [key for key in ("name", "reference", "seeds", "variants") if key not in study]
    if lacking:
        raise ConfigError(f"{folder / 'study.json'} lacks {', '.join(lacking)}")
    for role in ("reference", "base"):
        if study.get(role) is not None and study[role] not in study["variants"]:
            raise ConfigError(
                f"{folder / 'study.json'}: {role} {study[role]!r} is not among {', '.join(study['variants'])}"
            )
    runs, missing, not_finite = {}, [], []
    extra = {int(found.parent.name.removeprefix("seed")) for found in folder.glob("*/seed*/result.json")} - {
        *study["seeds"]
    }
    seeds = (*study["seeds"], *sorted(extra))
    for name in study["variants"]:
        for seed in seeds:
            path = folder / name / f"seed{seed}"
            result = read_json(path / "result.json") if (path / "result.json").exists() else {}
            if result.get("status") != "finished":
                missing += [(name, seed)] if seed in study["seeds"] or path.exists() else []
                continue
            runs[name, seed], dropped = read_run(path, name, seed, result)
            not_finite += dropped
    return StudyReport(
        folder,
        study["name"],
        study.get("question", ""),
        study.get("preset", ""),
        study["reference"],
        study.get("base"),
        seeds,
        {name: read_variant(name, told) for name, told in study["variants"].items()},
        runs,
        tuple(missing),
        tuple(not_finite),
    )


def read_variant(name: str, told: Mapping[str, Any]) -> Variant:
    texts = {
        key: str(told.get(key) or "").strip() for key in ("title", "overview", "hypothesis", "how_it_helps", "origin")
    }
    return Variant(**(texts | {"title": texts["title"] or name}), parameters=told.get("parameters") or {})


def read_run(path: Path, name: str, seed: int, result: Mapping[str, Any]) -> tuple[Run, list[str]]:
    """The run and, as text, the metrics that are not finite numbers: those count as not measured, and the report says so."""
    told = {key: value for key, value in (result.get("metrics") or {}).items() if value is not None}
    metrics = {key: float(value) for key, value in told.items() if math.isfinite(value)}
    dropped = [f"{name}, seed {seed}: {key} is {told[key]}" for key in told if key not in metrics]
    history = read_history(path / "metrics.jsonl")
    parameters = result.get("parameters") or {}
    return Run(
        name, seed, path, result.get("seconds"), parameters, metrics, history, result.get("mlflow_run_id")
    ), dropped


def read_history(path: Path) -> dict[str, dict[int, float]]:
    """metric -> {step: value}; a step logged twice keeps the later value, and a run without the file has no history."""
    history: dict[str, dict[int, float]] = defaultdict(dict)
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else (), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}, line {number} is not JSON: {error}") from None
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float) and math.isfinite(value):
                history[key][row["step"]] = float(value)
    return dict(history)


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
