"""MLflow's UI on the store in use, on this machine alone: the server has no login, and must not be reached from elsewhere.

A server that runs already (MLFLOW_TRACKING_URI) is not started again: its address is told. Leaves out stores that are not there: looking
makes none.
"""

import contextlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from t2ilib.config import ConfigError
from t2ilib.tracking.store import connected, database_file, quiet_mlflow, tracking_uri
from t2ilib.tracking.views import RUNS, SHARED, TRAINING, view_address

HOST, PORT = "127.0.0.1", 5000
SECONDS_TO_START = 120.0


def open_ui(results: Path, uri: str | None = None, port: int | None = None, say: Callable[[str], None] = print) -> int:
    """Serves MLflow's UI until it is interrupted; returns the server's exit status, 0 for one that runs elsewhere.

    `results`: where the default store lies. `port`: PORT, or a free one, where none is asked for. Raises ConfigError for a store that is not
    there or cannot be used, for a port that is taken, and for a server that does not start.
    """
    store = tracking_uri(uri, Path(results))
    file = require_store(store)
    studies = study_views(store, file)
    if is_server(store):
        tell(store.rstrip("/"), studies, say)
        return 0
    chosen = choose_port(port)
    quiet_mlflow()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store]
    command += ["--host", HOST, "--port", str(chosen), "--workers", "1"]
    with tempfile.TemporaryFile() as said, running(command, said) as server:
        address = f"http://{HOST}:{chosen}"
        wait_for(address, server, said)
        tell(address, studies, say)
        say("Ctrl-C ends it")
        return server.wait()


def is_server(store: str) -> bool:
    return store.startswith(("http://", "https://"))


def require_store(store: str) -> Path | None:
    """The file of a SQLite store. Raises ConfigError for a store on this machine that is not there."""
    file = database_file(store)
    place = file or (Path(store.removeprefix("file://")) if "://" not in store or store.startswith("file:") else None)
    if place is not None and not place.exists():
        raise ConfigError(
            f"there is no MLflow store at {place}: the first run that logs something makes it. Say where yours is with --results, --uri or"
            " MLFLOW_TRACKING_URI"
        )
    return file


def study_views(store: str, file: Path | None) -> dict[str, str]:
    """Study and preset -> what follows the server's address, to its runs side by side."""
    with connected(store, file) as client:
        return {
            name.removeprefix(SHARED).removesuffix(RUNS): view_address(
                experiment.experiment_id, name.removeprefix(SHARED)
            )
            for experiment in client.search_experiments()
            for name in sorted(experiment.tags)
            if name.startswith(SHARED) and name.endswith(RUNS)
        }


def tell(address: str, studies: dict[str, str], say: Callable[[str], None]) -> None:
    say(f"MLflow UI: {address}/#/experiments?{TRAINING}")
    for name, view in studies.items():
        say(f"  {name}: {address}/{view}")


def choose_port(port: int | None) -> int:
    """`port`, where it is free, else ConfigError; without one PORT, or one that the system finds."""
    for wanted in [port] if port is not None else [PORT, 0]:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind((HOST, wanted))
                return probe.getsockname()[1]
    raise ConfigError(f"port {port} of {HOST} is taken: choose another with --port, or leave it out to have one found")


@contextlib.contextmanager
def running(command: list[str], said: IO[bytes]) -> Iterator[subprocess.Popen]:
    """A process that ends with the scope; Ctrl-C and SIGTERM end both in good order."""
    process = subprocess.Popen(command, stdout=said, stderr=said)
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    try:
        yield process
    except KeyboardInterrupt:
        raise SystemExit(0) from None
    finally:
        signal.signal(signal.SIGTERM, before)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()


def wait_for(address: str, server: subprocess.Popen, said: IO[bytes]) -> None:
    """Until the server answers; raises ConfigError, with the last that it said, where it does not."""
    until = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < until and server.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=2):
            return
        time.sleep(0.2)
    said.seek(0)
    last = " ".join(said.read().decode(errors="replace").split())[-300:]
    raise ConfigError(f"MLflow's server did not start on {address}: {last or 'it said nothing'}")
