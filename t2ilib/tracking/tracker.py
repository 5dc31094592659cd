"""What a run logs. The loop knows only `Tracker`; without an experiment, and nothing `beside` it, it gets one that does nothing.

One MLflow run a training run: `open_tracker` starts it, or takes it up again where `tracking.json` in the output folder
says which it was, so a resumed training continues its curves. Leaving the scope ends the run as FINISHED, FAILED (an
exception), KILLED (a signal, no room left) or SCHEDULED (its time is spent, and it is to go on), with a tag that says why it is not
finished. A killed process cannot say so: the heartbeat tag tells, and `store.reap_stale_runs` closes such runs.
"""

import contextlib
import functools
import json
import logging
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from t2ilib.config import RunConfig
from t2ilib.runfile import save_run
from t2ilib.text import write_whole
from t2ilib.tracking.beside import BESIDE, require_installed
from t2ilib.tracking.ending import Stopped
from t2ilib.tracking.models import log_adapter
from t2ilib.tracking.naming import run_tags, shown_name, telling_fields
from t2ilib.tracking.store import HEARTBEAT, check_store, open_client, tracking_uri

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

SECONDS_BETWEEN_FLUSHES = 5.0
NOTE = "tracking.json"
"""In a run's folder: which MLflow run is its."""
FORKED = "t2ilib.forked_from"
"""Tag of an MLflow run that began at a step of another: which, and at what step."""
ENDED = "t2ilib.ended"
"""Tag of an MLflow run that is not finished: why it ended."""
MAX_METRICS, MAX_PARAMS, MAX_VALUE, MAX_TAG = 1000, 100, 6000, 5000


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


class MlflowTracker:
    """Logs to one MLflow run; metrics are sent in batches, and steps that an earlier attempt logged are not sent again.

    The store is opened, or made, and the run begun, or taken up again, by the first thing that is logged: a training that is
    refused before that makes no store, and leaves what was logged to its folder's run as it is. `results`: where the artifacts of
    a SQLite store lie.
    """

    def __init__(self, run: RunConfig, uri: str, results: Path):
        self.run, self.uri, self.results = run, uri, results
        self.buffer: list = []
        self.flushed = time.monotonic()
        self.logged: dict[str, int] = {}
        self.known: str | None = None
        self.resumed = False
        self.watching = contextlib.ExitStack()

    @functools.cached_property
    def store(self) -> tuple[Any, str]:
        """An MLflow client, and the id of the run's experiment."""
        return open_client(self.uri, self.run.tracking.experiment, self.results)

    @property
    def client(self):
        return self.store[0]

    @property
    def run_id(self) -> str:
        """The MLflow run's id; asking for it begins the run."""
        if self.known is None:
            self.begin()
        return self.known

    def begin(self) -> None:
        """Takes up the run that tracking.json names, if it is of the same settings and still there; otherwise makes one."""
        note, digest = self.run.output / NOTE, self.run.training_digest()
        tags = run_tags(self.run)
        said = read_note(note)
        self.known = known_run(self.client, said, self.uri, digest)
        self.resumed = self.known is not None
        if not self.resumed:
            tags |= {FORKED: said["forked_from"]} if "forked_from" in said else {}
            self.known = self.client.create_run(self.store[1], tags=tags, run_name=self.run.name).info.run_id
            log_config(self.client, self.known, self.run)
        note.parent.mkdir(parents=True, exist_ok=True)
        write_whole(note, json.dumps({"uri": self.uri, "run_id": self.known, "digest": digest}))
        self.client.update_run(self.known, status="RUNNING")
        if self.resumed and ENDED in self.client.get_run(self.known).data.tags:
            self.client.delete_tag(self.known, ENDED)
        self.flush()
        self.watching.enter_context(system_metrics(self.uri, self))

    def end(self, status: str, why: str = "") -> None:
        """Closes the run, if one was begun. `why` it is not finished."""
        self.watching.close()
        if self.known is not None:
            self.flush()
            if why:
                self.client.set_tag(self.known, ENDED, why[:MAX_TAG])
            self.client.set_terminated(self.known, status=status)

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        if self.known is None:
            self.begin()
        now = int(time.time() * 1000)
        for name, value in values.items():
            name = shown_name(name)
            if step > self.last_step(name):
                self.buffer.append(Metric(name, float(value), now, step))
        if len(self.buffer) >= MAX_METRICS // 2 or time.monotonic() - self.flushed > SECONDS_BETWEEN_FLUSHES:
            self.flush()

    def last_step(self, name: str) -> int:
        """The last step of this metric, as MLflow has it, that an earlier attempt logged; asked once a metric."""
        if name not in self.logged:
            history = self.client.get_metric_history(self.run_id, name) if self.resumed else []
            self.logged[name] = max((metric.step for metric in history), default=-1)
        return self.logged[name]

    def flush(self) -> None:
        from mlflow.entities import RunTag

        for start in range(0, len(self.buffer), MAX_METRICS):
            self.client.log_batch(self.run_id, metrics=self.buffer[start : start + MAX_METRICS])
        self.client.log_batch(self.run_id, tags=[RunTag(HEARTBEAT, str(int(time.time())))])
        self.buffer, self.flushed = [], time.monotonic()

    def log_image(self, image: "Image", key: str, step: int) -> None:
        if "/" in key:
            raise ValueError(f"image key {key!r}: MLflow's image series cannot have a / in their key")
        if self.known is None:
            self.begin()
        if not any(re.search(rf"/{re.escape(key)}\Wstep\W{step}\W", path) for path in self.images):
            self.client.log_image(self.run_id, image, key=key, step=step)
            self.images.append(f"images/{key}+step+{step}+")

    @functools.cached_property
    def images(self) -> list[str]:
        """Artifact paths of the images that this and earlier attempts logged, or how they begin."""
        return [a.path for a in self.client.list_artifacts(self.run_id, "images")] if self.resumed else []

    def log_datasets(self, training: Any, held_out: Any) -> None:
        """Both data sets as inputs of the run, with digest and number of pictures, and beside them the pictures of the class."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = []
        contexts = ("training", "prior") if training.parts else ("training",)
        parts = zip(contexts, training.parts or (training,), strict=True)
        for context, data in (*parts, ("validation", held_out)):
            if len(data):
                entity = Dataset(
                    name=data.name,
                    digest=data.digest[:36],
                    source_type="local",
                    source=json.dumps({"uri": str(data.records[0].path.parent)}),
                    profile=json.dumps({"num_pictures": len(data), "num_rejected": len(data.rejected)}),
                )
                inputs.append(DatasetInput(entity, [InputTag("mlflow.data.context", context)]))
        self.client.log_inputs(self.run_id, inputs)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """A file, or a folder with all it holds, under `folder` of the run's artifacts."""
        if path.is_dir():
            self.client.log_artifacts(self.run_id, str(path), folder or path.name)
        else:
            self.client.log_artifact(self.run_id, str(path), folder)

    def log_adapter(self, file: Path, base: str, side: int) -> None:
        """The adapter as a model that MLflow's diffusers flavor loads onto `base`, a folder or Hub id."""
        from mlflow.exceptions import MlflowException

        if Path(base).is_file():
            log.warning("the adapter is not logged as an MLflow model: MLflow loads no base from a single file")
            return
        try:
            log_adapter(self.client, self.run_id, file, base, side)
        except MlflowException as error:  # an older server: the training is finished all the same
            log.warning("the adapter is not logged as an MLflow model: %s", error)


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
        uri = tracking_uri(run.tracking.uri, results)
        check_store(uri, run.tracking.experiment)
        trackers.append(MlflowTracker(run, uri, results))
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


def read_note(note: Path) -> dict[str, str]:
    """What tracking.json says; nothing where there is none, or one that is not whole."""
    try:
        return json.loads(note.read_text())
    except (FileNotFoundError, ValueError):
        return {}


def fork_note(folder: Path, step: int) -> str | None:
    """The tracking.json of a run that goes on from `step` of the run in `folder` as an MLflow run of its own, None where that run has
    none."""
    origin = read_note(folder / NOTE).get("run_id")
    return origin and json.dumps({"forked_from": f"{origin} at step {step}"})


def known_run(client, known: dict[str, str], uri: str, digest: str) -> str | None:
    """The id in tracking.json, if that run is of the same settings, and still exists in this store."""
    from mlflow.exceptions import MlflowException

    if known.get("uri") != uri or known.get("digest") != digest:
        return None
    try:
        info = client.get_run(known["run_id"]).info
    except MlflowException:
        return None
    return info.run_id if info.lifecycle_stage == "active" else None


def log_config(client, run_id: str, run: RunConfig) -> None:
    """The whole config as the artifact run.yaml, and as parameters what sets this run apart."""
    from mlflow.entities import Param

    params = [Param(name, str(value)[:MAX_VALUE]) for name, value in telling_fields(run).items()]
    for start in range(0, len(params), MAX_PARAMS):
        client.log_batch(run_id, params=params[start : start + MAX_PARAMS])
    with tempfile.TemporaryDirectory(prefix="t2ilib-") as folder:
        save_run(run, Path(folder) / "run.yaml")
        client.log_artifact(run_id, str(Path(folder) / "run.yaml"))


@contextlib.contextmanager
def system_metrics(uri: str, tracker: MlflowTracker) -> Iterator[None]:
    """CPU, memory, disk, network and GPU use of the machine, sampled by MLflow under `system/`."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(
        tracker.run_id, sampling_interval=5, samples_before_logging=1, resume_logging=tracker.resumed, tracking_uri=uri
    )
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()
