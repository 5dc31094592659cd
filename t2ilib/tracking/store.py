"""The MLflow store: where it lies, opening it once before processes fan out, and closing runs that died.

SQLite beside the results is the default; MLFLOW_TRACKING_URI is honoured. No server is ever started here.
"""

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from t2ilib.config import ConfigError
from t2ilib.memory import require_disk

HEARTBEAT = "t2ilib.heartbeat"

DATABASE_BYTES = 32 * 2**20
"""What is asked of the disk for a new store: its tables, and the first pictures."""
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
    creates the database.

    Raises ConfigError in one sentence for a store that cannot be reached or was left half made, a full disk, and an experiment that was deleted.
    """
    quiet_mlflow()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    file = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
    if file is not None and not file.exists():
        make_database(file)
    with one_sentence(uri, file):
        client = MlflowClient(uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            location = (results / "mlflow-artifacts").absolute().as_uri() if file is not None else None
            try:
                return client, client.create_experiment(experiment, artifact_location=location)
            except MlflowException:  # another process made it in between
                found = client.get_experiment_by_name(experiment)
    if found.lifecycle_stage != "active":
        raise ConfigError(
            f"the MLflow experiment {experiment!r} was deleted: restore it (`mlflow experiments restore -x {found.experiment_id}`), or"
            " choose another tracking.experiment"
        )
    return client, found.experiment_id


def make_database(file: Path) -> None:
    """A new SQLite store: made beside its place and named when it is whole, so that what is there is never half of one."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    require_disk(
        file.parent, DATABASE_BYTES, "a new MLflow store and what goes with it", "free some, or set tracking.uri"
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}-{os.getpid()}")
    try:
        store = SqlAlchemyStore(f"sqlite:///{draft}", (file.parent / "mlruns").as_uri())
        store.engine.dispose()
        with contextlib.suppress(FileExistsError):  # another process was faster: its store is the store
            os.link(draft, file)
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def one_sentence(uri: str, file: Path | None) -> Iterator[None]:
    """What MLflow says of a store that does not work as a ConfigError that says what to do."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        remedy = (
            "start the server, or set tracking.uri (MLFLOW_TRACKING_URI) to another, or tracking.experiment to null"
        )
        if file is not None:
            remedy = f"it may have been left half made by a full disk: move {file} away, and a new one is made"
        raise ConfigError(f"the MLflow store {uri} cannot be used ({reason}): {remedy}") from None


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
