"""Work on pictures in threads, ahead of who needs it, in order: what keeps a trainer fed.

Threads are enough, and cost no copies between processes: Pillow lets go of Python's lock while it decodes and scales, so that
two threads decode 12-megapixel JPEGs up to 1.9 times as fast as one (on two idle cores). Results come in the order of the jobs and exceptions at their
place, so that what follows does not depend on the number of workers.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from t2ilib.memory import usable_cores

Job = TypeVar("Job")
Result = TypeVar("Result")
AHEAD = 4
"""Jobs that are begun or done before they are asked for, for each worker."""


class Waiting:
    """Seconds that were spent inside `with waiting:`, by whoever needs data that is not there yet."""

    def __init__(self) -> None:
        self.seconds, self.began = 0.0, 0.0

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds += time.perf_counter() - self.began

    def taken(self) -> float:
        """The seconds since this was last asked."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def decoded(
    jobs: Iterable[Job], function: Callable[[Job], Result], workers: int | None = None, ahead: int | None = None
) -> Iterator[Result]:
    """`function` of every job, in order, computed in `workers` threads (None: one for each usable core).

    From the first result on, up to `ahead` more than were asked for are begun or wait for their turn (None: four a worker), so memory is
    bounded by them. Jobs are taken from the iterable as they are needed, in the caller's thread. What a job raises, or the iterable, is raised
    in its place, after all results before it. Where the iterator is left, jobs that have not begun are cancelled, and no thread is left.
    """
    workers = workers or usable_cores()
    ahead = AHEAD * workers if ahead is None else ahead
    source, waiting = iter(jobs), deque[Future[Result]]()
    failure: Exception | None = None
    pool = ThreadPoolExecutor(workers, thread_name_prefix="t2ilib-decoding")
    try:
        while True:
            while source is not None and len(waiting) <= ahead:
                try:
                    waiting.append(pool.submit(function, next(source)))
                except StopIteration:
                    source = None
                except Exception as error:
                    source, failure = None, error
            if not waiting:
                break
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
    if failure is not None:
        raise failure


class Ahead:
    """Results of jobs, some of which were announced and are begun by then, in `workers` threads (None: one for each usable core), which end
    with this object. Jobs are hashable; what one raises, it raises where its result is asked for."""

    def __init__(self, function: Callable[[Job], Result], workers: int | None = None):
        self.function, self.begun = function, {}
        self.pool = ThreadPoolExecutor(workers or usable_cores(), thread_name_prefix="t2ilib-decoding")

    def announce(self, jobs: Iterable[Job]) -> None:
        """Begins these jobs, and forgets of others that were announced and never asked for."""
        jobs = dict.fromkeys(jobs)
        for job in self.begun.keys() - jobs.keys():
            self.begun.pop(job).cancel()
        for job in jobs.keys() - self.begun.keys():
            self.begun[job] = self.pool.submit(self.function, job)

    def results(self, jobs: Iterable[Job]) -> list[Result]:
        futures = [self.begun.pop(job, None) or self.pool.submit(self.function, job) for job in jobs]
        return [future.result() for future in futures]

    def close(self) -> None:
        """Ends the threads now."""
        self.pool.shutdown(cancel_futures=True)
