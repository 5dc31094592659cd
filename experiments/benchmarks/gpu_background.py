"""Work for the other cores while the GPU is measured: what the CPU gives for the same run, and plans of memory.

Each worker is a process of its own that sees no GPU: what it trains is trained as on a machine without one. Without workers
(a machine with few cores, the tests) the same is done in this process, when it is asked for.
"""

import contextlib
import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

OF_WORKERS = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
"""They see no GPU, do not take each other's cores, and do not compile for minutes what runs for seconds."""


class Background:
    """`submit` begins to work and gives what asks for the result; `apart` works in a fresh process that sees the GPU, and waits."""

    def __init__(self, workers: int):
        self.workers = workers
        self.pool = executor(workers) if workers else None

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        if self.pool is None:
            return functools.cache(functools.partial(function, *arguments))
        with environment(OF_WORKERS):  # a process is started when there is work for it, and inherits this
            return self.pool.submit(function, *arguments).result

    def apart(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if self.pool is None:
            return function(*arguments)
        one = executor(1)
        try:
            return one.submit(function, *arguments).result()
        finally:
            one.shutdown(wait=False)

    def close(self) -> None:
        """Ends all workers, whatever they are at: what was asked for is there already, and one that hangs must not be waited for."""
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()


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
