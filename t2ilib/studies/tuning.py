"""Tuning a study: before the seeds of a preset are spent, every variant searches its own best values, with the same budget.

    study file -> what is searched -> trials in rounds -> results/<study>-<preset>-tuning/<variant>/trial-000/seed1000/...
               -> tuning.json (every trial), <study file>.tuned.yaml (the best), which `study run --tuned` lays over the variants

A trial is a whole run of the preset by the study's own notebook, executor, folders and MLflow, on pictures and prompts of its own (`apart`).
Trials are made in rounds: all that can be decided now is run side by side, then scored in the order of its numbers, so that what is tried next
does not depend on which notebook was quicker. Optuna keeps the trials (`trials`), so that after any end the same command goes on.

Leaves out pruning: a score takes a whole measurement, and what is stopped early by it would be what starts slowly, not what ends worse.
"""

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from t2ilib.config import ConfigError, check_choice
from t2ilib.evaluation.metrics import Metric, as_written, check_measures
from t2ilib.locking import held
from t2ilib.runfile import merge
from t2ilib.studies.apart import tuning_settings
from t2ilib.studies.executor import Executor
from t2ilib.studies.file import Study, load_study
from t2ilib.studies.notebooks import error_text, find_notebook
from t2ilib.studies.parent import describe_parent, parent_run
from t2ilib.studies.place import Demand, Place
from t2ilib.studies.runs import (
    COLOUR,
    COLOURS,
    StudyRun,
    check_notebooks,
    of_seed,
    require_same_versions,
    require_unedited,
)
from t2ilib.studies.scoring import Score, parse_formula, scoring
from t2ilib.studies.search import Search, grid, partial, refusal
from t2ilib.studies.study import check_data, tell_misfits
from t2ilib.studies.trials import Trials, open_storage
from t2ilib.studies.trying import Next, Tried, at_end, best_of, next_trial
from t2ilib.studies.tuned import TRIALS, TUNING, write_tuned
from t2ilib.studies.where import open_place
from t2ilib.text import write_whole
from t2ilib.tracking.outbox import Outbox
from t2ilib.tracking.store import check_store, open_client, reap_stale_runs, tracking_uri

DATABASE, RULE = "optuna.db", "score.json"
SCORE = "tuning_score"
"""In MLflow: a trial's score."""
DIVERGED = "NonFiniteLoss"
PATIENCE = 2
"""So many failures of a trial's notebook, in as many calls, and it is given up."""


@dataclass
class Searching:
    """A variant and how far its search is. `paused`: until the next call, for a trial failed or its time is spent; `why`: it has ended."""

    name: str
    settings: dict[str, Any]
    search: Search
    trials: Trials
    grid: list[dict[str, Any]]
    paused: bool = False
    why: str = ""
    runs: dict[int, list[StudyRun]] = field(default_factory=dict)

    def next(self, study: Study) -> Next:
        tuning = study.tuning
        return next_trial(
            self.trials.all(), self.search, self.grid, tuning.trials, tuning.hours, tuning.extensions, self.allows
        )

    def allows(self, values: dict[str, Any]) -> bool:
        return not refusal(merge(self.settings, partial(values)))


def tune_study(
    path: Path,
    preset: str = "quick",
    only: Sequence[str] = (),
    jobs: int | None = None,
    results: Path = Path("results"),
    say: Callable[[str], None] = print,
    on: str = "here",
    per_card: int = 1,
) -> Path:
    """Makes what trials are left, `jobs` notebooks at a time; returns the path of tuning.json, in whose variants `ended` says why a search
    ended. The values of those that have are written beside the study file.

    `on`, `jobs`, `per_card`: as of `run_study`. Raises ConfigError before anything starts for mistakes in the study file, for pictures that cannot be used, where more than `per_card`
    notebooks would share a GPU, and where another process tunes the same. KeyboardInterrupt and SIGTERM reach the running notebooks, which commit a checkpoint; the next call goes on.
    """
    study = load_study(path)
    require_search(study, path, preset, only)
    names = [name for name in study.of_preset(preset) if study.trains(preset, name) and (not only or name in only)]
    settings = tuning_settings(study, preset, names)
    folder = results.absolute() / f"{study.name}-{preset}{TUNING}"
    uri = tracking_uri(None, results)
    with held(folder / ".tuning.lock", f"{folder} is being tuned by another process: wait for it, or stop it first"):
        tune = Tune(study, path, preset, folder, uri, say)
        sample = tune.check(names, settings)
        runs = len(names) * study.tuning.trials * len(study.tuning.seeds)
        with open_place(on, Demand(runs, jobs, per_card, uri, say)) as place:
            tell_misfits(sample, place.jobs if place.cards else place.sharing, say, place.cards, place.ask)
            tune.begin(names, settings, results)
            tune.go_on(place)
        values = {s.name: partial(best.values) for s in tune.searches if s.why and (best := best_of(s.trials.all()))}
        for search in tune.searches:
            if search.why and search.name not in values:
                say(f"{search.name}: no trial of it has a score, so there is nothing that it is tuned to")
        if values:
            say(f"tuned values: {write_tuned(path, preset, values)}")
    return folder / TRIALS


def require_search(study: Study, path: Path, preset: str, only: Sequence[str]) -> None:
    check_choice(preset, study.presets, "preset")
    if study.presets[preset].tuned is not None:
        raise ConfigError(f"preset {preset} is at tuned values already: name the one that it was made of")
    for name in only:
        check_choice(name, study.of_preset(preset), f"variant of preset {preset}:")
    if not os.access(path.absolute().parent, os.W_OK):
        raise ConfigError(
            f"{path.absolute().parent} cannot be written to, and tuned values go beside the study file: copy it elsewhere"
        )
    if not any(study.search_of(preset, name) for name in study.of_preset(preset)):
        raise ConfigError(
            f"{path} says nothing to search: add, for instance,\nsearch:\n  optimizer.learning_rate: {{low: 1.0e-4, high: 1.0e-2, log: true}}"
        )


class Tune:
    """A tuning as it goes on."""

    def __init__(self, study: Study, path: Path, preset: str, folder: Path, uri: str, say: Callable[[str], None]):
        self.study, self.path, self.preset, self.folder = study, path, preset, folder
        self.uri, self.say = uri, say
        self.searches: list[Searching] = []
        self.runs: dict[str, StudyRun] = {}
        self.score: Score | None = self.read_rule()

    def check(self, names: Sequence[str], settings: dict[str, dict[str, Any]]) -> list[StudyRun]:
        """Checks what is to be run, as `run_study` does; returns a run of each variant and seed."""
        sample = [self.run_of(name, 0, seed, settings[name]) for name in names for seed in self.study.tuning.seeds]
        check_notebooks(sample)
        for run in sample:
            check_measures(run.config().evaluation.measures or ())
        check_data(sample)
        check_store(self.uri, self.study.name)
        return sample

    def begin(self, names: Sequence[str], settings: dict[str, dict[str, Any]], results: Path) -> None:
        """Opens Optuna's trials and MLflow's parent run."""
        storage = open_storage(self.folder / DATABASE)
        for name in names:
            search, own = self.study.search_of(self.preset, name), settings[name]
            asked = {
                "search": {address: told.model_dump(exclude_defaults=True) for address, told in search.items()},
                "settings": own,
                "seeds": self.study.tuning.seeds,
                "score": self.study.score,
            }
            trials = Trials(storage, name, search, asked)
            self.searches.append(Searching(name, own, search, trials, grid(search, own)))
        require_same_versions(self.known_runs())
        self.client, experiment = open_client(self.uri, self.study.name, results)
        reap_stale_runs(self.client, experiment)
        self.parent = parent_run(self.client, experiment, self.study, self.preset + TUNING, self.folder)

    def known_runs(self) -> list[StudyRun]:
        """The notebooks of every trial that was begun, and of the next one of each variant."""
        return [
            self.run_of(search.name, number, seed, merge(search.settings, partial(values)))
            for search in self.searches
            for number, values in enumerate([*(trial.values for trial in search.trials.all()), {}])
            for seed in self.study.tuning.seeds
        ]

    def budget(self, jobs: int) -> str:
        told = self.study.tuning
        hours = f" or {told.hours:g} h" if told.hours else ""
        seeds = f", each of {len(told.seeds)} seeds" * (len(told.seeds) > 1)
        return (
            f"tuning of {self.study.name}, preset {self.preset}: {len(self.searches)} variants, {told.trials} trials{hours} each"
            f"{seeds}, {jobs} at a time"
        )

    def run_of(self, name: str, number: int, seed: int, settings: dict[str, Any]) -> StudyRun:
        """One notebook of a trial."""
        place = f"{self.preset}{TUNING}"
        colour = COLOURS[list(self.study.variants).index(name) % len(COLOURS)]
        return StudyRun(
            variant=name,
            seed=seed,
            settings=of_seed(settings, seed),
            folder=self.folder / name / f"trial-{number:03d}" / f"seed{seed}",
            notebook=find_notebook(self.study.notebooks()[name], self.path),
            tags={
                "variant": name,
                "study": self.study.name,
                "preset": place,
                "trial": str(number),
                COLOUR: colour,
            },
            trial=number,
        )

    def go_on(self, place: Place) -> None:
        """Round by round, until every search has ended or waits for another call."""
        self.say(self.budget(place.jobs))
        if place.about:
            self.say(place.about)
        try:
            while batch := self.next_round(place.jobs):
                runs = [run for search, trial in batch for run in search.runs[trial.number]]
                require_unedited(runs)
                pending = [run for run in runs if run.state != "finished"]
                self.runs |= {run.label: run for run in runs}
                describe_parent(self.client, self.parent, self.study, list(self.runs.values()))
                if pending:
                    Executor(pending, place, self.parent, self.uri, self.say).run()
                for search, trial in sorted(batch, key=lambda pair: pair[1].number):
                    self.settle(search, trial)
                self.write()
        finally:
            ended = all(search.why for search in self.searches)
            outbox = Outbox(self.folder, self.uri, self.parent, self.client)
            outbox.add("end", status="FINISHED" if ended else "FAILED", time=int(time.time() * 1000))
            if told := outbox.close():
                self.say(told)
        self.write()

    def next_round(self, jobs: int) -> list[tuple[Searching, Tried]]:
        """Every trial that can be made now: those that were begun, and new ones as far as they can be decided and there is room for."""
        batch = []
        going = [search for search in self.searches if not search.paused and not search.why]
        room = math.ceil(jobs / max(1, len(going)))
        for search in going:
            trials = [search.trials.resume(t.number) for t in search.trials.all() if t.state == "running"]
            trials += [search.trials.begin() for t in search.trials.all() if t.state == "waiting"]
            while True:
                step = search.next(self.study)
                search.why = step.why if not trials else ""
                in_grid = len(search.trials.all()) < len(search.grid)
                if step.why or step.waits or (len(trials) >= room and not in_grid):
                    break
                trials.append(search.trials.begin(step.fixed, step.extends))
            for trial in trials:
                own = merge(search.settings, partial(trial.values))
                search.runs[trial.number] = [
                    self.run_of(search.name, trial.number, seed, own) for seed in self.study.tuning.seeds
                ]
                batch.append((search, trial))
        return batch

    def settle(self, search: Searching, trial: Tried) -> None:
        """Tells Optuna what came of a trial."""
        runs = search.runs[trial.number]
        states = [run.state for run in runs]
        if all(state == "finished" for state in states):
            self.settle_finished(search, trial, runs)
            return
        search.paused = True
        failed = [run for run in runs if run.state == "failed"]
        reasons = {run.label: error_text((run.folder / "failed.txt").read_text()) for run in failed}
        if any(reason.startswith(DIVERGED) for reason in reasons.values()):
            search.paused = False
            search.trials.diverge(trial.number, sum(map(seconds_of, runs)))
            self.say(f"{search.name} trial {trial.number} diverged at {written(trial.values)}: worse than all others")
        elif failed and search.trials.fail(trial.number, PATIENCE):
            search.paused = False
            self.say(f"{search.name} trial {trial.number} failed {PATIENCE} times and is given up: {failed[0].label}")

    def settle_finished(self, search: Searching, trial: Tried, runs: Sequence[StudyRun]) -> None:
        results = [run.result() for run in runs]
        if self.score is None:
            self.score = self.fix_rule(results)
        seconds = sum(result["seconds"] for result in results)
        values = [self.score.of(result["metrics"]) for result in results]
        if not all(map(math.isfinite, values)):
            search.trials.diverge(trial.number, seconds)
            return
        score = sum(values) / len(values)
        search.trials.score(trial.number, score if self.score.metric.better == "higher" else -score, seconds)
        self.say(
            f"{search.name} trial {trial.number}: {self.score.metric.title} {score:.4g} at {written(trial.values)}"
        )
        for run, result, value in zip(runs, results, values, strict=True):
            if run_id := result["mlflow_run_id"]:
                outbox = Outbox(run.folder, self.uri, run_id, self.client)
                now, step = int(time.time() * 1000), run.config().training.steps
                outbox.add("metrics", values=[[SCORE, value, now, step]])
                if told := outbox.close():
                    self.say(told)

    def read_rule(self) -> Score | None:
        """How trials are scored, as it was decided when the first were."""
        file = self.folder / RULE
        if not file.exists():
            return None
        told = json.loads(file.read_text())
        metric, formula = Metric(**told["metric"]), parse_formula(told["formula"])
        return Score(metric, tuple(told["parts"]), formula, told["meant"])

    def fix_rule(self, results: Sequence[dict[str, Any]]) -> Score:
        """Decides how trials are scored, once for all variants; raises ConfigError where nothing decides."""
        declared = {key: Metric(**about) for result in results for key, about in result["measures"].items()}
        score = scoring([result["metrics"] for result in results], declared, self.study.score)
        if score is None:
            raise ConfigError(
                "nothing that was measured says which trial is better: write `score` into the study file, a formula over"
                f" {', '.join(sorted(results[0]['metrics']))}"
            )
        about = {"metric": as_written(score.metric), "formula": score.formula.text}
        write_whole(
            self.folder / RULE, json.dumps(about | {"parts": score.parts, "meant": dict(score.meant)}, indent=1)
        )
        return score

    def write(self) -> None:
        """tuning.json: every trial of every variant, those of earlier calls with other `--only` too."""
        file = self.folder / TRIALS
        known = json.loads(file.read_text())["variants"] if file.exists() else {}
        content = {
            "study": self.study.name,
            "preset": self.preset,
            "score": None if self.score is None else as_written(self.score.metric),
            "parts": None if self.score is None else self.score.parts,
            "order": list(self.study.variants),
            "budget": self.study.tuning.model_dump(exclude={"run", "prompts"}),
            "variants": known | {search.name: self.told(search) for search in self.searches},
        }
        write_whole(file, json.dumps(content, indent=1))

    def told(self, search: Searching) -> dict[str, Any]:
        tried = search.trials.all()
        best = best_of(tried)
        sign = 1 if self.score is None or self.score.metric.better == "higher" else -1
        rows = [
            {**asdict(trial), "score": None if trial.gain is None else sign * trial.gain}
            for trial in tried
            if trial.state != "waiting"
        ]
        for row in rows:
            del row["gain"]
        return {
            "title": self.study.variants[search.name].title,
            "class": self.study.class_of(self.preset, search.name),
            "search": {address: told.model_dump(exclude_defaults=True) for address, told in search.search.items()},
            "trials": rows,
            "best": best and best.number,
            "at_end": at_end(tried, search.search, search.allows),
            "ended": search.why or None,
        }


def seconds_of(run: StudyRun) -> float:
    """What a notebook took; of one that failed its last attempt, from when it was given its parameters."""
    if run.state == "finished":
        return run.result()["seconds"]
    begun, ended = run.folder / "parameters.yaml", run.folder / "failed.txt"
    return max(0.0, ended.stat().st_mtime - begun.stat().st_mtime) if begun.exists() and ended.exists() else 0.0


def written(values: dict[str, Any]) -> str:
    return (
        ", ".join(
            f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
        )
        or "what the study says"
    )
