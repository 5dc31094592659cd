"""The MLflow store: where it lies, opening it once before processes fan out, and closing runs that died.

SQLite beside the results is the default; MLFLOW_TRACKING_URI is honoured. No server is ever started here.
"""

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

HEARTBEAT = "t2ilib.heartbeat"

SECONDS_UNTIL_STALE = 900.0


def quiet_mlflow() -> None:
    """Keeps schema migrations off the screen and telemetry off; called before mlflow is imported."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    for name in (
        "alembic",
        "mlflow.store.db.utils",
        "mlflow.tracking.fluent",
        "mlflow.system_metrics.system_metrics_monitor",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)


def tracking_uri(uri: str | None, results: Path) -> str:
    """`uri`, else MLFLOW_TRACKING_URI, else SQLite as `results`/mlflow.db by absolute path."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(results / 'mlflow.db').absolute()}"


def open_client(uri: str, experiment: str, results: Path):
    """An MLflow client and the id of `experiment`, which is made if need be. Doing this once before processes fan out
    creates the database."""
    quiet_mlflow()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        location = (results / "mlflow-artifacts").absolute().as_uri() if uri.startswith("sqlite:") else None
        try:
            return client, client.create_experiment(experiment, artifact_location=location)
        except MlflowException:  # another process made it in between
            found = client.get_experiment_by_name(experiment)
    return client, found.experiment_id


def reap_stale_runs(client, experiment_id: str) -> list[str]:
    """Marks runs as KILLED that say RUNNING but have not shown a heartbeat for 15 minutes; returns their ids."""
    stale = []
    for run in client.search_runs([experiment_id], "attributes.status = 'RUNNING'"):
        beat = run.data.tags.get(HEARTBEAT)
        if beat and time.time() - float(beat) > SECONDS_UNTIL_STALE:
            client.set_terminated(run.info.run_id, status="KILLED")
            stale.append(run.info.run_id)
    return stale


@contextlib.contextmanager
def as_default(uri: str) -> Iterator:
    """The mlflow module with `uri` as its own store for as long as the scope lasts: not all of it takes one as an argument."""
    import mlflow

    before = os.environ.get("MLFLOW_TRACKING_URI")  # which mlflow's own setting overwrites
    mlflow.set_tracking_uri(uri)
    try:
        yield mlflow
    finally:
        mlflow.set_tracking_uri(before)
