"""The data of the index benchmark in small, and that an index stays as small, a picture, as the benchmark says."""

import os
import subprocess
import sys

import index
import pytest

MOST = 3000
"""Bytes a picture, with five captions, while it is indexed: 118,287 of them are 355 MB beside what is imported."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "LINKS", 700)
    index.build(tmp_path, 2000)
    return tmp_path


def test_each_way_finds_all(folder, monkeypatch):
    assert index.index_coco(folder / "zip") == index.index_coco(folder / "folder") == (2000, 10_005)
    few = folder / "few"
    index.build(few, 10)
    assert index.index_datasets(few) == (10, 50)


PEAK = """
import sys, tracemalloc
from pathlib import Path
import index
for place in sys.argv[1:]:
    index.index_coco(Path(place))  # what is imported late
    tracemalloc.start()
    index.index_coco(Path(place))
    print(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
"""


def test_memory_a_picture(folder):
    """In a process of its own: what other threads of this one allocate meanwhile would count."""
    command = [sys.executable, "-c", PEAK, str(folder / "zip"), str(folder / "folder")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    peaks = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    assert [int(peak) / 2000 < MOST for peak in peaks] == [True, True], peaks
