"""Running a study: notebook by notebook through papermill, each in a process of its own, then the report.

    study file -> variants x seeds -> checked by RunConfig -> papermill -> results/<study>-<preset>/...

A run that finished is not run again; one that failed or was interrupted resumes from its last checkpoint. A finished run
whose prompts or measures were changed since is measured again, without a step; a finished variant that was otherwise edited
is an error, because its results would silently mean something else. No torch is imported: models live in the notebooks' kernels.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from t2ilib.config import ConfigError
from t2ilib.data.dataset import load_datasets
from t2ilib.data.prior import build_order, given_pictures, num_class
from t2ilib.evaluation.metrics import check_measures
from t2ilib.memory import GIB, available_memory
from t2ilib.planning.bound import surely_fits
from t2ilib.runfile import merge
from t2ilib.studies.cards import VISIBLE, sharing
from t2ilib.studies.champion import find_lead, name_champion
from t2ilib.studies.executor import Executor
from t2ilib.studies.file import Study, load_study
from t2ilib.studies.notebooks import error_text, execute_notebook, export_html, find_notebook, notebook_parameters
from t2ilib.studies.parent import describe_parent, parent_run
from t2ilib.studies.place import Demand
from t2ilib.studies.runs import VOTES, StudyRun, check_notebooks, plan_runs, require_same_versions, require_unedited
from t2ilib.studies.tuned import TRIALS, TUNED, TUNING
from t2ilib.studies.where import ask_here, open_place
from t2ilib.text import write_whole
from t2ilib.tracking.outbox import Outbox, keeps, send_kept
from t2ilib.tracking.store import check_store, connected, database_file, open_client, reap_stale_runs, tracking_uri

REPORT = "compare.ipynb"
"""The notebook that a study's report is made with."""
SMALLEST_CARD = 8 * GIB
"""What a variant surely fits into needs no look at the device, for which torch would have to be loaded."""


def tell_misfits(
    runs: Sequence[StudyRun],
    jobs: int,
    say: Callable[[str], None],
    cards: Sequence[str] = (),
    ask: Callable[..., Any] = ask_here,
) -> None:
    """Says of every variant that will probably not fit its device beside those that share it while `jobs` of them run, with the
    cheapest change; those with `training.require_fit` are a ConfigError.

    Asked once a variant, and by `ask` in a process of its own, where the notebooks will be: tracing takes torch, and a GPU's context stays as
    long as its process.
    Variants of small models, and those that have begun, are not asked about.
    """
    smallest = min(available_memory() / jobs, SMALLEST_CARD / sharing(jobs, cards))
    begun = {run.variant for run in runs if (run.folder / "checkpoints").exists()}
    configs = {run.variant: run.config() for run in runs if run.variant not in begun}
    asked = [(variant, config) for variant, config in configs.items() if not surely_fits(config, smallest)]
    if not asked:
        return
    found = ask(misfits_of, asked, jobs, list(cards))
    refused = [line for strict, line in found if strict]
    if refused:
        raise ConfigError(f"{len(refused)} variant(s) do not fit this machine:\n  " + "\n  ".join(refused))
    for _, line in found:
        say(f"{line}. It is tried all the same")


def misfits_of(runs: list, jobs: int, cards: list[str]) -> list[tuple[bool, str]]:
    """What `planning.fit.misfits` says, of the GPU among `cards` that has the least memory free."""
    if cards:
        os.environ[VISIBLE] = ",".join(cards[:jobs])  # before torch looks
    import torch

    from t2ilib.planning.fit import misfits

    if cards and torch.cuda.is_available():
        torch.cuda.set_device(min(range(torch.cuda.device_count()), key=lambda card: torch.cuda.mem_get_info(card)[0]))
        return misfits(runs, sharing(jobs, cards))
    return misfits(runs, jobs)


def check_data(runs: Sequence[StudyRun]) -> None:
    """Reads the pictures of these runs, each set once, and logs what is used and held out; raises ConfigError for what cannot be
    used, and for a batch that the training pictures, and those of the class, do not fill. Of notebooks with other data than a run's nothing is asked."""
    own: dict[str, int] = {}
    of_class: dict[str, int] = {}
    for run in runs:
        if "data" not in notebook_parameters(run.notebook):
            continue
        config = run.config()
        said, of_prior = (config.model_dump_json(include=set(part)) for part in (("data", "shapes"), ("data", "prior")))
        if said not in own:
            own[said] = len(load_datasets(config)[0])
        if of_prior not in of_class:
            of_class[of_prior] = num_class(config, given_pictures(config))
        if config.training.steps:
            build_order(config, own[said], of_class[of_prior])


def run_study(
    path: Path,
    preset: str = "quick",
    only: Sequence[str] = (),
    seeds: Sequence[int] = (),
    jobs: int | None = None,
    results: Path = Path("results"),
    say: Callable[[str], None] = print,
    on: str = "here",
    per_card: int = 1,
) -> list[StudyRun]:
    """Runs what is not finished, `jobs` notebooks at a time. Returns all runs of the preset; look at their `state`.

    `on`: where, here or on a Ray cluster (`where.WHERE`); `jobs`: None for what suits the place, one at a time here; `per_card`: how many
    may share a GPU.

    Raises ConfigError before anything starts for mistakes in the study file and for pictures that cannot be used. KeyboardInterrupt and SIGTERM reach the
    running notebooks, which commit a checkpoint; the next call resumes them.
    """
    study = load_study(path)
    runs = plan_runs(study, path, preset, results.absolute(), only, seeds)
    check_notebooks(runs)
    find_notebook(REPORT, path)  # told now, not after the last run
    for run in runs:
        check_measures(run.config().evaluation.measures or ())
    require_unedited(runs)
    require_same_versions(runs)
    pending = [run for run in runs if run.state != "finished"]
    check_data(pending)
    uri = tracking_uri(None, results)
    if pending:
        check_store(uri, study.name)
    for run in runs:  # of a store that was away when it ended
        if keeps(run.folder):
            for told in filter(None, send_kept(run.folder).values()):
                say(told)
    folder = runs[0].folder.parents[1]
    if not pending:
        write_study(study, preset, folder)
        say(f"study {study.name}, preset {preset}: {len(runs)} runs, all finished before")
        return runs
    with open_place(on, Demand(len(pending), jobs, per_card, uri, say)) as place:
        tell_misfits(pending, place.jobs if place.cards else place.sharing, say, place.cards, place.ask)
        write_study(study, preset, folder)
        again = sum(run.state == "outdated" for run in pending)
        say(
            f"study {study.name}, preset {preset}: {len(runs)} runs, {len(runs) - len(pending)} finished before, {len(pending)} to do"
            f"{f' ({again} of them only to measure again)' * bool(again)}, {place.jobs} at a time"
        )
        if place.about:
            say(place.about)
        client, experiment = open_client(uri, study.name, results)
        reap_stale_runs(client, experiment)
        parent = parent_run(client, experiment, study, preset, folder)
        describe_parent(client, parent, study, runs)
        try:
            Executor(pending, place, parent, uri, say).run()
        finally:
            outbox = Outbox(folder, uri, parent, client)
            status = "FINISHED" if all(run.state == "finished" for run in runs) else "FAILED"
            outbox.add("end", status=status, time=int(time.time() * 1000))
            if told := outbox.close():
                say(told)
    return runs


def write_study(study: Study, preset: str, folder: Path) -> None:
    """study.json for the report: what was asked, in display order; of a preset that names its variants those, and what has been run
    beyond them."""
    folder.mkdir(parents=True, exist_ok=True)
    values = study.model_dump(mode="json")
    chosen = study.presets[preset]
    told = [name for name in study.variants if name in study.of_preset(preset) or (folder / name).exists()]
    content = {
        "name": study.name,
        "question": study.question,
        "preset": preset,
        "reference": study.reference,
        "base": study.base if study.base in told else None,
        "margins": study.margins,
        "seeds": chosen.seeds,
        "run": merge(study.run, chosen.run),
        "variants": {name: values["variants"][name] | {"run": study.delta(preset, name)} for name in told},
    }
    if study.score is not None:
        content["score"] = study.score
    if chosen.tuned is not None:
        content["tuned"] = chosen.tuned
        trials = folder.with_name(folder.name.removesuffix(TUNED) + TUNING) / TRIALS
        if trials.exists():  # for the report, which is made of this folder alone
            write_whole(folder / TRIALS, trials.read_text())
    text, target = json.dumps(content, indent=1), folder / "study.json"
    if not target.exists() or target.read_text() != text:
        target.write_text(text)


def write_report(path: Path, preset: str, results: Path) -> Path:
    """Executes the report's notebook on the preset's results, unless nothing has changed since; returns the HTML report.

    Raises ConfigError with the notebook's error where it fails.
    """
    folder = results.absolute() / f"{load_study(path).name}-{preset}"
    source, notebook, parameters = (
        find_notebook(REPORT, path),
        folder / "report.ipynb",
        folder / "report-parameters.yaml",
    )
    sources = [
        source,
        folder / "study.json",
        *folder.rglob("result.json"),
        *folder.glob(f"{VOTES}/*.json"),
        *folder.glob(TRIALS),
    ]
    page = notebook.with_suffix(".html")
    if page.exists() and page.stat().st_mtime > max(file.stat().st_mtime for file in sources):
        return page
    parameters.write_text(yaml.safe_dump({"results_folder": str(folder)}))
    code, output = execute_notebook(source, notebook, parameters, {"T2ILIB_BATCH": "1"})
    if code:
        raise ConfigError(f"the report could not be made: {error_text(output) or output[-2000:]}")
    return export_html(notebook, hide_code=True)


def champion_line(
    path: Path, preset: str, results: Path, card: Callable[[str], tuple[str, dict[str, str]]] | None = None
) -> str:
    """Once all runs of a preset are finished and a lead is shown, registers the best adapter in MLflow; returns a line that says so,
    or why there is no champion. `card`: of a model's name, what is to be said of it and its tags."""
    study = load_study(path)
    runs = plan_runs(study, path, preset, results.absolute())
    if lacking := sum(run.state != "finished" for run in runs):
        return f"none yet: {lacking} of the preset's {len(runs)} runs are not finished"
    uri, name = tracking_uri(None, results), f"{study.name}-{preset}"
    with connected(uri, database_file(uri)) as client:
        return name_champion(client, name, find_lead(runs, study.score), *(card(name) if card else ()))


def status_rows(path: Path, preset: str, results: Path) -> list[dict[str, str]]:
    """Variant, seed, state, step reached and seconds of every run of a preset, for the terminal."""
    rows = []
    for run in plan_runs(load_study(path), path, preset, results.absolute()):
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
