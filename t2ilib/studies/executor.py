"""Running the notebooks of a study side by side, one process each, and telling how far they are.

Where a notebook is executed, the `Place` decides. All else (folders, states, progress, signals,
results) is the same wherever that is, and is done here.
"""

import json
import os
import queue
import re
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import yaml

from t2ilib.environment import read_environments
from t2ilib.evaluation.metrics import DECLARATIONS
from t2ilib.memory import usable_cores
from t2ilib.studies.cards import variables_of
from t2ilib.studies.notebooks import error_text, export_html
from t2ilib.studies.place import Place, WorkerLost
from t2ilib.studies.runs import StudyRun
from t2ilib.tracking.outbox import Outbox

THREADS = "OMP_NUM_THREADS"
PROGRESS = re.compile(r"step (\d+)/(\d+)")
TOLD_FROM = 0.005
"""Less of a study says nothing of how long it takes: a run has hardly been loaded."""
SECONDS_BETWEEN_LINES = 10.0
IN_GOOD_ORDER = ("Stopped: ", "Interrupted: ")
"""Beginnings of what a notebook says that stopped with a checkpoint: its time is spent, there is no room left, a signal came
(`tracking.ending`). It has not failed, and the next call goes on with it."""
TRAINING_SHARE = 0.7
"""Of a run's time; the rest is loading and measuring. Only the ETA depends on it."""
TIMES_LOST = 3
"""How often a run whose worker was lost is tried again."""


def share_of_cores(jobs: int) -> int:
    """Threads of each of `jobs` kernels: as many as there are cores for, and no more than this process was told to use."""
    share, told = max(1, usable_cores() // jobs), os.environ.get(THREADS, "")
    return min(share, int(told)) if told.isdecimal() and int(told) else share


class Executor:
    """Runs notebooks side by side at a place, one process each, and tells how far they are."""

    def __init__(self, runs: list[StudyRun], place: Place, parent: str, uri: str, say: Callable[[str], None]):
        self.runs, self.place = runs, place
        self.slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(place.jobs):
            self.slots.put(slot)
        self.parent, self.uri, self.say = parent, uri, say
        self.lock, self.over, self.endings, self.stopping = threading.Lock(), threading.Event(), {}, False
        self.began, self.done, self.parts, self.shown = time.monotonic(), 0, {}, {}

    def run(self) -> None:
        """Until all are done; a signal is passed on to the notebooks, waited for, and raised again."""
        previous = {}
        if threading.current_thread() is threading.main_thread():
            previous = {number: signal.signal(number, self.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with ThreadPoolExecutor(self.place.jobs) as pool:
                ticker = threading.Thread(target=self.tick, daemon=True)
                ticker.start()
                list(pool.map(self.attempt, self.runs))
        finally:
            self.over.set()
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self.stopping:
            raise SystemExit(128 + self.stopping)

    def stop(self, number: int, frame) -> None:
        self.say("stopping: running notebooks commit a checkpoint; the same command goes on from there")
        self.stopping = number
        for end in list(self.endings.values()):
            end()

    def tick(self) -> None:
        """A line every while, also when no notebook says anything: loading and measuring take their time."""
        while not self.over.wait(SECONDS_BETWEEN_LINES):
            if time.monotonic() - max(self.shown.values(), default=0.0) > SECONDS_BETWEEN_LINES:
                self.say(f"    running: {', '.join(list(self.endings)) or 'nothing yet'}{self.left()}")

    def attempt(self, run: StudyRun) -> None:
        """Executes one run; whatever goes wrong in it is its own failure, and the others go on."""
        if self.stopping:
            return
        slot = self.slots.get()
        try:
            self.execute(run, slot)
        except Exception as error:
            self.fail(run, f"{type(error).__name__}: {error}", traceback.format_exc())
        finally:
            self.endings.pop(run.label, None)
            self.slots.put(slot)

    def fail(self, run: StudyRun, reason: str, text: str) -> None:
        (run.folder / "failed.txt").write_text(text[-20000:])
        self.say(f"[{self.position(run)}] {run.label}: FAILED: {reason}\n    see {run.folder / 'failed.txt'}")

    def started(self, run: StudyRun, end: Callable[[], None], times: list[float]) -> None:
        """`end`: asks its notebook to stop; `times` gets when it began, for it may have waited for a machine until now."""
        times.append(time.monotonic())
        self.endings[run.label] = end
        if self.stopping:
            end()

    def execute(self, run: StudyRun, slot: int = 0) -> None:
        """`slot`: its place among those that run at a time."""
        outdated = run.state == "outdated"
        begun_before = (run.folder / "checkpoints").exists()
        resumed = " (measuring again)" if outdated else " (resuming)" if begun_before else ""
        jobs = run.result().get("jobs") if outdated else None if begun_before else self.place.jobs
        self.say(f"[{self.position(run)}] {run.label}: starting{resumed}")
        if outdated:  # grids of other prompts, perhaps; the result stays until there is another
            for drawn in ("samples", "progress", "denoising"):
                shutil.rmtree(run.folder / drawn, ignore_errors=True)
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "failed.txt").unlink(missing_ok=True)
        (run.folder / "parameters.yaml").write_text(yaml.safe_dump(run.parameters(self.parent), sort_keys=False))
        times: list[float] = []
        code, output = self.persist(run, slot, times)
        seconds = time.monotonic() - times[0] if times else 0.0
        self.endings.pop(run.label, None)
        if self.stopping and code:
            return
        with self.lock:
            self.done += 1
            self.parts.pop(run.label, None)
        if code == 0 and (run.folder / "metrics.json").exists():
            self.finish(run, seconds, outdated, jobs)
            self.say(f"[{self.position(run)}] {run.label}: finished in {seconds:.0f} s{self.left()}")
        else:
            reason = error_text(output) or f"the notebook process ended with exit code {code}"
            if reason.startswith(IN_GOOD_ORDER):
                self.say(f"[{self.position(run)}] {run.label}: {reason}")
            else:
                self.fail(run, reason, f"exit code {code}\n{output}")

    def persist(self, run: StudyRun, slot: int, times: list[float]) -> tuple[int, str]:
        """Executes a run's notebook, again where its worker is lost: it goes on from its last checkpoint, wherever that is."""
        lost = 0
        while True:
            try:
                return self.place.execute(
                    run.notebook,
                    run.folder / "notebook.ipynb",
                    run.folder / "parameters.yaml",
                    self.variables(slot),
                    lambda line: self.follow(run, line),
                    lambda end: self.started(run, end, times),
                    lambda: bool(self.stopping),
                )
            except WorkerLost as error:
                self.endings.pop(run.label, None)
                lost += 1
                if self.stopping:
                    return 128 + self.stopping, ""
                if lost > TIMES_LOST:
                    raise WorkerLost(f"{error}, for the {lost}th time: that is no accident") from None
                self.say(
                    f"[{self.position(run)}] {run.label}: {error}; it goes on from its last checkpoint ({lost} of {TIMES_LOST} times)"
                )

    def variables(self, slot: int = 0) -> dict[str, str]:
        """Environment of a kernel: its share of the cores (fewer where OMP_NUM_THREADS says so here already), its GPU, plain progress, and
        the study's store. Threads that wait give way where kernels share the cores; one alone is twice as fast if its threads stay awake."""
        place = self.place
        return variables_of(slot, place.cards) | {
            THREADS: str(place.threads or share_of_cores(place.jobs)),
            **({"OMP_WAIT_POLICY": "passive"} if place.jobs > 1 else {}),
            "T2ILIB_BATCH": "1",
            "MLFLOW_TRACKING_URI": self.uri,
            "PYTHONUNBUFFERED": "1",
            "PYTHONWARNINGS": "ignore",
            "JUPYTER_PLATFORM_DIRS": "1",
        }

    def position(self, run: StudyRun) -> str:
        return f"{self.runs.index(run) + 1}/{len(self.runs)}"

    def follow(self, run: StudyRun, line: str) -> None:
        """Passes on a notebook's progress lines, at most one in ten seconds, with the time left for the whole study."""
        found = PROGRESS.search(line)
        if not found:
            return
        with self.lock:
            self.parts[run.label] = TRAINING_SHARE * int(found[1]) / int(found[2])
        if time.monotonic() - self.shown.get(run.label, 0.0) > SECONDS_BETWEEN_LINES:
            self.shown[run.label] = time.monotonic()
            self.say(f"[{self.position(run)}] {run.label}: {line.strip()}{self.left()}")

    def left(self) -> str:
        """The share of the work that is done, and by it the time left; "" where nothing is done or left."""
        with self.lock:
            share = (self.done + sum(self.parts.values())) / len(self.runs)
        if not 0 < share < 1:
            return ""
        if share < TOLD_FROM:
            return f"  |  study {share:.0%}"
        left = round((time.monotonic() - self.began) * (1 - share) / share)
        return f"  |  study {share:.0%}, ETA {left // 60}:{left % 60:02d}"

    def finish(self, run: StudyRun, seconds: float, measured_again: bool = False, jobs: int | None = None) -> None:
        """Commits result.json, and hangs the executed notebook and its HTML on the MLflow run. `jobs`: how many notebooks ran at a
        time while it trained, None where that is not known of all its steps."""
        metrics = json.loads((run.folder / "metrics.json").read_text())
        note = run.folder / "tracking.json"
        run_id = json.loads(note.read_text())["run_id"] if note.exists() else None
        page = export_html(run.folder / "notebook.ipynb", hide_code=False)
        if run_id is not None:
            outbox = Outbox(run.folder, self.uri, run_id)
            for path in (run.folder / "notebook.ipynb", page):
                outbox.add("artifact", path=str(path), under=None)
            if measured_again:
                outbox.add(
                    "corrections", values=metrics, step=run.config().training.steps, time=int(time.time() * 1000)
                )
            if told := outbox.close():
                self.say(told)
        result = {
            "variant": run.variant,
            "seed": run.seed,
            "status": "finished",
            "seconds": seconds,
            "jobs": jobs,
            "mlflow_run_id": run_id,
            "digest": run.digest,
            "run": run.settings,
            "environment": read_environments(run.folder),
            "metrics": metrics,
            "measures": json.loads(about.read_text()) if (about := run.folder / DECLARATIONS).exists() else {},
        }
        draft = run.folder / "result.json.part"
        draft.write_text(json.dumps(result, indent=1))
        draft.rename(run.folder / "result.json")
