import gc
import threading
import time

import pytest

from t2ilib.data.decoding import Ahead, decoded


def names():
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("t2ilib-decoding")}


@pytest.mark.parametrize("workers", [1, 2, 5, None])
@pytest.mark.parametrize("ahead", [0, 1, 7, 100, None])
def test_results_come_in_order(workers, ahead):
    def slow_first(job):
        time.sleep(0.003 * (job % 3 == 0))
        return job * job

    assert list(decoded(iter(range(25)), slow_first, workers, ahead)) == [job * job for job in range(25)]
    assert list(decoded([], slow_first, workers, ahead)) == []
    assert not names()


def test_no_more_is_begun_than_was_asked_for():
    """Memory is bounded by it, and what is asked for next is ready when it is asked for."""
    begun, taken = [], 0
    jobs = iter(range(100))
    for taken, _ in enumerate(decoded(jobs, begun.append, 2, 6), 1):
        deadline = time.monotonic() + 5
        while len(begun) < min(100, taken + 6) and time.monotonic() < deadline:
            time.sleep(0.0005)
        assert len(begun) == min(100, taken + 6)
    assert taken == 100
    assert next(jobs, None) is None


def test_jobs_are_taken_in_the_callers_thread():
    threads = set()

    def jobs():
        for job in range(9):
            threads.add(threading.current_thread())
            yield job

    worked = set(decoded(jobs(), lambda job: threading.current_thread(), 2))
    assert threads == {threading.current_thread()}
    assert threading.current_thread() not in worked


def test_workers_work_at_once():
    """Three jobs that wait for each other can only end if three threads do them."""
    together = threading.Barrier(3, timeout=5)
    assert len(list(decoded(range(6), lambda job: together.wait(), 3))) == 6


@pytest.mark.parametrize("where", ["job", "jobs"])
def test_an_exception_comes_at_its_place(where):
    def jobs():
        for job in range(20):
            if where == "jobs" and job == 5:
                raise KeyError("five")
            yield job

    def work(job):
        if where == "job" and job == 5:
            raise KeyError("five")
        return job

    got = []
    with pytest.raises(KeyError, match="five"):
        got.extend(decoded(jobs(), work, 2, 8))
    assert got == [0, 1, 2, 3, 4]
    assert not names()


def test_leaving_early_cancels_what_has_not_begun():
    begun, gate = [], threading.Event()

    def work(job):
        begun.append(job)
        assert job == 0 or gate.wait(5)

    results = decoded(range(1000), work, 2, 50)
    next(results)
    threading.Timer(0.05, gate.set).start()  # while it is being left, two jobs are under way
    results.close()
    assert len(begun) <= 5
    assert not names()


def test_a_loop_that_fails_leaves_no_thread():
    def consumer():
        for result in decoded(range(1000), lambda job: job, 2):
            raise ZeroDivisionError(result)

    with pytest.raises(ZeroDivisionError):
        consumer()
    assert not names()


def test_what_was_announced_is_begun_and_done_once():
    begun, gate = [], threading.Event()

    def work(job):
        begun.append(job)
        gate.wait(5)
        return job * 10

    ahead = Ahead(work, 2)
    ahead.announce([1, 2])
    deadline = time.monotonic() + 5
    while len(begun) < 2 and time.monotonic() < deadline:
        time.sleep(0.0005)
    assert sorted(begun) == [1, 2]
    gate.set()
    ahead.announce([1, 2])
    assert ahead.results([2, 1, 3]) == [20, 10, 30]
    assert sorted(begun) == [1, 2, 3]
    assert ahead.results([2]) == [20]  # a result is handed out once, and not kept
    assert sorted(begun) == [1, 2, 2, 3]


def test_what_was_announced_and_never_asked_for_is_forgotten():
    ahead = Ahead(lambda job: 1 / job, 1)
    ahead.announce([0])  # raises, and nobody asks
    ahead.announce([1, 2])
    assert set(ahead.begun) == {1, 2}
    assert ahead.results([2, 1]) == [0.5, 1.0]
    ahead.announce([0])
    with pytest.raises(ZeroDivisionError):
        ahead.results([0])
    del ahead
    gc.collect()
    deadline = time.monotonic() + 5
    while names() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not names()
