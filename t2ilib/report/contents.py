"""What a report is made of: a study as it was asked, its finished runs, and what they measured.

What a run did not measure stays absent: nothing here fills in zeros. `reading` makes it of the folders of runs, `parquet` of one file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from t2ilib.config import check_choice
from t2ilib.environment import Environment
from t2ilib.evaluation.metrics import Metric
from t2ilib.evaluation.rows import Row
from t2ilib.studies.file import Variant


@dataclass(frozen=True)
class FinishedRun:
    """A finished run. `settings`: the sections and fields that its study said; `history`: metric -> {step: value}, from
    metrics.jsonl; `declared`: what its numbers are; `jobs`: how many runs were trained at a time, None where nobody knows; `environment`:
    what it was made with, () where nobody knows; `rows`: what its single pictures measured; `pictures`: prompt -> PNG, of the variant's first run that kept any."""

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
    environment: Sequence[Environment] = ()
    rows: Sequence[Row] = ()
    pictures: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    def by_prompt(self, metric: str) -> dict[tuple[str, int], float]:
        """{(group of prompts, number): value} of its last step; {} for what is not of single pictures."""
        last = max((row.step for row in self.rows), default=None)
        return {
            (row.group, row.number): row.values[metric]
            for row in self.rows
            if row.step == last and metric in row.values
        }


@dataclass(frozen=True)
class StudyReport:
    """A study as far as it has run. `seeds`: those that any variant has begun, the study file's first; `missing`: (variant, seed)
    that began and did not finish; `not_run`: those of the study file that never began; `not_finite`: metrics that were dropped, as text; `metrics`: what its runs declared of theirs;
    `held_out`: names of the held-out pictures, where the runs' folders have them; `outdated`: (variant, seed) of runs that were
    measured before the study's prompts or measures changed; `margins`: metric -> the difference from which on it would matter;
    `beside`: name -> text of what else lies in the study's folder and is told of: how it was tuned, what people voted; `score`: the study's formula for what a run is worth."""

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
    margins: Mapping[str, float] = field(default_factory=dict)
    score: str | None = None
    beside: Mapping[str, str] = field(default_factory=dict, repr=False)

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


def read_variant(name: str, told: Mapping[str, Any]) -> Variant:
    texts = {key: str(told.get(key) or "").strip() for key in ("overview", "hypothesis", "how_it_helps", "origin")}
    told_else = {"claims": told.get("claims") or [], "against": told.get("against"), "run": told.get("run") or {}}
    return Variant(**texts, title=str(told.get("title") or name).strip(), **told_else)
