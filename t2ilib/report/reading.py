"""A study's folder as data: what was asked, which runs finished, what they measured, and which runs are missing.

What a run did not measure stays absent: nothing here fills in zeros. Leaves out everything that MLflow knows beyond the files,
so a report can be made on another machine from a copied folder.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2ilib.config import ConfigError, check_choice
from t2ilib.evaluation.metrics import Metric
from t2ilib.runfile import merge
from t2ilib.studies.file import Variant
from t2ilib.studies.runs import changes, is_measured_again


@dataclass(frozen=True)
class FinishedRun:
    """A finished run. `settings`: the sections and fields that its study said; `history`: metric -> {step: value}, from
    metrics.jsonl; `declared`: what its numbers are; `jobs`: how many runs were trained at a time, None where nobody knows."""

    variant: str
    seed: int
    folder: Path
    seconds: float | None
    settings: Mapping[str, Any]
    metrics: Mapping[str, float]
    declared: Mapping[str, Metric]
    history: Mapping[str, Mapping[int, float]]
    mlflow_run_id: str | None = None
    jobs: int | None = None


@dataclass(frozen=True)
class StudyReport:
    """A study as far as it has run. `seeds`: those that any variant has begun, the study file's first; `missing`: (variant, seed)
    that began and did not finish; `not_run`: those of the study file that never began; `not_finite`: metrics that were dropped, as text; `metrics`: what its runs declared of theirs;
    `held_out`: names of the held-out pictures, where the runs' folders have them; `outdated`: (variant, seed) of runs that were
    measured before the study's prompts or measures changed."""

    folder: Path
    name: str
    question: str
    preset: str
    reference: str
    base: str | None
    seeds: tuple[int, ...]
    variants: Mapping[str, Variant]
    runs: Mapping[tuple[str, int], FinishedRun]
    missing: tuple[tuple[str, int], ...]
    not_run: tuple[tuple[str, int], ...]
    not_finite: tuple[str, ...]
    metrics: Mapping[str, Metric]
    held_out: tuple[str, ...]
    outdated: tuple[tuple[str, int], ...]

    @property
    def present(self) -> list[str]:
        """The variants of which a run has begun."""
        begun = {name for name, _ in (*self.runs, *self.missing)}
        return [name for name in self.variants if name in begun]

    @property
    def trained(self) -> list[str]:
        """The variants that compete: all that are present but the untouched base."""
        return [name for name in self.present if name != self.base]

    def runs_of(self, variant: str) -> list[FinishedRun]:
        check_choice(variant, self.variants, "variant")
        return [run for (name, _), run in self.runs.items() if name == variant]

    def values(self, variant: str, metric: str) -> dict[int, float]:
        """{seed: value} of the runs that measured it; empty where none did."""
        return {run.seed: run.metrics[metric] for run in self.runs_of(variant) if metric in run.metrics}

    def measured(self, *metrics: str) -> list[str]:
        """Those of `metrics` (all that a table shows, if none is named) that at least one run measured."""
        asked = metrics or [name for name, metric in self.metrics.items() if metric.table]
        return [name for name in asked if any(name in run.metrics for run in self.runs.values())]

    def about(self, metric: str) -> Metric:
        """What a metric is; a plain score under its own name where no run declared it."""
        return self.metrics.get(metric) or Metric(metric)

    def tables(self) -> dict[str, list[str]]:
        """Title -> the measured metrics that its table shows."""
        tables: dict[str, list[str]] = {}
        for name in self.measured():
            tables.setdefault(self.metrics[name].table, []).append(name)
        return tables

    def with_role(self, *roles: str) -> list[str]:
        """The measured metrics that play these roles, role by role; the first of each speaks for it."""
        return [name for role in roles for name in self.measured() if self.metrics[name].role == role]

    def speaking(self, *roles: str) -> list[str]:
        """For each of these roles that something measured, the one metric that speaks for it."""
        return [names[0] for role in roles if (names := self.with_role(role))]

    def against(self, variant: str) -> str:
        """What a variant is compared with: the neighbour that it names, or the reference."""
        return self.variants[variant].against or self.reference

    def one_quantity(self, metric: str, *variants: str) -> bool:
        """Whether these variants' runs mean the same by a metric."""
        declared = [run.declared.get(metric) for name in variants for run in self.runs_of(name)]
        return len({known.quantity for known in declared if known is not None}) <= 1

    def timed_alone(self, *variants: str) -> bool:
        """Whether these variants were trained one run at a time, so that their speeds can be compared."""
        return all(run.jobs == 1 for name in variants for run in self.runs_of(name))


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
    runs, missing, not_run, not_finite = {}, [], [], []
    begun = {
        int(place.name.removeprefix("seed")) for name in study["variants"] for place in (folder / name).glob("seed*")
    }
    extra = sorted(begun - {*study["seeds"]})
    for name in study["variants"]:
        for seed in (*study["seeds"], *extra):
            path = folder / name / f"seed{seed}"
            if not path.exists():
                not_run += [(name, seed)] if seed in study["seeds"] else []
                continue
            result = read_json(path / "result.json") if (path / "result.json").exists() else {}
            if result.get("status") != "finished":
                missing.append((name, seed))
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
        tuple(seed for seed in (*study["seeds"], *extra) if seed in begun) or tuple(study["seeds"]),
        {name: read_variant(name, told) for name, told in study["variants"].items()},
        runs,
        tuple(missing),
        tuple(not_run),
        tuple(not_finite),
        declarations(runs.values()),
        next(filter(None, (held_out_names(run.folder) for run in runs.values())), ()),
        tuple(place for place, run in runs.items() if is_outdated(study, run)),
    )


def declarations(runs: Iterable[FinishedRun]) -> dict[str, Metric]:
    """What all runs declared; first what the one that declared most does, in its order: the untouched base measures fewer things."""
    found: dict[str, Metric] = {}
    for run in sorted(runs, key=lambda run: -len(run.declared)):
        found |= {name: metric for name, metric in run.declared.items() if name not in found}
    return found


def is_outdated(study: Mapping[str, Any], run: FinishedRun) -> bool:
    """Whether the study now says that a run is to be measured otherwise than it was."""
    if not run.settings or "run" not in study:  # reports of before runs were recorded
        return False
    now = merge(study["run"], study["variants"][run.variant].get("run") or {})
    return any(is_measured_again(address, now) for address in changes(run.settings, now))


def held_out_names(folder: Path) -> tuple[str, ...]:
    """Names of the pictures that a run measured its held-out loss on; () where its folder does not have them."""
    listing = next(iter(sorted(folder.glob("held_out/step-*.json"))), None)
    return tuple(row["picture"] for row in json.loads(listing.read_text())) if listing else ()


def read_variant(name: str, told: Mapping[str, Any]) -> Variant:
    texts = {key: str(told.get(key) or "").strip() for key in ("overview", "hypothesis", "how_it_helps", "origin")}
    told_else = {"claims": told.get("claims") or [], "against": told.get("against"), "run": told.get("run") or {}}
    return Variant(**texts, title=str(told.get("title") or name).strip(), **told_else)


def read_run(path: Path, name: str, seed: int, result: Mapping[str, Any]) -> tuple[FinishedRun, list[str]]:
    """The run and, as text, the metrics that are not finite numbers: those count as not measured, and the report says so."""
    told = {key: value for key, value in (result.get("metrics") or {}).items() if value is not None}
    metrics = {key: float(value) for key, value in told.items() if math.isfinite(value)}
    dropped = [f"{name}, seed {seed}: {key} is {told[key]}" for key in told if key not in metrics]
    history = read_history(path / "metrics.jsonl")
    settings = result.get("run") or {}
    declared = {key: Metric(**about) for key, about in (result.get("measures") or {}).items()}
    run = FinishedRun(
        name, seed, path, result.get("seconds"), settings, metrics, declared, history, result.get("mlflow_run_id"), result.get("jobs")
    )  # fmt: skip
    return run, dropped


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
