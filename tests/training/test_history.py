"""What steps cost: time, and the share of it that was spent waiting for data."""

import logging
import time
from pathlib import Path

import pytest

from t2ilib.data.cache import EncodedDataset, Fresh
from t2ilib.data.decoding import Waiting
from t2ilib.data.streamed import StepOrder
from t2ilib.memory import Peaks
from t2ilib.tracking.tracker import NullTracker
from t2ilib.training import history as module
from t2ilib.training.history import WINDOW, History, read_rows


@pytest.fixture
def clock(monkeypatch):
    """A clock that is put forward by hand."""
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def take(history: History, clock: list[float], steps: range, seconds: float, waited: float) -> None:
    for step in steps:
        history.begin()
        clock[0] += seconds
        history.step(step, {"loss": 1.0}, waited)


def test_the_share_is_that_of_the_last_steps_and_in_the_end_of_all(tmp_path: Path, clock) -> None:
    history = History(tmp_path, 0, NullTracker(), Peaks())
    take(history, clock, range(1, 2), 9.0, 9.0)  # the first step is not timed
    take(history, clock, range(2, 2 + WINDOW), 2.0, 0.0)
    take(history, clock, range(2 + WINDOW, 2 + 2 * WINDOW), 2.0, 1.0)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert "data_wait_share" not in rows[0]
    assert [rows[step - 1]["data_wait_share"] for step in (2, 1 + WINDOW, 1 + 2 * WINDOW)] == [0.0, 0.0, 0.5]
    assert history.speed() == {"steps_per_second": 0.5, "data_wait_share": 0.25}

    history.save_timing()
    resumed = History(tmp_path, 1 + 2 * WINDOW, NullTracker(), Peaks())
    assert resumed.speed() == history.speed()


def test_starving_is_warned_about_once_and_not_while_it_warms_up(tmp_path: Path, clock, caplog) -> None:
    history = History(tmp_path, 0, NullTracker(), Peaks())
    with caplog.at_level(logging.WARNING):
        take(history, clock, range(1, WINDOW), 2.0, 0.5)
        assert not caplog.records
        take(history, clock, range(WINDOW, 4 * WINDOW), 2.0, 0.5)
    (record,) = caplog.records
    assert record.message.startswith(
        f"25% of the time of the last {WINDOW} steps went into waiting for data (500 ms a step)"
    )
    assert "data.workers" in record.message
    assert "data.cache" in record.message


def test_without_a_folder_nothing_is_written(tmp_path: Path, clock, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    history = History(None, 3, NullTracker(), Peaks())
    take(history, clock, range(4, 7), 1.0, 0.0)
    history.save_timing()
    assert history.last["loss"] == 1.0
    assert list(tmp_path.iterdir()) == []


def test_waiting_is_what_passes_inside_and_asked_for_once() -> None:
    waiting = Waiting()
    for _ in range(2):
        with waiting:
            time.sleep(0.01)
    assert 0.02 <= waiting.taken() < 1
    assert waiting.taken() == 0.0


def test_decoding_is_waited_for_and_encoding_is_not(monkeypatch) -> None:
    """A picture takes 30 ms to decode and 200 to encode."""
    from t2ilib.data import cache

    class Slow:
        config = type("Config", (), {"workers": 1})
        has_masks = has_pairs = False

        def load(self, i: int, number: int, rejected: bool) -> int:
            time.sleep(0.03)
            return i

    monkeypatch.setattr(cache, "encode_views", lambda *arguments: time.sleep(0.2) or {})
    encoded = EncodedDataset(Slow(), Fresh(None, Slow()), lambda captions: {})
    encoded.latents([(0, 0)])
    assert 0.03 <= encoded.waited() < 0.15
    encoded.latents.announce([(1, 0)])
    time.sleep(0.1)
    encoded.latents([(1, 0)])
    assert encoded.waited() < 0.02  # it was decoded meanwhile


def test_a_stream_that_is_slow_is_waited_for() -> None:
    class Slow:
        def position(self, seed: int, place: int) -> int:
            time.sleep(0.01)
            return place

        def arrive(self, positions, until: int) -> None:
            time.sleep(0.02)

    order = StepOrder(Slow(), 0, 2, 10)
    assert order(3) == [6, 7]
    assert order.waiting.taken() >= 0.04
    order(3)
    assert order.waiting.taken() == 0.0
