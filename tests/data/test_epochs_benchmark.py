"""The benchmarks of epochs and of memory in small: every row gives its figures."""

import epochs
import memory as memory_benchmark
import pytest

from t2ilib.runfile import build_run


@pytest.fixture(autouse=True)
def small(monkeypatch):
    sizes = {
        name: (12, 4, {"latents": (4, 2, 2)}, {"encoder_hidden_states": (3, 4)}) for name in ("tiny", "SD1.5 at 512")
    }
    monkeypatch.setattr(epochs, "SIZES", sizes)
    monkeypatch.setattr(epochs, "BATCHES", 3)


@pytest.mark.parametrize("name", [name for name in epochs.ROWS if name != "until the first step"])
def test_batches_are_read_each_way(tmp_path, name):
    assert "batches/s" in epochs.ROWS[name](tmp_path, 0)


def test_what_is_kept_is_what_a_batch_holds(tmp_path):
    data, order = epochs.encoded(tmp_path, "tiny", chance=True)
    batch = data.batch(order(5), 5, [False, True, False, False], epochs.torch.device("cpu"))
    shapes = {name: tuple(value.shape) for name, value in batch.items()}
    assert shapes == {"latents": (4, 4, 2, 2), "time_ids": (4, 6), "encoder_hidden_states": (4, 3, 4)}


def test_a_start_finds_everything(tmp_path, monkeypatch):
    monkeypatch.setenv("T2ILIB_CACHE", str(tmp_path))
    assert epochs.startup(tmp_path, 60) == "made"
    monkeypatch.setattr(epochs.known, "remember", lambda seen: pytest.fail("was not known") if list(seen) else None)
    assert "MiB at the peak" in epochs.startup(tmp_path, 60)


def test_the_runs_whose_memory_is_measured_are_runs(tmp_path):
    assert build_run(memory_benchmark.settings(tmp_path / "out", tmp_path)).data.cache == "all"
