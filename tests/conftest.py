"""Every test runs offline, on few threads, and with a cache folder of its own."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")

import pytest


@pytest.fixture(scope="session", autouse=True)
def machine(tmp_path_factory):
    import torch

    torch.set_num_threads(min(2, torch.get_num_threads()))
    os.environ["T2ILIB_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def parts():
    from adapting import build_parts

    return {family: build_parts(family) for family in ("sdxl", "sd15")}


@pytest.fixture
def make(parts):
    """`make(family)` gives a small model with random weights, the same in every call."""
    from adapting import copy_parts

    return lambda family="sdxl": copy_parts(parts[family])
