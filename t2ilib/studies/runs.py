"""A study's runs: one for each variant and seed, with its config, its folder, and how far it is."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from t2ilib.config import ConfigError, RunConfig, check_choice
from t2ilib.runfile import build_run
from t2ilib.studies.file import Study
from t2ilib.studies.notebooks import find_notebook, notebook_parameters


@dataclass(frozen=True, eq=False)
class StudyRun:
    """One notebook execution. `settings`: the sections and fields that the study says of it; all else is RunConfig's default.

    `state`: finished, failed, interrupted (has started, says nothing more) or new.
    """

    variant: str
    seed: int
    settings: dict[str, Any]
    folder: Path
    notebook: Path
    tags: dict[str, str]

    @property
    def label(self) -> str:
        return f"{self.variant} seed {self.seed}"

    @property
    def digest(self) -> str:
        said = {"variant": self.variant, "seed": self.seed, "run": self.settings}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    @property
    def state(self) -> str:
        if (self.folder / "result.json").exists():
            return "finished"
        if (self.folder / "failed.txt").exists():
            return "failed"
        return "interrupted" if (self.folder / "parameters.yaml").exists() else "new"

    def result(self) -> dict[str, Any]:
        return json.loads((self.folder / "result.json").read_text())

    def values(self, parent_run_id: str | None = None) -> dict[str, Any]:
        """What `build_run` makes the run's config of."""
        tracking = {"experiment": self.tags["study"], "parent_run_id": parent_run_id, "tags": self.tags}
        own = {"name": self.label, "seed": self.seed, "output": str(self.folder), "tracking": tracking}
        return own | self.settings

    def config(self) -> RunConfig:
        return build_run(self.values(), self.label)

    def parameters(self, parent_run_id: str | None) -> dict[str, Any]:
        """What papermill injects: whole sections, so that nothing of the notebook's own is mixed in; those that the study does not
        name are empty, which means RunConfig's defaults."""
        values, declared = self.values(parent_run_id), notebook_parameters(self.notebook)
        empty = {name: None if field.default is None else {} for name, field in RunConfig.model_fields.items()}
        return {name: values.get(name, empty[name]) for name in empty if name in declared}


def plan_runs(
    study: Study, file: Path, preset: str, results: Path, only: Sequence[str] = (), seeds: Sequence[int] = ()
) -> list[StudyRun]:
    """The runs of a preset, seed by seed, so that an interrupted study has whole comparisons; raises ConfigError for unknown names
    and for a notebook that is nowhere.

    `file`: the study file, beside which notebooks of its own lie.
    """
    check_choice(preset, study.presets, "preset")
    for name in only:
        check_choice(name, study.variants, "variant")
    folder = results / f"{study.name}-{preset}"
    notebooks = {name: find_notebook(notebook, file) for name, notebook in study.notebooks().items()}
    return [
        StudyRun(
            variant=name,
            seed=seed,
            settings=study.settings(preset, name),
            folder=folder / name / f"seed{seed}",
            notebook=notebooks[name],
            tags={"study": study.name, "preset": preset, "variant": name},
        )
        for seed in dict.fromkeys(seeds or study.presets[preset].seeds)
        for name in study.variants
        if not only or name in only
    ]


def check_notebooks(runs: Sequence[StudyRun]) -> None:
    """Raises ConfigError for a notebook that does not declare what the study says: papermill would only warn, and every run would
    be the same."""
    said: dict[Path, set[str]] = {}
    for run in runs:
        said.setdefault(run.notebook, {"seed", "output"}).update(run.settings)
    for notebook, needed in said.items():
        declared = notebook_parameters(notebook)
        if lacking := sorted(needed - declared.keys()):
            raise ConfigError(
                f"{notebook} does not declare {', '.join(lacking)}, which this study sets: add {'it' if len(lacking) == 1 else 'them'}"
                f" to its parameters cell, which declares {', '.join(declared)}"
            )


def require_unedited(runs: Sequence[StudyRun]) -> None:
    """Raises ConfigError for finished runs of which the study now says something else."""
    edited = []
    for run in runs:
        if run.state != "finished" or (result := run.result())["digest"] == run.digest:
            continue
        before, now = addressed(result.get("run") or {}), addressed(run.settings)
        changed = [
            f"{key} {before.get(key)!r} -> {now.get(key)!r}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        edited.append(f"{run.label}: {', '.join(changed)}")
    if edited:
        raise ConfigError(
            f"{len(edited)} finished run(s) had other settings than the study now says:\n  "
            + "\n  ".join(edited[:8])
            + "\nGive the changed variant a new name, or delete the folders of the old runs"
        )


def addressed(settings: dict[str, Any]) -> dict[str, Any]:
    """`section.field` -> value."""
    return {
        f"{section}.{field}" if isinstance(content, dict) else section: value
        for section, content in settings.items()
        for field, value in (content.items() if isinstance(content, dict) else [(section, content)])
    }


def write_out(run: StudyRun) -> str:
    """A run as a YAML run config, with what the study says and no more, for `t2ilib train`; it writes into a folder of its own."""
    output = f"results/{run.tags['study']}-{run.variant}-seed{run.seed}"
    values = {"name": run.label, "seed": run.seed, "output": output} | run.settings
    text = yaml.safe_dump(values, sort_keys=False, width=110, default_flow_style=None)
    return f"# {run.label} of the study {run.tags['study']}, preset {run.tags['preset']}\n{text}"
