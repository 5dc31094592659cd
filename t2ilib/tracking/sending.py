"""How what a run logs is sent to its MLflow run: a function for each kind of thing, and which errors mean what.

A thing is a dictionary of JSON values (a picture that is not on disk yet aside), so that it can wait in a file. Any of them may be sent
again: a server that dies may have taken what it never confirmed. Metrics keep their time, by which MLflow knows them again; pictures are
looked for by name and step; all else is written over. `again` marks what an earlier attempt may have logged by other means: metrics of steps
that MLflow has are left out, as they were not computed anew.
"""

import contextlib
import functools
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from t2ilib.tracking.models import log_adapter
from t2ilib.tracking.naming import shown_name
from t2ilib.tracking.store import HEARTBEAT

log = logging.getLogger(__name__)

MAX_METRICS, MAX_PARAMS, MAX_VALUE, MAX_TAG = 1000, 100, 6000, 5000
ENDED = "t2ilib.ended"
"""Tag of an MLflow run that is not finished: why it ended."""
REFUSALS = (400, 404, 409, 413, 422)
"""HTTP statuses that say that the thing is the trouble, not the server: the others behind it need not wait."""
Thing = dict[str, Any]


class Destination:
    """An MLflow run, and what is known of it. `folder`: where the paths of things begin."""

    def __init__(self, client, run_id: str, folder: Path):
        self.client, self.run_id, self.folder = client, run_id, folder

    @functools.cached_property
    def steps(self) -> dict[str, int]:
        """Metric -> its last step in MLflow, in one question."""
        return {metric.key: metric.step for metric in self.client.get_run(self.run_id).data.to_proto().metrics}

    @functools.cached_property
    def images(self) -> list[str]:
        return [artifact.path for artifact in self.client.list_artifacts(self.run_id, "images")]

    def has_image(self, key: str, step: int) -> bool:
        """Whether both of its files, the picture and the small one beside it, are there."""
        name = re.compile(rf"/{re.escape(key)}\Wstep\W{step}\W")
        return len([path for path in self.images if name.search(path)]) > 1


def send_metrics(to: Destination, thing: Thing) -> None:
    from mlflow.entities import Metric, RunTag

    metrics = [Metric(*told) for told in thing["values"]]
    if thing.get("again"):
        metrics = [metric for metric in metrics if metric.step > to.steps.get(metric.key, -1)]
    for start in range(0, max(1, len(metrics)), MAX_METRICS):
        beat = RunTag(HEARTBEAT, str(int(time.time())))
        to.client.log_batch(to.run_id, metrics=metrics[start : start + MAX_METRICS], tags=[beat])


def send_corrections(to: Destination, thing: Thing) -> None:
    """Metrics of a run that was measured again, those that MLflow has otherwise: the run itself logs nothing again at a step that it has
    logged."""
    from mlflow.entities import Metric

    known = to.client.get_run(to.run_id).data.metrics
    told = {shown_name(name): value for name, value in thing["values"].items()}
    metrics = [
        Metric(name, value, thing["time"], thing["step"]) for name, value in told.items() if known.get(name) != value
    ]
    to.client.log_batch(to.run_id, metrics=metrics)


def send_params(to: Destination, thing: Thing) -> None:
    from mlflow.entities import Param

    params = [Param(name, value[:MAX_VALUE]) for name, value in thing["values"].items()]
    for start in range(0, len(params), MAX_PARAMS):
        to.client.log_batch(to.run_id, params=params[start : start + MAX_PARAMS])


def send_tags(to: Destination, thing: Thing) -> None:
    from mlflow.entities import RunTag

    to.client.log_batch(to.run_id, tags=[RunTag(name, value[:MAX_TAG]) for name, value in thing["values"].items()])


def send_image(to: Destination, thing: Thing) -> None:
    """`picture`, in memory, or the PNG file `path`."""
    from PIL import Image

    key, step = thing["key"], thing["step"]
    if (thing.get("again") or thing.get("kept")) and to.has_image(key, step):
        return
    with (
        contextlib.nullcontext(thing["picture"])
        if "picture" in thing
        else Image.open(to.folder / thing["path"]) as picture
    ):
        to.client.log_image(to.run_id, picture, key=key, step=step)
    if thing.get("again"):
        to.images.extend([f"images/{key}+step+{step}+"] * 2)


def send_artifact(to: Destination, thing: Thing) -> None:
    """A file, or a folder with all it holds; raises FileNotFoundError for what is not there any more."""
    path = to.folder / thing["path"]
    if path.is_dir():
        to.client.log_artifacts(to.run_id, str(path), thing["under"] or path.name)
    elif path.exists():
        to.client.log_artifact(to.run_id, str(path), thing["under"])
    else:
        raise FileNotFoundError(f"{path} is not there any more")


def send_text(to: Destination, thing: Thing) -> None:
    to.client.log_text(to.run_id, thing["text"], thing["name"])


def send_datasets(to: Destination, thing: Thing) -> None:
    """`inputs`: context -> the fields of an MLflow data set."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    tagged = [
        DatasetInput(Dataset(**fields), [InputTag("mlflow.data.context", context)])
        for context, fields in thing["inputs"].items()
    ]
    to.client.log_inputs(to.run_id, tagged)


def send_adapter(to: Destination, thing: Thing) -> None:
    """An older server has no models: the training is finished all the same."""
    from mlflow.exceptions import MlflowException

    try:
        log_adapter(to.client, to.run_id, to.folder / thing["path"], thing["base"], thing["side"])
    except MlflowException as error:
        if not is_refusal(error):
            raise
        log.warning("the adapter is not logged as an MLflow model: %s", error)


def send_start(to: Destination, thing: Thing) -> None:
    to.client.update_run(to.run_id, status="RUNNING")
    if ENDED in to.client.get_run(to.run_id).data.tags:
        to.client.delete_tag(to.run_id, ENDED)


def send_end(to: Destination, thing: Thing) -> None:
    to.client.set_terminated(to.run_id, status=thing["status"], end_time=thing["time"])


SENDERS: dict[str, Callable[[Destination, Thing], None]] = {
    "metrics": send_metrics,
    "corrections": send_corrections,
    "params": send_params,
    "tags": send_tags,
    "image": send_image,
    "artifact": send_artifact,
    "text": send_text,
    "datasets": send_datasets,
    "adapter": send_adapter,
    "start": send_start,
    "end": send_end,
}


def store_errors() -> tuple[type[Exception], ...]:
    """What MLflow's client raises of a store that does not answer, or does not want what it is sent."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, OSError  # of which requests' errors are


def is_refusal(error: Exception) -> bool:
    """Whether an error is about the thing, and would be the same from a server that is well."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    if isinstance(error, MlflowException):
        return error.get_http_status_code() in REFUSALS
    if isinstance(error, RequestException):
        return error.response is not None and error.response.status_code in REFUSALS
    return isinstance(error, FileNotFoundError)
