"""Every test runs offline, on few threads, and with a cache folder of its own."""

import gc
import importlib
import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest

from t2ilib.memory import usable_cores
from t2ilib.shapes import source

FEW_HELD_OUT = 6
LONGEST = (
    "test_golden",
    "test_gpu_benchmark",
    "test_trace",
    "test_presets",
    "test_jupyterlab",
    "test_page",
    "test_dora",
    "test_export",
    "test_loop",
    "test_models",
    "test_study",
    "test_ray",
    "test_champion",
    "test_end_to_end",
    "test_processes",
    "test_kills",
    "test_outbox",
)
"""Files that are started first, so that no worker is left alone with one of them at the end."""


def pytest_configure(config) -> None:
    if (
        signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    ):  # as shells have it for what runs in the background, and all that it starts
        signal.signal(signal.SIGINT, signal.default_int_handler)
    share_the_cores(config)


def share_the_cores(config) -> None:
    """Each worker gets its share of the cores, which it inherits from the process that starts it. Tests are about the CPU, and
    see no other device, unless those marked `gpu` are asked for, by `-m gpu`."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    workers = config.getoption("numprocesses", None) or 1
    if "PYTEST_XDIST_WORKER" not in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", str(min(2, max(1, usable_cores() // workers))))


def pytest_collection_modifyitems(config, items) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if config.option.markexpr != "gpu":
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="about a GPU: run pytest -m gpu"))


def leave_imports_alone() -> None:
    """Garbage is looked for among more than half a million objects of libraries otherwise, and drawing has it looked for often."""
    for name in ("t2ilib.training.loop", "diffusers.loaders.peft", "mlflow"):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def machine(tmp_path_factory):
    """A cache folder of its own; and few held-out pictures, whose loss before and after takes most of a short run's time."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        leave_imports_alone()
    os.environ["T2ILIB_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    source.NUM_VALIDATION = FEW_HELD_OUT


@pytest.fixture(scope="session")
def parts():
    from adapting import build_parts

    return {family: build_parts(family) for family in ("sdxl", "sd15")}


@pytest.fixture
def make(parts):
    """`make(family)` gives a small model with random weights, the same in every call."""
    from adapting import copy_parts

    return lambda family="sdxl": copy_parts(parts[family])
