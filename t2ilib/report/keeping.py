"""`t2ilib study checkpoints`: measures what is lacking, chooses, draws the grids, and writes the page and its numbers.

Of a study all finished runs of a preset, variant by variant; of a run's folder that run alone. All is kept as it is made, so a call that
was interrupted goes on, and one more costs nothing. Models are loaded here, when something is to be measured or drawn, and only then is
torch imported.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2ilib.config import ConfigError
from t2ilib.drawing.settings import settings_of_run
from t2ilib.drawing.stepgrid import MOST_COLUMNS, NOISES, STRENGTHS, StepSheet, columns, plan_sheet
from t2ilib.evaluation.rows import read_rows
from t2ilib.report.checkpoints import VariantSteps, read_variant_steps, summary
from t2ilib.report.checkpoints_page import page_text
from t2ilib.runfile import load_run
from t2ilib.studies.file import load_study
from t2ilib.studies.runs import StudyRun, plan_runs
from t2ilib.text import write_whole

PAGE, NUMBERS, PICTURES = "checkpoints.html", "checkpoints.json", "drawn"
MOST_PROMPTS = 2
Say = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """What is wanted of it. `steps`: these checkpoints alone; `prompts`: of the grids, without any one of each group of prompts that the
    score is made of; `strengths`, `noises`, `most_columns`: of the grids, of which there are none where `grids` is false."""

    steps: tuple[int, ...] = ()
    prompts: tuple[str, ...] = ()
    strengths: tuple[float, ...] = STRENGTHS
    noises: tuple[int, ...] = NOISES
    most_columns: int = MOST_COLUMNS
    grids: bool = True


@dataclass(frozen=True)
class Kept:
    """What was written, and what it says. `left_out`: variants and runs that are not in it -> why."""

    page: Path
    numbers: Path
    variants: tuple[VariantSteps, ...]
    left_out: dict[str, str]


@dataclass(frozen=True)
class Runs:
    """The runs of a variant, or a run alone."""

    name: str
    title: str
    folders: tuple[Path, ...]
    seeds: tuple[int, ...]


def choose_of_run(folder: Path, asked: Asked, results: Path, say: Say) -> Kept:
    """The checkpoints of one run; page and numbers are written into its folder. Raises ConfigError for a folder that is no run's, and where
    it kept no checkpoint or nothing was measured that could decide."""
    folder = Path(folder)
    if not (folder / "run.yaml").is_file():
        raise ConfigError(f"{folder} is neither a study file nor the folder of a run: it holds no run.yaml")
    run = load_run(folder / "run.yaml")
    name = run.name or folder.name
    about = {"run": str(folder)}
    return choose(
        f"Which checkpoint to keep: {name}", "", [Runs(name, name, (folder,), (run.seed,))], folder, {}, about, asked, results, say
    )  # fmt: skip


def choose_of_study(
    file: Path, preset: str, only: Sequence[str], seeds: Sequence[int], asked: Asked, results: Path, say: Say
) -> Kept:
    """The checkpoints of all finished runs of a study's preset; page and numbers are written into the study's folder. Raises ConfigError for
    mistakes in the file, and where no variant has checkpoints."""
    study = load_study(file)
    runs = plan_runs(study, file, preset, results, only, seeds)
    left_out = {run.label: f"it is {run.state}" for run in runs if run.trains and not is_there(run)}
    there = [run for run in runs if run.trains and is_there(run)]
    variants = []
    for name in dict.fromkeys(run.variant for run in there):
        own = [run for run in there if run.variant == name]
        title = study.variants[name].title
        variants.append(Runs(name, title, tuple(run.folder for run in own), tuple(run.seed for run in own)))
    if not variants:
        told = "; ".join(f"{label}: {why}" for label, why in left_out.items())
        raise ConfigError(
            f"no run of {file}, preset {preset}, is finished ({told}): t2ilib study run {file} --preset {preset}"
        )
    about = {"study": study.name, "preset": preset, "question": study.question}
    title = f"Which checkpoint to keep: {study.name} ({preset})"
    folder = runs[0].folder.parents[1]
    return choose(title, study.question, variants, folder, left_out, about, asked, results, say, study.score)


def is_there(run: StudyRun) -> bool:
    return run.state in ("finished", "outdated", "edited")


def choose(
    title: str,
    question: str,
    variants: Sequence[Runs],
    folder: Path,
    left_out: dict[str, str],
    about: dict[str, Any],
    asked: Asked,
    results: Path,
    say: Say,
    formula: str | None = None,
) -> Kept:
    """Measures, chooses, draws, writes. A variant of which nothing can be chosen is left out; where none is left that is a ConfigError."""
    from t2ilib.drawing.desk import Desk

    desk, chosen = Desk(results), []
    measured = measure_all(desk, variants, asked, left_out, say)
    for own, steps in measured:
        try:
            chosen.append(read_variant_steps(own.name, own.title, own.folders, own.seeds, steps, formula))
        except ConfigError as error:
            left_out[own.name] = str(error)
    if not chosen:
        raise ConfigError("no checkpoint can be chosen:\n  " + "\n  ".join(f"{k}: {why}" for k, why in left_out.items()))  # fmt: skip
    sheets = {own.name: draw_sheets(desk, own, asked, folder / PICTURES, say) for own in chosen} if asked.grids else {}
    desk.close()
    write_whole(folder / NUMBERS, json.dumps(summary(chosen, about | {"left_out": left_out}), indent=1))
    write_whole(folder / PAGE, page_text(title, question, chosen, sheets, left_out))
    return Kept(folder / PAGE, folder / NUMBERS, tuple(chosen), left_out)


def measure_all(
    desk, variants: Sequence[Runs], asked: Asked, left_out: dict[str, str], say: Say
) -> list[tuple[Runs, list[int]]]:
    """Measures the checkpoints that all runs of a variant have; returns variants with these. What cannot be measured is left out."""
    from t2ilib.drawing.checkpoints import adapter_steps
    from t2ilib.drawing.judging import MOST_STEPS, Shared, load_finished, measure_steps, spread, steps_to_measure

    shared, found = Shared(), []
    for own in variants:
        try:
            for folder in own.folders:
                load_finished(folder)
            common = sorted(set.intersection(*(set(adapter_steps(folder)) for folder in own.folders)))
            steps = sorted(set(asked.steps)) or spread(common, MOST_STEPS)
            for folder in own.folders:
                steps_to_measure(folder, steps)
            if len(common) > len(steps) and not asked.steps:
                say(f"{own.name}: {len(steps)} of {len(common)} checkpoints, evenly (--steps names others)")
            for folder in own.folders:
                measure_steps(folder, desk.loaded, steps, shared, say)
        except ConfigError as error:
            left_out[own.name] = str(error)
        else:
            found.append((own, steps))
    return found


def draw_sheets(desk, own: VariantSteps, asked: Asked, folder: Path, say: Say) -> list[StepSheet]:
    """The grids of a variant, drawn: of the run that stands for it, one a prompt."""
    from t2ilib.drawing.kept import draw_kept

    run = own.runs[own.shown_run()]
    settings = settings_of_run(load_run(run / "run.yaml"))
    steps = columns(own.choice.candidates, (own.choice.recommended, own.choice.best), asked.most_columns)
    sheets = [
        plan_sheet(settings, prompt, run, steps, asked.strengths, asked.noises)
        for prompt in asked.prompts or grid_prompts(own)
    ]
    return [sheet.filled(draw_kept(desk, sheet.jobs(), folder, say)) for sheet in sheets]


def grid_prompts(own: VariantSteps) -> list[str]:
    """The first prompt that each metric of the variant is about, metric by metric; of those that no picture tells apart none."""
    rows = list(read_rows(own.runs[0]))
    named = [*own.deciding.parts, *own.metrics]
    first = [next((row.prompt for row in rows if name in row.values), None) for name in named]
    told = list(dict.fromkeys(prompt for prompt in first if prompt)) or [row.prompt for row in rows[:1]]
    return told[:MOST_PROMPTS]
