"""A study's runs: one for each variant and seed, with its config, its folder, and how far it is."""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from t2ilib.config import ConfigError, RunConfig, check_choice
from t2ilib.data.prior import DRAWING
from t2ilib.environment import environment_now, told_differences
from t2ilib.runfile import build_run
from t2ilib.studies.file import Study
from t2ilib.studies.notebooks import find_notebook, notebook_parameters
from t2ilib.studies.tuned import TUNED

COLOUR = "mlflow.runColor"
"""Tag by which MLflow's UI draws a run's curves: all seeds of a variant in one colour."""
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")
"""Tableau's ten."""
AFTERWARDS = ("evaluation.", "shapes.checked_prompts")
"""Beginnings of the fields that say how a finished training is judged. It takes no step to judge it otherwise."""
SEED = "{seed}"
"""In a study file's text: the run's own seed, as in the path of what another study's run of that seed left."""
VOTES = "votes"
"""The folder of a study's folder that has what people voted."""
RULERS = ("evaluation.validation_timesteps", "evaluation.validation_pictures", "evaluation.adapters")
"""Those of them that the losses during training were measured by already, which nothing can measure again."""


@dataclass(frozen=True, eq=False)
class StudyRun:
    """One notebook execution. `settings`: the sections and fields that the study says of it; all else is RunConfig's default. `trial`: of
    which trial of a search it is.

    `state`: finished, outdated (finished, and to be measured again as the study says now), edited (finished, and the study now
    says another run), failed, interrupted (has started, says nothing more) or new.
    """

    variant: str
    seed: int
    settings: dict[str, Any]
    folder: Path
    notebook: Path
    tags: dict[str, str]
    trial: int | None = None

    @property
    def label(self) -> str:
        trial = "" if self.trial is None else f" trial {self.trial}"
        return f"{self.variant}{trial} seed {self.seed}"

    @property
    def digest(self) -> str:
        said = {"variant": self.variant, "seed": self.seed, "run": self.settings}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    @property
    def state(self) -> str:
        if (self.folder / "result.json").exists():
            changed = self.changed()
            again = all(is_measured_again(name, self.settings) for name in changed) and not self.lost
            return "finished" if not changed else "outdated" if again else "edited"
        if (self.folder / "failed.txt").exists():
            return "failed"
        return "interrupted" if (self.folder / "parameters.yaml").exists() else "new"

    def result(self) -> dict[str, Any]:
        return json.loads((self.folder / "result.json").read_text())

    @property
    def trains(self) -> bool:
        """Whether it takes steps; the untouched base does not."""
        return (self.settings.get("training") or {}).get("trains") != "nothing"

    @property
    def lost(self) -> bool:
        """Whether its training is nowhere but in its results, so that measuring it again would mean training it again."""
        return self.trains and not any((self.folder / "checkpoints").glob("step-*"))

    def changed(self) -> dict[str, tuple[Any, Any]]:
        """What the study says otherwise now than when this run finished: see `changes`."""
        result = self.result()
        return {} if result["digest"] == self.digest else changes(result.get("run") or {}, self.settings)

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
    chosen = only or study.of_preset(preset)
    require_tuned(study, file, preset, chosen, seeds)
    folder = results / f"{study.name}-{preset}"
    colours = dict(zip(study.variants, itertools.cycle(COLOURS), strict=False))
    notebooks = {name: find_notebook(notebook, file) for name, notebook in study.notebooks().items()}
    return [
        StudyRun(
            variant=name,
            seed=seed,
            settings=of_seed(study.settings(preset, name), seed),
            folder=folder / name / f"seed{seed}",
            notebook=notebooks[name],
            tags={"variant": name, "study": study.name, "preset": preset, COLOUR: colours[name]},
        )
        for seed in dict.fromkeys(seeds or study.presets[preset].seeds)
        for name in study.variants
        if name in chosen
    ]


def of_seed(settings: Any, seed: int) -> Any:
    """The settings of the run with this seed: SEED in any text of them is its number."""
    if isinstance(settings, str):
        return settings.replace(SEED, str(seed))
    if isinstance(settings, Mapping):
        return {name: of_seed(value, seed) for name, value in settings.items()}
    return [of_seed(value, seed) for value in settings] if isinstance(settings, list) else settings


def require_tuned(study: Study, file: Path, preset: str, chosen: Sequence[str], seeds: Sequence[int]) -> None:
    """Raises ConfigError for variants of a preset at tuned values that were not tuned, and for seeds that they were tuned with."""
    tuned = study.presets[preset].tuned
    if tuned is None:
        return
    if lacking := [name for name in chosen if name not in tuned and study.trains(preset, name)]:
        plain = preset.removesuffix(TUNED)
        raise ConfigError(
            f"{', '.join(lacking)} {'was' if len(lacking) == 1 else 'were'} not tuned, so that {preset} would compare what was searched with"
            f" what was not: t2ilib study tune {file} --preset {plain} {' '.join(f'--only {name}' for name in lacking)}"
        )
    if shared := sorted({*seeds} & {*study.tuning.seeds}):
        raise ConfigError(f"seeds {', '.join(map(str, shared))} are those that {preset} was tuned with: take others")


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
    """Raises ConfigError for finished runs that the study now says to be other runs, not only to be measured otherwise."""
    edited = []
    for run in runs:
        if run.state == "edited":
            changed = run.changed()
            again = all(is_measured_again(name, run.settings) for name in changed)
            lost = " (to be measured again, but its checkpoints are gone)" * again
            told = ", ".join(f"{key} {before!r} -> {now!r}" for key, (before, now) in changed.items())
            edited.append(f"{run.label}: {told}{lost}")
    if edited:
        raise ConfigError(
            f"{len(edited)} finished run(s) had other settings than the study now says:\n  "
            + "\n  ".join(edited[:8])
            + "\nGive the changed variant a new name, or delete the folders of the old runs"
        )


def require_same_versions(runs: Sequence[StudyRun]) -> None:
    """Raises ConfigError where runs would be added to finished ones that were made with other versions, which no report takes together."""
    pending = [run for run in runs if run.state != "finished"]
    now, others = environment_now(), {}
    for run in runs if pending else ():
        for made in run.result().get("environment") or () if run.state == "finished" else ():
            before = {name: version for name, version in made.items() if name != "device"}
            if before != now:
                (told, _) = told_differences([[before], [now]])
                others.setdefault(told, []).append(run.label)
    if others:
        lines = [
            f"{told}: {', '.join(labels[:4])}{' and others' * (len(labels) > 4)}" for told, labels in others.items()
        ]
        (_, here) = told_differences([[before], [now]])
        only = " ".join(f"--only {name}" for name in dict.fromkeys(run.variant for run in pending))
        raise ConfigError(
            f"{len(pending)} run(s) would be made with {here}, and finished ones were made with\n  "
            + "\n  ".join(lines)
            + "\nOther versions give other numbers, and share no table. Install those versions, or compare the newcomers with the reference"
            f" beside them: the same command with {only} --only <the reference> --results <another folder>"
        )


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """`section.field` -> (value before, value now), None for none, where two partial configs differ."""
    old, new = addressed(before), addressed(now)
    return {
        key: (old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)
    }


def is_measured_again(address: str, settings: Mapping[str, Any]) -> bool:
    """Whether a changed field of a finished run of these settings is about judging it, so that it need not be trained again."""
    prior = settings.get("prior") or {}
    drawn = bool(prior.get("prompts")) and not prior.get("path")
    return address.startswith(AFTERWARDS) and address not in (*RULERS, *(DRAWING if drawn else ()))


def addressed(settings: Mapping[str, Any]) -> dict[str, Any]:
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
