"""Work for the other cores while the GPU is measured: what the CPU gives for the same run, and plans of memory.

Each worker is a process of its own that sees no GPU: what it trains is trained as on a machine without one. Without workers
(a machine with few cores, the tests) the same is done in this process, when it is asked for.
"""

import contextlib
import functools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

OF_WORKERS = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
"""They see no GPU, do not take each other's cores, and do not compile for minutes what runs for seconds."""
SECONDS_TO_LEAVE = 5.0


class Background:
    """`submit` begins to work, and gives what asks for the result."""

    def __init__(self, workers: int):
        self.workers = workers
        self.pool = executor(workers) if workers else None
        self.children: set[multiprocessing.process.BaseProcess] = set()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        if self.pool is None:
            return functools.cache(functools.partial(function, *arguments))
        others = set(multiprocessing.active_children())
        with environment(OF_WORKERS):  # a process is started when there is work for it, and inherits this
            result = self.pool.submit(function, *arguments).result
        self.children |= set(multiprocessing.active_children()) - others
        return result

    def close(self) -> None:
        """Ends its workers, soon: what was asked for is there already, and one that hangs must not be waited for."""
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)
            end(set(multiprocessing.active_children()) & self.children, SECONDS_TO_LEAVE)


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What it returns in a process of its own, which sees the GPU; waits for it, and ends it should the waiting be interrupted."""
    others, one = set(multiprocessing.active_children()), executor(1)
    try:
        return one.submit(function, *arguments).result()
    finally:
        one.shutdown(wait=False)
        end(set(multiprocessing.active_children()) - others, SECONDS_TO_LEAVE)  # what it held on the GPU is free then


def end(children: Iterable[multiprocessing.process.BaseProcess], seconds: float) -> None:
    """Waits a little for processes that were told that there is no more work, and ends those that go on."""
    until = time.monotonic() + seconds
    for child in children:
        child.join(max(0.0, until - time.monotonic()))
        child.terminate()
        while child.is_alive():  # its pool waits for it too, and who comes second learns of its end a moment later
            time.sleep(0.001)


def executor(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


@contextlib.contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
