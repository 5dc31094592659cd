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
from t2ilib.memory import existing, require_disk

HEARTBEAT = "t2ilib.heartbeat"

DATABASE_BYTES = 32 * 2**20
"""What is asked of the disk for a new store: its tables, and the first pictures."""
SECONDS_UNTIL_STALE = 900.0
SECONDS_TO_CONNECT, RETRIES = 10, 2
"""Of a server, before anything has begun: MLflow's own client would try for four minutes before it says that there is none."""


def quiet_mlflow() -> None:
    """Keeps schema migrations, bars of artifacts and addresses off the screen and telemetry off; called before mlflow is imported."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    for name in (
        "alembic",
        "mlflow.store.db.utils",
        "mlflow.tracking.fluent",
        "mlflow.system_metrics.system_metrics_monitor",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)


def tracking_uri(uri: str | None, results: Path) -> str:
    """`uri`, else MLFLOW_TRACKING_URI, else SQLite as `results`/mlflow.db by absolute path."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(results / "mlflow.db")


def sqlite_uri(file: Path) -> str:
    """The URI of a SQLite store, whatever its path holds."""
    path = str(file.absolute())
    if not set(path) & set("?%"):
        return f"sqlite:///{path}"
    from sqlalchemy import URL

    # the driver is named, because MLflow makes the folder of a plain sqlite:/// as it is spelled there, with every %3F
    return URL.create("sqlite+pysqlite", database=path).render_as_string()


def database_file(uri: str) -> Path | None:
    """The file of a SQLite store; None for another kind of store."""
    if not uri.startswith("sqlite"):
        return None
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(uri)
    except ArgumentError:
        raise ConfigError(
            f"the MLflow store {uri!r} is no SQLite URI: write sqlite:///, then the file's path"
        ) from None
    in_file = url.database not in (None, "", ":memory:") and "uri" not in url.query
    return Path(url.database).absolute() if in_file else None


def check_store(uri: str, experiment: str) -> None:
    """Raises ConfigError for a store that will not take `experiment`, as `open_client` would, but makes nothing: neither a new
    store nor an experiment."""
    file = database_file(uri)
    if file is not None and not file.exists():
        require_place(file)
    else:
        with connected(uri, file) as client:
            find_experiment(client, experiment)


def open_client(uri: str, experiment: str, results: Path):
    """An MLflow client and the id of `experiment`, which is made if need be. Doing this once before processes fan out
    creates the database.

    Raises ConfigError in one sentence for a store that cannot be reached or was left half made, a full disk, and an experiment that was deleted.
    """
    file = database_file(uri)
    if file is not None and not file.exists():
        make_database(file)
    with connected(uri, file) as client:
        found = find_experiment(client, experiment)
        if found is None:
            from mlflow.exceptions import MlflowException

            location = (results / "mlflow-artifacts").absolute().as_uri() if file is not None else None
            try:
                found = client.create_experiment(experiment, artifact_location=location)
            except MlflowException:  # another process made it in between
                found = find_experiment(client, experiment)
    return client, found


def find_experiment(client, name: str) -> str | None:
    """The id of an experiment, None where there is none; raises ConfigError for one that was deleted."""
    found = client.get_experiment_by_name(name)
    if found is not None and found.lifecycle_stage != "active":
        raise ConfigError(
            f"the MLflow experiment {name!r} was deleted: restore it (`mlflow experiments restore -x {found.experiment_id}`), or"
            " choose another tracking.experiment"
        )
    return found and found.experiment_id


def require_place(file: Path) -> None:
    """Raises ConfigError where a new store could not be made for want of room or permission."""
    require_disk(
        file.parent, DATABASE_BYTES, "a new MLflow store and what goes with it", "free some, or set tracking.uri"
    )
    folder = existing(file.parent)
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"the MLflow store {file} cannot be made: {folder} must not be written to; set tracking.uri")


def make_database(file: Path) -> None:
    """A new SQLite store: made beside its place and named when it is whole, so that what is there is never half of one."""
    quiet_mlflow()
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    require_place(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}-{os.getpid()}")
    try:
        store = SqlAlchemyStore(sqlite_uri(draft), (file.parent / "mlruns").as_uri())
        store.engine.dispose()
        with contextlib.suppress(FileExistsError):  # another process was faster: its store is the store
            os.link(draft, file)
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def patience(seconds: int, retries: int = 0) -> Iterator[None]:
    """How long a server may take to answer a request within the scope, and how often it is asked once more; what the user has set in the
    environment stays. MLflow takes both from there alone."""
    wanted = {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(seconds), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries)}
    ours = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


@contextlib.contextmanager
def connected(uri: str, file: Path | None) -> Iterator:
    """An MLflow client. What MLflow says, within the scope, of a store that does not work is raised as a ConfigError that says
    what to do. `file`: that of a SQLite store."""
    quiet_mlflow()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        with patience(SECONDS_TO_CONNECT, RETRIES):
            yield MlflowClient(uri)
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
