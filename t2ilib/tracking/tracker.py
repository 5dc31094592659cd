"""What a run logs. The loop knows only `Tracker`; without an experiment it gets one that does nothing.

One MLflow run a training run: `open_tracker` starts it, or takes it up again where `tracking.json` in the output folder
says which it was, so a resumed training continues its curves. Leaving the scope ends the run as FINISHED, FAILED (an
exception) or KILLED (a signal). A killed process cannot say so: the heartbeat tag tells, and `store.reap_stale_runs` closes such
runs.
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
from t2ilib.tracking.models import log_adapter
from t2ilib.tracking.store import HEARTBEAT, check_store, open_client, tracking_uri

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

SECONDS_BETWEEN_FLUSHES = 5.0
MAX_METRICS, MAX_PARAMS, MAX_VALUE = 1000, 100, 6000

ALWAYS = (
    "seed",
    "model.base",
    "model.quantization",
    "adapter.kind",
    "adapter.rank",
    "adapter.targets",
    "data.resolution",
    "optimizer.name",
    "optimizer.learning_rate",
    "training.trains",
    "training.steps",
    "training.batch_size",
)
"""Parameters that are logged also where they are RunConfig's defaults: what runs are compared by."""

FIRST = "A first look"
FIRST_METRICS = (
    "loss",
    "held_out_loss",
    "concept/all",
    "base_kept/all",
    "clip_score/concept",
    "clip_score/prompts",
    "steps_per_second",
    "peak_device_mib",
    "peak_process_mib",
    "adapter_mib",
    "trainable_parameters",
)
"""Metrics that stand first in MLflow's charts, in a section that is called so.

A section is what stands before the last slash of a name. The charts sort sections by name, whatever its letters' case, and put
metrics without a slash behind them all (MLflow 3.17), so what should come first needs a name that does.
"""


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
        note, digest = self.run.output / "tracking.json", self.run.training_digest()
        tags = run_tags(self.run)
        self.known = known_run(self.client, note, self.uri, digest)
        self.resumed = self.known is not None
        if not self.resumed:
            self.known = self.client.create_run(self.store[1], tags=tags, run_name=self.run.name).info.run_id
            log_config(self.client, self.known, self.run)
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps({"uri": self.uri, "run_id": self.known, "digest": digest}))
        self.client.update_run(self.known, status="RUNNING")
        self.flush()
        self.watching.enter_context(system_metrics(self.uri, self))

    def end(self, status: str) -> None:
        """Closes the run, if one was begun."""
        self.watching.close()
        if self.known is not None:
            self.flush()
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
        if self.resumed and any(re.search(rf"{key}\Wstep\W{step}\W", path) for path in self.images()):
            return
        self.client.log_image(self.run_id, image, key=key, step=step)

    def images(self) -> list[str]:
        """Artifact paths of the images that are there."""
        return [artifact.path for artifact in self.client.list_artifacts(self.run_id, "images")]

    def log_datasets(self, training: Any, held_out: Any) -> None:
        """Both data sets as inputs of the run, with digest and number of pictures."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = []
        for data, context in ((training, "training"), (held_out, "validation")):
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


@contextlib.contextmanager
def open_tracker(run: RunConfig, results: Path | None = None) -> Iterator[Tracker]:
    """The tracker of a run for as long as the scope lasts; NullTracker where `run.tracking.experiment` is None.

    `results`: where the default store lies; the output folder's parent without it. Raises ConfigError for a store that cannot be
    used, before it is used.
    """
    if run.tracking.experiment is None:
        yield NullTracker()
        return
    results = results or run.output.absolute().parent
    uri = tracking_uri(run.tracking.uri, results)
    check_store(uri, run.tracking.experiment)
    tracker, status = MlflowTracker(run, uri, results), "FINISHED"
    try:
        with terminated_as_exit():
            yield tracker
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    except BaseException:
        status = "FAILED"
        raise
    finally:
        tracker.end(status)


def shown_name(metric: str) -> str:
    """A metric's name in MLflow, by which it has its place in the charts."""
    return f"{FIRST}/{metric.replace('/', '_')}" if metric in FIRST_METRICS else metric


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


def known_run(client, note: Path, uri: str, digest: str) -> str | None:
    """The id in tracking.json, if that run is of the same settings, and still exists in this store."""
    from mlflow.exceptions import MlflowException

    if not note.exists():
        return None
    known = json.loads(note.read_text())
    if known["uri"] != uri or known.get("digest") != digest:
        return None
    try:
        info = client.get_run(known["run_id"]).info
    except MlflowException:
        return None
    return info.run_id if info.lifecycle_stage == "active" else None


def run_tags(run: RunConfig) -> dict[str, str]:
    """What the UI groups by: seed, method, base, and whatever the study adds (study, preset, variant)."""
    adapter = run.adapter
    tags = {
        "seed": str(run.seed),
        "base": run.model.base,
        "quantization": run.model.quantization,
        "method": adapter.kind if adapter else run.trains,
        "optimizer": run.optimizer.name,
    }
    parent = {"mlflow.parentRunId": run.tracking.parent_run_id} if run.tracking.parent_run_id else {}
    return tags | parent | run.tracking.tags


def log_config(client, run_id: str, run: RunConfig) -> None:
    """The whole config as the artifact run.yaml, and as parameters what sets this run apart."""
    from mlflow.entities import Param

    params = [Param(name, str(value)[:MAX_VALUE]) for name, value in telling_fields(run).items()]
    for start in range(0, len(params), MAX_PARAMS):
        client.log_batch(run_id, params=params[start : start + MAX_PARAMS])
    with tempfile.TemporaryDirectory(prefix="t2ilib-") as folder:
        save_run(run, Path(folder) / "run.yaml")
        client.log_artifact(run_id, str(Path(folder) / "run.yaml"))


def telling_fields(run: RunConfig) -> dict[str, Any]:
    """`section.field` -> value of those that are not RunConfig's default, and of ALWAYS; none of sections that the run has not."""
    fields = {}
    for name, value in run.flat().items():
        section, _, field = name.partition(".")
        part = getattr(run, section)
        if part is None:
            continue
        default = type(part)().model_dump(mode="json")[field] if field else RunConfig.model_fields[section].default
        if name in ALWAYS or value != default:
            fields[name] = value
    return fields


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
