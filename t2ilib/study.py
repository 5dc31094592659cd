"""Studies: a YAML file of named variants, run notebook by notebook through papermill, each in a process of its own.

    study file -> variants x seeds -> parameters checked against the notebook -> papermill -> results/<study>-<preset>/...

A run that finished is not run again; one that failed or was interrupted resumes from its last checkpoint. A finished
variant whose parameters were edited since is an error, because its results would silently mean something else. No torch is
imported: models live in the notebooks' kernels.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from t2ilib.config import ConfigError, check_choice, load_yaml
from t2ilib.executor import Executor
from t2ilib.memory import GIB, available_memory, surely_fits
from t2ilib.notebooks import error_text, execute_notebook, export_html, notebook_parameters, notebook_run

SMALLEST_CARD = 8 * GIB
"""What a variant surely fits into needs no look at the device, for which torch would have to be loaded."""


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Variant(Part):
    """A named delta to the study's parameters, with why it is there."""

    title: str
    overview: str
    hypothesis: str
    how_it_helps: str
    origin: str
    parameters: dict[str, Any] = {}


class Preset(Part):
    """How much of the study is run: its seeds, and parameters that go over the study's but under the variants'."""

    seeds: list[int] = Field(min_length=1)
    parameters: dict[str, Any] = {}


class Study(Part):
    """A study file. `reference`: the variant others are compared with; `base`: the untouched base model, if among them."""

    name: str = Field(pattern=r"^[a-z0-9_-]+$")
    question: str
    notebook: str = "train.ipynb"
    reference: str
    base: str | None = None
    parameters: dict[str, Any] = {}
    presets: dict[str, Preset] = Field(min_length=1)
    variants: dict[str, Variant] = Field(min_length=1)


@dataclass(frozen=True)
class Run:
    """One notebook execution. `state`: finished, failed, interrupted (has started, says nothing more) or new."""

    variant: str
    seed: int
    parameters: dict[str, Any]
    folder: Path

    @property
    def label(self) -> str:
        return f"{self.variant} seed {self.seed}"

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.parameters, sort_keys=True).encode()).hexdigest()

    @property
    def state(self) -> str:
        if (self.folder / "result.json").exists():
            return "finished"
        if (self.folder / "failed.txt").exists():
            return "failed"
        return "interrupted" if (self.folder / "parameters.yaml").exists() else "new"

    def result(self) -> dict[str, Any]:
        return json.loads((self.folder / "result.json").read_text())


def load_study(path: Path) -> Study:
    """Reads and checks a study file; raises ConfigError that lists every mistake."""
    try:
        study = Study.model_validate(load_yaml(path))
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ConfigError(f"{len(lines)} mistake(s) in {path}:\n  " + "\n  ".join(lines)) from None
    for name in filter(None, (study.reference, study.base)):
        check_choice(name, study.variants, f"{path}: variant")
    return study


def check_parameters(study: Study, notebook: Path) -> None:
    """Raises ConfigError naming every parameter of the study that the notebook does not declare."""
    import difflib

    declared = notebook_parameters(notebook)
    needed = {"seed", "variant", "output"} - declared.keys()
    if needed:
        raise ConfigError(
            f"{notebook} must declare the parameter(s) {', '.join(sorted(needed))}: papermill would only warn, and every run would be the same"
        )
    places = {"parameters": study.parameters}
    places |= {f"presets.{name}.parameters": preset.parameters for name, preset in study.presets.items()}
    places |= {f"variants.{name}.parameters": variant.parameters for name, variant in study.variants.items()}
    wrong = []
    for place, parameters in places.items():
        for name in parameters:
            if name not in declared:
                near = difflib.get_close_matches(name, declared, 1, 0.5)
                wrong.append(f"{place}.{name}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    if wrong:
        raise ConfigError(
            f"{notebook.name} does not declare {len(wrong)} parameter(s) of this study:\n  "
            + "\n  ".join(wrong)
            + f"\nIts parameters cell declares {', '.join(sorted(declared))}"
        )


def plan_runs(
    study: Study, preset: str, results: Path, only: Sequence[str] = (), seeds: Sequence[int] = ()
) -> list[Run]:
    """The runs of a preset, seed by seed, so that an interrupted study has whole comparisons; raises ConfigError for unknown names."""
    check_choice(preset, study.presets, "preset")
    for name in only:
        check_choice(name, study.variants, "variant")
    chosen = study.presets[preset]
    folder = results / f"{study.name}-{preset}"
    runs = []
    for seed in dict.fromkeys(seeds or chosen.seeds):
        for name, variant in study.variants.items():
            if not only or name in only:
                parameters = study.parameters | chosen.parameters | variant.parameters | {"seed": seed, "variant": name}
                runs.append(Run(name, seed, parameters, folder / name / f"seed{seed}"))
    return runs


def require_unedited(runs: Sequence[Run]) -> None:
    """Raises ConfigError for finished runs whose parameters are not those of the study any more."""
    edited = []
    for run in runs:
        if run.state == "finished" and run.result()["digest"] != run.digest:
            before = run.result()["parameters"]
            changed = sorted(k for k in before.keys() | run.parameters.keys() if before.get(k) != run.parameters.get(k))
            edited.append(
                f"{run.label}: " + ", ".join(f"{k} {before.get(k)!r} -> {run.parameters.get(k)!r}" for k in changed)
            )
    if edited:
        raise ConfigError(
            f"{len(edited)} finished run(s) had other parameters than the study now says:\n  "
            + "\n  ".join(edited[:8])
            + "\nGive the changed variant a new name, or delete the folders of the old runs"
        )


def require_fit(runs: Sequence[Run], notebook: Path, jobs: int) -> None:
    """Raises ConfigError naming every variant that will not fit the device while `jobs` of them run, with the cheapest change.

    Asked once a variant, and in a process of its own: tracing takes torch, and a GPU's context stays as long as its process.
    Variants of small models are not asked about, and those of a notebook with another way of making its run are not here:
    `train` asks again.
    """
    smallest = min(available_memory(), SMALLEST_CARD) / jobs
    asked = {}
    for run in runs:
        config = None if run.variant in asked else notebook_run(notebook, run.parameters | {"output": str(run.folder)})
        if config is not None and not surely_fits(config, smallest):
            asked[run.variant] = config
    if not asked:
        return
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        lines = pool.submit(misfits_of, list(asked.items()), jobs).result()
    if lines:
        raise ConfigError(f"{len(lines)} variant(s) do not fit this machine:\n  " + "\n  ".join(lines))


def misfits_of(runs: list, jobs: int) -> list[str]:
    from t2ilib.fitting import misfits

    return misfits(runs, jobs)


def run_study(
    path: Path,
    preset: str = "quick",
    only: Sequence[str] = (),
    seeds: Sequence[int] = (),
    jobs: int = 1,
    results: Path = Path("results"),
    say: Callable[[str], None] = print,
) -> list[Run]:
    """Runs what is not finished, `jobs` notebooks at a time, then the report. Returns all runs of the preset; look at their `state`.

    Raises ConfigError before anything starts for mistakes in the study file. KeyboardInterrupt and SIGTERM reach the
    running notebooks, which commit a checkpoint; the next call resumes them.
    """
    study = load_study(path)
    notebook = Path(path).parent / study.notebook
    check_parameters(study, notebook)
    runs = plan_runs(study, preset, results.absolute(), only, seeds)
    require_unedited(runs)
    pending = [run for run in runs if run.state != "finished"]
    require_fit(pending, notebook, jobs)
    folder = runs[0].folder.parents[1]
    write_study(study, preset, folder)
    say(
        f"study {study.name}, preset {preset}: {len(runs)} runs, {len(runs) - len(pending)} finished before, {len(pending)} to do, {jobs} at a time"
    )
    if pending:
        from t2ilib.tracking import open_client, reap_stale_runs, tracking_uri

        uri = tracking_uri(None, results)
        client, experiment = open_client(uri, study.name, results)
        reap_stale_runs(client, experiment)
        parent = parent_run(client, experiment, study, preset, folder)
        try:
            Executor(study, preset, notebook, pending, jobs, client, parent, uri, say).run()
        finally:
            client.set_terminated(parent, "FINISHED" if all(run.state == "finished" for run in runs) else "FAILED")
    return runs


def write_study(study: Study, preset: str, folder: Path) -> None:
    """study.json for the report: what was asked, in display order."""
    folder.mkdir(parents=True, exist_ok=True)
    values = study.model_dump(mode="json")
    chosen = study.presets[preset]
    content = {
        "name": study.name,
        "question": study.question,
        "preset": preset,
        "reference": study.reference,
        "base": study.base,
        "seeds": chosen.seeds,
        "parameters": study.parameters | chosen.parameters,
        "variants": values["variants"],
    }
    text, target = json.dumps(content, indent=1), folder / "study.json"
    if not target.exists() or target.read_text() != text:
        target.write_text(text)


def parent_run(client, experiment: str, study: Study, preset: str, folder: Path) -> str:
    """The MLflow run that holds the children of this preset, made once and taken up again later."""
    from mlflow.exceptions import MlflowException

    note = folder / "mlflow-parent.txt"
    if note.exists():
        try:
            client.update_run(note.read_text(), status="RUNNING")
            return note.read_text()
        except MlflowException:
            pass  # another store than last time: the parent is made anew there
    tags = {"study": study.name, "preset": preset, "mlflow.note.content": study.question}
    run = client.create_run(experiment, run_name=f"{study.name} ({preset})", tags=tags)
    note.write_text(run.info.run_id)
    return run.info.run_id


def write_report(path: Path, preset: str, results: Path) -> Path:
    """Executes compare.ipynb beside the study file on the preset's results, unless nothing has changed since; returns the
    HTML report.

    Raises ConfigError with the notebook's error where it fails.
    """
    folder = results.absolute() / f"{load_study(path).name}-{preset}"
    notebook, parameters = folder / "report.ipynb", folder / "report-parameters.yaml"
    sources = [Path(path).parent / "compare.ipynb", folder / "study.json", *folder.rglob("result.json")]
    page = notebook.with_suffix(".html")
    if page.exists() and page.stat().st_mtime > max(source.stat().st_mtime for source in sources):
        return page
    parameters.write_text(yaml.safe_dump({"results_folder": str(folder)}))
    code, output = execute_notebook(Path(path).parent / "compare.ipynb", notebook, parameters, {"T2ILIB_BATCH": "1"})
    if code:
        raise ConfigError(f"the report could not be made: {error_text(output) or output[-2000:]}")
    return export_html(notebook, hide_code=True)


def name_champion(path: Path, preset: str, results: Path) -> str | None:
    """Once all runs of a preset are finished: registers the best one's adapter in MLflow; returns a line that says so."""
    study = load_study(path)
    runs = plan_runs(study, preset, results.absolute())
    if any(run.state != "finished" for run in runs):
        return None
    from t2ilib.registry import register_champion
    from t2ilib.tracking import open_client, tracking_uri

    client, _ = open_client(tracking_uri(None, results), study.name, results)
    found = register_champion(client, f"{study.name}-{preset}", runs)
    return found and f"{found[1]} ({found[0].label})"


def status_rows(path: Path, preset: str, results: Path) -> list[dict[str, str]]:
    """Variant, seed, state, step reached and seconds of every run of a preset, for the terminal."""
    rows = []
    for run in plan_runs(load_study(path), preset, results.absolute()):
        steps = [path.name.removeprefix("step-") for path in (run.folder / "checkpoints").glob("step-*")]
        reached = str(max(map(int, steps))) if steps else "–"
        seconds = f"{run.result()['seconds']:.0f}" if run.state == "finished" else "–"
        values = {
            "variant": run.variant,
            "seed": str(run.seed),
            "state": run.state,
            "step": reached,
            "seconds": seconds,
        }
        rows.append(values)
    return rows
