"""One MLflow run a training run: begun, or taken up again where `tracking.json` in the run's folder says which it was.

A run can begin only where the store answers. From then on the store may come and go (`tracking.outbox`), also between two starts: a run
that has begun goes on without it.
"""

import contextlib
import itertools
import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2ilib.config import ConfigError, RunConfig
from t2ilib.runfile import written_run
from t2ilib.text import write_whole
from t2ilib.tracking.models import NO_MODEL, why_unloadable
from t2ilib.tracking.naming import run_tags, shown_name, telling_fields
from t2ilib.tracking.outbox import SECONDS_AT_END, SECONDS_TO_ANSWER, Outbox
from t2ilib.tracking.sending import ENDED, MAX_METRICS, is_refusal, store_errors
from t2ilib.tracking.store import HEARTBEAT, check_store, database_file, open_client, patience

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

SECONDS_BETWEEN_FLUSHES, SECONDS_BETWEEN_READINGS = 5.0, 5.0
SYSTEM = "system/"
"""What names of the machine's metrics begin with, as MLflow's UI expects it."""
NOTE = "tracking.json"
"""In a run's folder: which MLflow run is its."""
FORKED = "t2ilib.forked_from"
"""Tag of an MLflow run that began at a step of another: which, and at what step."""
TO_THE_END = ("FINISHED", "FAILED")
"""Statuses of runs that have time to wait for a store; others were told to stop."""


class MlflowTracker:
    """Logs to one MLflow run; metrics are sent in batches, and steps that an earlier attempt logged are not sent again.

    The store is opened, or made, and the run begun, or taken up again, by the first thing that is logged: a training that is
    refused before that makes no store, and leaves what was logged to its folder's run as it is. `results`: where the artifacts of
    a SQLite store lie.
    """

    def __init__(self, run: RunConfig, uri: str, results: Path):
        self.run, self.uri, self.results = run, uri, results
        self.flushed = time.monotonic()
        self.begun: Outbox | None = None
        self.resumed = False
        self.watching = contextlib.ExitStack()

    @property
    def outbox(self) -> Outbox:
        """Asking for it begins the run."""
        if self.begun is None:
            self.begun = self.begin()
            self.watching.enter_context(system_metrics(self))
        return self.begun

    @property
    def run_id(self) -> str:
        """The MLflow run's id; asking for it begins the run."""
        return self.outbox.run_id

    @property
    def client(self) -> Any:
        return self.outbox.destination().client

    def check(self) -> None:
        """Raises ConfigError for a store that will not take the run; but one that has begun goes on where a server does not answer."""
        try:
            check_store(self.uri, self.run.tracking.experiment)
        except ConfigError as error:
            if not self.goes_on(read_note(self.run.output / NOTE)):
                raise
            log.warning("%s. The run has begun, and goes on without it", error)

    def goes_on(self, said: dict[str, str]) -> bool:
        """Whether tracking.json names a run of these settings on the server that is asked."""
        ours = (said.get("uri"), said.get("digest")) == (self.uri, self.run.training_digest())
        return ours and "run_id" in said and database_file(self.uri) is None and not self.uri.startswith("file:")

    def begin(self) -> Outbox:
        """Takes up the run that tracking.json names, if it is of the same settings and still there; otherwise makes one."""
        note, digest = self.run.output / NOTE, self.run.training_digest()
        said = read_note(note)
        try:
            client, experiment = open_client(self.uri, self.run.tracking.experiment, self.results)
            known = known_run(client, said, self.uri, digest)
        except (ConfigError, *store_errors()):
            if not self.goes_on(said):
                raise
            client, known = None, said["run_id"]
        self.resumed = known is not None
        run_id = known or self.make_run(client, experiment, said.get("forked_from"))
        note.parent.mkdir(parents=True, exist_ok=True)
        write_whole(note, json.dumps({"uri": self.uri, "run_id": run_id, "digest": digest}))
        outbox = Outbox(self.run.output, self.uri, run_id, client)
        if not self.resumed:
            outbox.add("params", values={name: str(value) for name, value in telling_fields(self.run).items()})
            outbox.add("text", text=written_run(self.run), name="run.yaml")
        outbox.add("start")
        outbox.send(at_once=True)
        return outbox

    def make_run(self, client, experiment: str, forked_from: str | None) -> str:
        tags = run_tags(self.run) | ({FORKED: forked_from} if forked_from else {})
        tags[HEARTBEAT] = str(int(time.time()))
        return client.create_run(experiment, tags=tags, run_name=self.run.name).info.run_id

    def end(self, status: str, why: str = "") -> None:
        """Closes the run, if one was begun. `why` it is not finished. Says what did not reach MLflow."""
        self.watching.close()
        if self.begun is not None:
            if why:
                self.begun.add("tags", values={ENDED: why})
            self.begun.add("end", status=status, time=int(time.time() * 1000))
            if told := self.begun.close(SECONDS_AT_END if status in TO_THE_END else 0.0):
                log.warning("%s", told)

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        outbox, now = self.outbox, int(time.time() * 1000)
        told = [[shown_name(name), float(value), now, step] for name, value in values.items()]
        for start in range(0, len(told), MAX_METRICS):
            outbox.add("metrics", values=told[start : start + MAX_METRICS], again=self.resumed)
        if time.monotonic() - self.flushed > SECONDS_BETWEEN_FLUSHES:
            self.flush()

    def flush(self) -> None:
        """Sends what waits, and at least a sign of life."""
        self.outbox.add("metrics", values=[], again=self.resumed)
        self.outbox.send()
        self.flushed = time.monotonic()

    def log_image(self, image: "Image", key: str, step: int) -> None:
        if "/" in key:
            raise ValueError(f"image key {key!r}: MLflow's image series cannot have a / in their key")
        self.outbox.add("image", picture=image, key=key, step=step, again=self.resumed)
        self.flush()

    def log_datasets(self, training: Any, held_out: Any) -> None:
        """Both data sets as inputs of the run, with digest and number of pictures, and beside them the pictures of the class."""
        contexts = ("training", "prior") if training.parts else ("training",)
        parts = zip(contexts, training.parts or (training,), strict=True)
        inputs = {
            context: {
                "name": data.name,
                "digest": data.digest[:36],
                "source_type": "local",
                "source": json.dumps({"uri": str(data.records[0].path.parent)}),
                "profile": json.dumps({"num_pictures": len(data), "num_rejected": len(data.rejected)}),
            }
            for context, data in (*parts, ("validation", held_out))
            if len(data)
        }
        self.outbox.add("datasets", inputs=inputs)
        self.flush()

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """A file, or a folder with all it holds, under `folder` of the run's artifacts."""
        self.outbox.add("artifact", path=str(path.absolute()), under=folder)
        self.flush()

    def log_adapter(self, file: Path, base: str, side: int) -> None:
        """The adapter as a model that MLflow's diffusers flavor loads onto `base`, a folder or Hub id; where it would not draw as trained,
        a tag and a line say why there is none."""
        if reason := why_unloadable(self.run, base):
            log.warning("the adapter is not logged as an MLflow model: %s", reason)
            self.outbox.add("tags", values={NO_MODEL: reason})
        else:
            self.outbox.add("adapter", path=str(file.absolute()), base=base, side=side)
        self.flush()


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
    """The id in tracking.json, if that run is of the same settings, and still exists in this store. Raises what a store raises that
    does not answer."""
    if known.get("uri") != uri or known.get("digest") != digest:
        return None
    try:
        info = client.get_run(known["run_id"]).info
    except store_errors() as error:
        if not is_refusal(error):
            raise
        return None
    return info.run_id if info.lifecycle_stage == "active" else None


@contextlib.contextmanager
def system_metrics(tracker: MlflowTracker) -> Iterator[None]:
    """CPU, memory, disk, network and GPU use of the machine under `system/`, read by MLflow's monitors in a thread and sent by the
    tracker: MLflow's own thread ends at the first request that fails."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    outbox, over = tracker.outbox, threading.Event()
    machine = SystemMetricsMonitor(outbox.run_id, sampling_interval=SECONDS_BETWEEN_READINGS, tracking_uri=tracker.uri)
    first = 1 + max((step for name, step in known_steps(tracker).items() if name.startswith(SYSTEM)), default=-1)

    def watch() -> None:
        for step in itertools.count(first):
            machine.collect_metrics()
            if over.wait(machine.sampling_interval):
                return
            now = int(time.time() * 1000)
            outbox.add(
                "metrics",
                values=[
                    [SYSTEM + name, float(value), now, step] for name, value in machine.aggregate_metrics().items()
                ],
            )
            for monitor in machine.monitors:
                monitor.clear_metrics()

    thread = threading.Thread(target=watch, daemon=True, name="t2ilib-system-metrics")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def known_steps(tracker: MlflowTracker) -> dict[str, int]:
    """Metric -> its last step in MLflow, of a run that was taken up again; {} where that cannot be asked now."""
    if not tracker.resumed:
        return {}
    with contextlib.suppress(*store_errors()), patience(SECONDS_TO_ANSWER):
        return tracker.outbox.destination().steps
    return {}
