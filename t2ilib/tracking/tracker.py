"""What a run logs. The loop knows only `Tracker`; without an experiment, and nothing `beside` it, it gets one that does nothing.

One MLflow run a training run: `open_tracker` starts it, or takes it up again where `tracking.json` in the output folder
says which it was, so a resumed training continues its curves. Leaving the scope ends the run as FINISHED, FAILED (an
exception), KILLED (a signal, no room left) or SCHEDULED (its time is spent, and it is to go on), with a tag that says why it is not
finished. A killed process cannot say so: the heartbeat tag tells, and `store.reap_stale_runs` closes such runs.
"""

import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from t2ilib.config import RunConfig
from t2ilib.tracking.beside import BESIDE, require_installed
from t2ilib.tracking.ending import Stopped
from t2ilib.tracking.mlflow_run import MlflowTracker
from t2ilib.tracking.store import tracking_uri

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """What the loop and the notebooks log. Steps are optimizer steps."""

    def log_metrics(self, values: dict[str, float], step: int) -> None: ...
    def log_image(self, image: "Image", key: str, step: int) -> None: ...
    def log_datasets(self, training: Any, held_out: Any) -> None: ...
    def log_artifact(self, path: Path, folder: str | None = None) -> None: ...
    def log_adapter(self, file: Path, base: str, side: int) -> None: ...
    def flush(self) -> None: ...


class NullTracker:
    """Logs nothing."""

    run_id = None

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        pass

    def log_image(self, image: "Image", key: str, step: int) -> None:
        pass

    def log_datasets(self, training: Any, held_out: Any) -> None:
        pass

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        pass

    def log_adapter(self, file: Path, base: str, side: int) -> None:
        pass

    def flush(self) -> None:
        pass


class Trackers:
    """Several trackers as one, each told everything. `run_id`: MLflow's, where it is among them."""

    def __init__(self, *trackers: Any):
        self.trackers = trackers

    @property
    def run_id(self) -> str | None:
        return getattr(self.trackers[0], "run_id", None)

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        for tracker in self.trackers:
            tracker.log_metrics(values, step)

    def log_image(self, image: "Image", key: str, step: int) -> None:
        for tracker in self.trackers:
            tracker.log_image(image, key, step)

    def log_datasets(self, training: Any, held_out: Any) -> None:
        for tracker in self.trackers:
            tracker.log_datasets(training, held_out)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        for tracker in self.trackers:
            tracker.log_artifact(path, folder)

    def log_adapter(self, file: Path, base: str, side: int) -> None:
        for tracker in self.trackers:
            tracker.log_adapter(file, base, side)

    def flush(self) -> None:
        for tracker in self.trackers:
            tracker.flush()


@contextlib.contextmanager
def open_tracker(run: RunConfig, results: Path | None = None) -> Iterator[Tracker]:
    """The tracker of a run for as long as the scope lasts: MLflow, where `run.tracking.experiment` names one, and what is `beside` it;
    NullTracker without any.

    `results`: where MLflow's default store lies; the output folder's parent without it. Raises ConfigError for a store that cannot be
    used, and for a tracker that is not installed, before it is used.
    """
    require_installed(run.tracking.beside)
    trackers: list[Any] = []
    if run.tracking.experiment is not None:
        results = results or run.output.absolute().parent
        mlflow = MlflowTracker(run, tracking_uri(run.tracking.uri, results), results)
        mlflow.check()
        trackers.append(mlflow)
    trackers += [BESIDE[name](run) for name in run.tracking.beside]
    if not trackers:
        yield NullTracker()
        return
    status, why = "FINISHED", ""
    try:
        with terminated_as_exit():
            yield trackers[0] if len(trackers) == 1 else Trackers(*trackers)
    except BaseException as error:
        status, why = ended_by(error)
        raise
    finally:
        with contextlib.ExitStack() as ending:  # all of them, also where ending one fails
            for tracker in trackers:
                ending.callback(tracker.end, status, why)


def ended_by(error: BaseException) -> tuple[str, str]:
    """MLflow's status for a run that this ended, and why in words."""
    if isinstance(error, Stopped):
        return error.status, error.why
    status = "KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED"
    return status, f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def terminated_as_exit() -> Iterator[None]:
    """SIGTERM as SystemExit(143), so that the run is closed also where no training step is there to end on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
