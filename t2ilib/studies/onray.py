"""A study's notebooks on a Ray cluster: one actor a run, which has its share of a machine, executes the notebook there and ends with it.

The study itself stays in one process, which must be on a node of the cluster, and which writes all states and results; workers only execute
notebooks (`bench`), in folders that all nodes share. An actor, and not a bare task, because a run is to be asked for its lines and told to stop
while it lasts. What is lost, a worker or its node, is told by WorkerLost and tried again by the executor, not by Ray, so that it is said, and
counted; that the old notebook has ended by then, `guard` sees to. Leaves out Ray Client (`ray://`), which has no shared folder.
"""

import contextlib
import importlib
import itertools
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import t2ilib
from t2ilib.config import ConfigError
from t2ilib.memory import usable_cores
from t2ilib.studies.bench import Bench
from t2ilib.studies.cards import VISIBLE
from t2ilib.studies.place import Demand, Place, WorkerLost

log = logging.getLogger(__name__)

QUIET = {"RAY_USAGE_STATS_ENABLED": "0"}
"""Nothing is reported to Ray's makers."""
ALONE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on Linux too: nothing listens but on the loopback interface
    "RAY_memory_monitor_refresh_ms": "0",  # which would kill notebooks for the memory that other programs take
    "RAY_worker_niceness": "0",  # notebooks are no less urgent than those of studies that run here
    "RAY_prestart_worker_first_driver": "0",  # a worker is started when there is a run for it
}
"""For a cluster of this machine's own, set before Ray is imported."""
TOKEN = secrets.token_hex(32)
"""By which the processes of a cluster of this machine's own know each other, so that Ray leaves none in the user's home."""
OBJECT_STORE_BYTES = 80 * 2**20
"""About the least that Ray takes: what is sent is text."""
SECONDS_TO_READ, SECONDS_TO_CONNECT = 1.0, 10.0
PASSED_ON = ("T2ILIB_", "HF_HUB_OFFLINE")
"""Beginnings of the variables of this process that kernels on other machines have too. Credentials are not sent: nodes have their own."""
STOPPED = 128 + signal.SIGTERM
REASONS = {
    "ActorDiedError": "it was killed, or its machine is gone",
    "ActorUnavailableError": "its machine does not answer",
    "OutOfMemoryError": "its machine had no memory left",
}
"""Ray's name for what befell a worker -> what to say, for Ray says it at length."""


def import_ray():
    """The package; raises ConfigError where it is not installed."""
    os.environ.update(QUIET)
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(f"--on ray needs Ray: pip install 't2ilib[ray]' ({error})") from None


@contextlib.contextmanager
def on_own_cluster(jobs: int, cards: Sequence[str], demand: Demand) -> Iterator[Place]:
    """A cluster of this machine alone, which nobody else can reach, started and shut down with the scope."""
    folder = tempfile.mkdtemp(
        prefix="t2ilib-ray-", dir="/tmp"
    )  # a socket's path has few letters, and TMPDIR can have many
    token = {} if "RAY_AUTH_MODE" in os.environ else {"RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN", TOKEN)}
    seen = {VISIBLE: ",".join(cards)} if cards else {}
    options = {
        "num_cpus": usable_cores(),
        "num_gpus": len(cards),
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
        "_node_ip_address": "127.0.0.1",
        "_temp_dir": folder,
    }
    try:
        with environment(ALONE | token | seen), connected("local", options) as ray:
            listening = ray.nodes()[0]["NodeManagerAddress"]
            if listening != "127.0.0.1":
                raise ConfigError(
                    f"this process imported Ray before, so its cluster would listen on {listening}: set"
                    " RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 before that, or run the study in another process"
                )
            yield cluster(ray, jobs, demand, "a Ray cluster of this machine alone")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def on_cluster(address: str, demand: Demand) -> Iterator[Place]:
    """The cluster at an address (host:port, or auto), which is left as it is. Raises ConfigError where there is none, and for an MLflow store that its
    machines cannot share."""
    if "://" in address:
        raise ConfigError(
            f"--on ray:{address}: run the study on a node of the cluster, where its folders are: --on ray:auto, or --on ray:HOST:6379"
        )
    require_answer(address)
    with environment({}), connected(address, {}) as ray:
        machines = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
        require_shared_store(demand.uri, len(machines))
        yield cluster(ray, demand.jobs, demand, f"the Ray cluster at {address}, {counted(len(machines), 'machine')}")


def require_answer(address: str) -> None:
    """Raises ConfigError where nobody listens at host:port, which Ray itself would find out within minutes."""
    host, colon, port = address.rpartition(":")
    if address == "auto":
        return
    if not (host and colon and port.isdecimal()):
        raise ConfigError(f"--on ray:{address}: write --on ray:auto, or --on ray:HOST:PORT, such as ray:10.0.0.5:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS_TO_CONNECT).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--on ray:{address}: nobody answers there ({error}): start a cluster (`ray start --head`), or correct the address"
        ) from None


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Adds variables for as long as the scope lasts. What Ray changes in the environment and of SIGTERM is undone with it."""
    before, main = dict(os.environ), threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
        if main:
            signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def connected(address: str, options: dict[str, Any]) -> Iterator[Any]:
    """The package, connected to a cluster for as long as the scope lasts; what it has to say goes to its own files."""
    ray = import_ray()
    if ray.is_initialized():
        raise ConfigError("this process is connected to a Ray cluster already: call ray.shutdown() first")
    try:
        ray.init(address, logging_level=logging.ERROR, log_to_driver=False, **options)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        ray.shutdown()
        raise ConfigError(
            f"--on ray: no connection to a Ray cluster at {address} ({first_line(error)}): start one (`ray start --head`), run the study on a node"
            " of it, and where it asks for a token, set RAY_AUTH_MODE=token"
        ) from None
    try:
        with hushed():
            yield ray
    finally:
        ray.shutdown()


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Ray prints what it hears of nodes that die, with the end of their logs, and has no setting against it; here the run says that."""
    there = importlib.import_module("ray._private.worker")
    printing = there.print_to_stdstream
    there.print_to_stdstream = lambda data, **_: log.debug("Ray: %s", data)
    try:
        yield
    finally:
        there.print_to_stdstream = printing


def cluster(ray, jobs: int | None, demand: Demand, name: str) -> Place:
    """What a study needs to know of a cluster: who has what of which machine."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    jobs, num_gpus, num_cpus = shares(nodes, jobs, demand.per_card)
    sharing = demand.per_card if num_gpus else round(max(node.get("CPU", 1) for node in nodes) / (num_cpus or 1))
    resources = {"num_gpus": num_gpus, "num_cpus": num_cpus}
    has = f"{num_gpus:g} GPU and " * bool(num_gpus) + counted(num_cpus, "core")
    about = f"on {name}: {counted(jobs, 'notebook')} at a time, each with {has}"

    def ask(question: Callable[..., Any], *arguments: Any) -> Any:
        return got(ray, ray.remote(max_retries=0, **resources)(question).remote(*arguments))

    def execute(*asked: Any) -> tuple[int, str]:
        return execute_there(ray, ray.remote(**resources)(Bench).remote(), *asked)

    return Place(jobs, execute, ask, max(1, sharing), (), max(1, int(num_cpus)), about)


def counted(number: float, what: str) -> str:
    return f"{number:g} {what}{'s' * (number != 1)}"


def shares(nodes: Sequence[Mapping[str, float]], jobs: int | None, per_card: int = 1) -> tuple[int, float, float]:
    """Of nodes with so many CPUs and GPUs: how many notebooks at a time, and how much of a GPU and how many CPUs each has.

    Where there are GPUs, notebooks run on nodes that have some, `per_card` on one, and divide the CPUs there evenly; more `jobs` than that wait,
    or make a cluster grow that can. Otherwise each has as many CPUs as let `jobs` run at a time, one a node unless told.
    """
    places = [(node.get("CPU", 0.0), int(node.get("GPU", 0)) * per_card) for node in nodes]
    if with_cards := [(cpus, slots) for cpus, slots in places if slots]:
        cpus = min(count / slots for count, slots in with_cards)
        return (
            jobs or sum(slots for _, slots in with_cards),
            part(per_card),
            int(cpus) if cpus >= 1 else int(cpus * 10000) / 10000,
        )
    cpus = [count for count, _ in places if count]
    if not cpus:
        raise ConfigError("--on ray: no node of the cluster has a CPU or a GPU to give")
    jobs = jobs or len(cpus)
    whole = (share for share in range(int(max(cpus)), 0, -1) if sum(count // share for count in cpus) >= jobs)
    return (
        jobs,
        0,
        next(whole, None)
        or next(share for share in map(part, itertools.count(2)) if sum(int(count / share) for count in cpus) >= jobs),
    )


def part(number: int) -> float:
    """One of so many that something is divided into, as Ray counts: so many of them are never more than the whole."""
    return int(10000 / number) / 10000


def execute_there(
    ray,
    bench,
    notebook: Path,
    output: Path,
    parameters: Path,
    variables: Mapping[str, str],
    follow: Callable[[str], None],
    started: Callable[[Callable[[], None]], None],
    stopping: Callable[[], bool],
) -> tuple[int, str]:
    """What `notebooks.execute_notebook` does and gives, by a `bench` on the cluster, for whose place it waits. Raises WorkerLost."""
    passed = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
    files = (notebook.absolute(), output.absolute(), parameters.absolute())
    asked = (*files, passed | dict(variables), Path.cwd(), t2ilib.__version__)
    lines: list[str] = []
    try:
        ready = bench.start.remote(*asked)
        while not ray.wait([ready], timeout=SECONDS_TO_READ)[0]:
            if stopping():
                return STOPPED, ""
        got(ray, ready)
        started(lambda: bench.stop.remote())
        code = None
        while code is None:
            more, code = got(ray, bench.read.remote(SECONDS_TO_READ))
            for line in more:
                follow(line)
            lines += more
        return code, "".join(lines)
    finally:
        ray.kill(bench)


def got(ray, answer) -> Any:
    """What Ray gives for an answer; raises what the function raised there, and WorkerLost where there is nobody left to give one."""
    try:
        return ray.get(answer)
    except ray.exceptions.RayTaskError as error:
        raise error.cause or error from None
    except (
        ray.exceptions.RayActorError,
        ray.exceptions.WorkerCrashedError,
        ray.exceptions.NodeDiedError,
        ray.exceptions.OutOfMemoryError,
        ray.exceptions.ObjectLostError,
    ) as error:
        raise WorkerLost(f"its worker was lost ({REASONS.get(type(error).__name__) or first_line(error)})") from None


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".: ")


def require_shared_store(uri: str, machines: int) -> None:
    """Raises ConfigError for an MLflow store that several machines cannot write to."""
    own = uri.startswith(("sqlite", "file:", "/", ".")) or urlsplit(uri).hostname in ("localhost", "127.0.0.1", "::1")
    if machines > 1 and own:
        raise ConfigError(
            f"the MLflow store {uri} is one machine's, and {machines} are to log to it (an SQLite file on shared storage breaks): start an"
            " MLflow server that all of them reach, and set MLFLOW_TRACKING_URI to its address"
        )
