import shutil
import subprocess
import sys
from collections import namedtuple

import psutil
import pytest
import torch

from t2ilib.config import ConfigError
from t2ilib.memory import MIB, Peaks, existing, process_peak_mib, read_memory, require_disk


def test_readings_are_in_mib_and_plausible(tmp_path):
    readings = read_memory(tmp_path / "not" / "there" / "yet")
    assert {"process_mib", "system_available_mib", "disk_free_mib"} <= set(readings)
    assert any(name.startswith("device_") for name in readings) == torch.cuda.is_available()
    total = psutil.virtual_memory().total / 2**20
    assert 50 < readings["process_mib"] < total  # torch is loaded: tens of MiB at least, so neither bytes nor GiB
    assert readings["process_mib"] < readings["system_available_mib"] + readings["process_mib"] < 1.05 * total
    assert readings["disk_free_mib"] == pytest.approx(shutil.disk_usage(tmp_path).free / 2**20, rel=0.05)


PEAK = """
import os, mmap
from t2ilib.memory import Peaks, read_memory

def use(mib):  # touch every page, then give it back to the system
    with mmap.mmap(-1, mib * 2**20) as block:
        for start in range(0, mib * 2**20, 4096):
            block[start] = 1

import psutil, torch
try:
    open("/proc/self/clear_refs", "w").write("5")
except OSError:
    print("forbidden")
    raise SystemExit
peaks = Peaks()
assert peaks.metrics() == {}
base = psutil.Process().memory_info().rss / 2**20
peak = lambda phase: peaks.found[phase]["peak_process_mib"] - base
use(400)                     # before
peaks.enter("training")
use(200)
peaks.enter("training")      # once more inside a stretch changes nothing
peaks.leave()
first = peak("training")
with peaks.during("drawing"):
    use(400)                 # between
peaks.leave()                # a second end changes nothing
between = peak("training")
peaks.enter("training")
use(100)
peaks.leave()                # a smaller stretch does not lower the peak
second = peak("training")
peaks.enter("training")
use(300)
peaks.enter("drawing")       # ends it
peaks.leave()
names = peaks.metrics()
assert names["peak_process_mib"] == max(names["memory/training/peak_process_mib"], names["memory/drawing/peak_process_mib"])
print(first, between, second, peak("training"), peak("drawing"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark is reset through /proc")
def test_a_peak_sees_what_is_used_inside_its_stretches_only():
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if done.stdout.startswith("forbidden"):
        pytest.skip("this container forbids resetting the high-water mark")
    values = done.stdout.split()
    first, between, second, last, drawing = map(float, values)
    assert first == pytest.approx(200, abs=40)
    assert between == second == first
    assert last == pytest.approx(300, abs=40)
    assert drawing == pytest.approx(400, abs=40)


def test_the_peak_of_a_process_is_at_least_what_it_uses():
    assert process_peak_mib() >= 0.9 * psutil.Process().memory_info().rss / 2**20


WINDOWS = """
import sys
from types import SimpleNamespace

import psutil  # whose own module for Linux needs what is hidden here
sys.modules |= dict.fromkeys(("resource", "fcntl", "pwd", "grp", "termios", "pty"))  # importing None raises ImportError
import t2ilib, t2ilib.cli, t2ilib.memory, t2ilib.report, t2ilib.studies.study, t2ilib.tracking.tracker

sys.platform = "win32"
read = psutil.Process.memory_info
psutil.Process.memory_info = lambda process: SimpleNamespace(rss=read(process).rss, peak_wset=3 * 2**30)
t2ilib.memory.reset_process_peak()
print(t2ilib.memory.process_peak_mib())
"""


def test_modules_that_windows_has_not_are_not_needed():
    done = subprocess.run([sys.executable, "-c", WINDOWS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == 3072  # psutil's `peak_wset`, in MiB


def test_where_there_is_no_proc_the_peak_is_getrusages(monkeypatch):
    usage = namedtuple("usage", "ru_maxrss")
    monkeypatch.setattr("resource.getrusage", lambda who: usage(2**31))
    monkeypatch.setattr(sys, "platform", "darwin")
    assert process_peak_mib() == 2048  # macOS counts bytes, others KiB
    monkeypatch.setattr(sys, "platform", "freebsd14")
    assert process_peak_mib() == 2**21


def test_an_unmeasured_peak_is_missing():
    peaks = Peaks()
    peaks.leave()
    assert peaks.metrics() == {}


def test_require_disk(tmp_path, monkeypatch):
    asked = []
    usage = namedtuple("usage", "total used free")

    def disk_usage(path):
        asked.append(path)
        return usage(10**12, 0, 1000 * MIB)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    folder = tmp_path / "not" / "there"
    require_disk(folder, 900 * MIB, "checkpoints")
    assert asked == [tmp_path]
    with pytest.raises(ConfigError) as error:
        require_disk(folder, 2048 * MIB, "checkpoints")
    assert f"checkpoints need 2,048 MiB under {folder}, and 1,000 MiB are free" in str(error.value)
    assert "training.keep_checkpoints" in str(error.value)
    with pytest.raises(ConfigError):  # fits, but without a tenth to spare
        require_disk(folder, 950 * MIB, "checkpoints")


def test_existing_finds_the_nearest_folder(tmp_path, monkeypatch):
    assert existing(tmp_path / "a" / "b") == tmp_path
    assert existing(tmp_path) == tmp_path
    monkeypatch.chdir(tmp_path)
    assert existing("relative/path") == tmp_path


def test_an_earlier_attempt_counts_in_its_phase():
    peaks = Peaks()
    peaks.include({"training": {"peak_process_mib": 900.0, "peak_device_mib": 40.0}})
    peaks.include(
        {"training": {"peak_process_mib": 700.0}, "drawing": {"peak_process_mib": 950.0, "peak_device_mib": 90.0}}
    )
    assert peaks.metrics() == {
        "memory/training/peak_process_mib": 900.0,
        "memory/training/peak_device_mib": 40.0,
        "memory/drawing/peak_process_mib": 950.0,
        "memory/drawing/peak_device_mib": 90.0,
        "peak_process_mib": 950.0,
        "peak_device_mib": 90.0,
    }


def test_readings_at_an_interval_after_the_last_of_any_kind(tmp_path, monkeypatch):
    from t2ilib import memory

    clock, told = [0.0], []
    monkeypatch.setattr(memory.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(memory, "read_memory", lambda folder: {"process_mib": 100.0, "disk_free_mib": 2048.0})
    log = memory.MemoryLog(tmp_path)
    clock[0] = 8.0
    log.note("loaded")
    clock[0] = 17.0
    assert log.now(3, told.append) == {}
    clock[0] = 18.0
    assert log.now(4, told.append) == {"memory/process_mib": 100.0, "memory/disk_free_mib": 2048.0}
    assert log.now(5, told.append) == {}
    assert told == ["memory at step 4: process 100 MiB, disk free 2,048 MiB"]
    assert log.metrics() == {"memory/loaded/process_mib": 100.0, "memory/loaded/disk_free_mib": 2048.0}
