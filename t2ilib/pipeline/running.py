"""Going through a pipeline: each step says what it will do and need, is done, leaves its mark, and is not done twice.

Memory and disk are read before and after each step, into pipeline.log and, for the steps of a run, beside that run's numbers in MLflow.
A process that is killed leaves no mark of the step that it was in; the same command begins with that step, which goes on where it was.
"""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2ilib.config import ConfigError, RunConfig, check_choice
from t2ilib.config.section import seconds_in
from t2ilib.locking import held
from t2ilib.memory import MemoryLog, release
from t2ilib.pipeline.file import NAMES, PipelineConfig, load_pipeline
from t2ilib.pipeline.job import Job, Options, time_told
from t2ilib.pipeline.marks import Mark, digest_of, mark_path, read_mark, write_mark
from t2ilib.pipeline.steps import STEPS
from t2ilib.runlog import RunLog
from t2ilib.tracking.ending import Stopped
from t2ilib.tracking.mlflow_run import NOTE
from t2ilib.tracking.tracker import open_tracker

log = logging.getLogger(__name__)

LOG = "pipeline.log"
SPENT = 75
"""The exit status of what its time budget stopped (`training.stopping.AGAIN`)."""
TRACKED = ("train", "measure", "draw")
"""Steps after which a run is known to MLflow, if it is logged there."""


@dataclass(frozen=True)
class Task:
    """A step for one run; `name` is None where it is done once for all."""

    step: str
    name: str | None

    def __str__(self) -> str:
        return self.step if self.name is None else f"{self.step} {self.name}"


class Pipeline:
    """A pipeline's tasks, and what is known of them. `began`: when the command did, by `time.monotonic`."""

    def __init__(self, config: PipelineConfig, runs: dict[str, RunConfig], options: Options):
        self.config, self.runs, self.options, self.began = config, runs, options, time.monotonic()
        self.tasks = [Task(step, name) for step in config.steps for name in (runs if STEPS[step].each else (None,))]
        self.memory = {name: MemoryLog(config.output) for name in (None, *runs)}

    def earlier(self, task: Task) -> list[Task]:
        """The tasks of the step before that this one follows: of its own run, or of all."""
        at = self.config.steps.index(task.step)
        before = [other for other in self.tasks if at and other.step == self.config.steps[at - 1]]
        return [other for other in before if None in (other.name, task.name) or other.name == task.name]

    def mark(self, task: Task) -> Mark | None:
        return read_mark(mark_path(self.config.output, task.step, task.name))

    def digest(self, task: Task) -> str:
        """What the task depends on, as the file says now and the steps before it gave."""
        before = []
        for other in self.earlier(task):
            digest, mark = self.digest(other), self.mark(other)
            before.append((digest, mark.result if mark is not None and mark.digest == digest else None))
        return digest_of(task.step, STEPS[task.step].depends(self.job(task)), before)

    def is_done(self, task: Task) -> Mark | None:
        """Its mark, where nothing that it depends on has changed since, and what it made is there."""
        mark, again = self.mark(task), task.step == "download" and self.options.force_extract
        current = mark is not None and not again and mark.digest == self.digest(task)
        return mark if current and STEPS[task.step].made(self.job(task)) else None

    def job(self, task: Task) -> Job:
        marks = {other.step: self.mark(other) for other in self.tasks if other.name in (None, task.name)}
        given = {step: mark.result for step, mark in marks.items() if mark is not None}
        return Job(self.config, self.options, self.runs, task.name, given, self.seconds_left(task))

    def seconds_left(self, task: Task) -> float | None:
        """Of the time budget of the task's run, of which the command has taken a part already; None without one."""
        budget = self.runs[task.name or next(iter(self.runs))].training.time_budget
        return None if budget is None else seconds_in(budget) - (time.monotonic() - self.began)

    def perform(self, task: Task, told: str) -> None:
        """Does a task and marks it."""
        left = self.seconds_left(task)
        if left is not None and left <= 0:
            why = f"training.time_budget is spent before {task}; the same command goes on with it"
            log.warning(why)
            raise Stopped(SPENT, why, "SCHEDULED")
        job, digest, begun = self.job(task), self.digest(task), time.monotonic()
        log.info(told)
        for line in STEPS[task.step].needs(job):
            log.info("  %s", line)
        self.memory[task.name].note(f"before_{task.step}")
        result = STEPS[task.step].do(job)
        release()
        self.memory[task.name].note(f"after_{task.step}")
        mark = write_mark(mark_path(self.config.output, task.step, task.name), digest, result, time.monotonic() - begun)
        if task.step in TRACKED:
            for name in self.runs if task.name is None else (task.name,):
                self.log_readings(name)
        log.info("  done in %s", time_told(mark.seconds))

    def log_readings(self, name: str) -> None:
        """All readings so far of a run and of what is done once, to its MLflow run, which has begun."""
        run = self.runs[name]
        if run.tracking.experiment is not None and (run.output / NOTE).exists():
            with open_tracker(run, self.config.output.absolute().parent) as tracker:
                readings = self.memory[None].metrics() | self.memory[name].metrics()
                tracker.log_metrics(readings, run.training.steps)


def run_pipeline(
    file: Path,
    overrides: Sequence[str] = (),
    only: str | None = None,
    begin: str | None = None,
    options: Options = Options(),
) -> dict[str, dict[str, Any]]:
    """Does every task of a pipeline file that is not done, and gives what measuring gave, by run; in a dry run, or without measuring, what is
    known of it. `only`: a step alone; `begin`: it, and what follows.

    Raises ConfigError for mistakes in the file or the options, what the steps raise, and Stopped where a training stops before its end.
    """
    config, runs = load_pipeline(file, list(overrides))
    pipeline = Pipeline(config, runs, options)
    chosen = choose(config.steps, only, begin)
    require_meant(options, chosen)
    tasks = [task for task in pipeline.tasks if task.step in chosen]
    if options.dry:
        tell(pipeline, tasks)
    else:
        told = f"another process goes through the pipeline in {config.output}: wait for it, or stop it"
        with held(config.output / ".lock", told), RunLog() as said:
            said.open(config.output / LOG)
            go_through(pipeline, tasks)
    marks = {name: pipeline.mark(Task("measure", name)) for name in runs}
    return {name: mark.result for name, mark in marks.items() if mark is not None}


def choose(steps: Sequence[str], only: str | None, begin: str | None) -> Sequence[str]:
    """The steps that are meant; raises ConfigError for one that does not exist, or that the file does not name."""
    if only is not None and begin is not None:
        raise ConfigError("--only and --from both say where to begin: leave one of them out")
    for option, step in (("--only", only), ("--from", begin)):
        if step is not None and check_choice(step, NAMES, f"{option}: the step") not in steps:
            raise ConfigError(f"{option} {step}: this file's steps are {', '.join(steps)}")
    return [only] if only else steps[steps.index(begin) :] if begin else steps


def require_meant(options: Options, chosen: Sequence[str]) -> None:
    """Raises ConfigError for an option about a step that is not to be done."""
    about = {
        "--skip-download": ("download", options.skip_download),
        "--force-extract": ("download", options.force_extract),
        "--checkpoint": ("draw", options.checkpoint is not None),
        "--prompt": ("draw", bool(options.prompts)),
    }
    for option, (step, given) in about.items():
        if given and step not in chosen:
            raise ConfigError(f"{option} is about the step {step}, and the steps to be done are {', '.join(chosen)}")


def tell(pipeline: Pipeline, tasks: Sequence[Task]) -> None:
    """What would be done, and what it would need."""
    for number, task in enumerate(tasks, 1):
        place, mark = f"[{number}/{len(tasks)}] {task}", pipeline.is_done(task)
        if mark is not None:
            print(f"{place}: done already, {mark.finished}", flush=True)
            continue
        print(f"{place}:", flush=True)
        for line in STEPS[task.step].needs(pipeline.job(task)):
            print(f"  {line}", flush=True)


def go_through(pipeline: Pipeline, tasks: Sequence[Task]) -> None:
    for number, task in enumerate(tasks, 1):
        place, mark = f"[{number}/{len(tasks)}] {task}", pipeline.is_done(task)
        if mark is None:
            pipeline.perform(task, place)
        else:
            where = mark_path(pipeline.config.output, task.step, task.name)
            log.info("%s: done already, %s (to do it again, delete %s)", place, mark.finished, where)


def require_one_process() -> None:
    """Raises ConfigError under a launcher: a pipeline is one process, and its runs can be trained by several beside it."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError(
            "a pipeline is gone through by one process: do its step process, train the run.yaml of each run with several, then go on"
            " with --from measure"
        )


def table_of(found: Mapping[str, Mapping[str, float]]) -> list[dict[str, str]]:
    """What was measured, a row for each run."""
    names = sorted({name for values in found.values() for name in values})
    return [
        {"run": run, **{name: f"{values[name]:.4g}" if name in values else "" for name in names}}
        for run, values in found.items()
    ]
