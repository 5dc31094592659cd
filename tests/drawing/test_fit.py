"""What will not fit is told in the words of `t2ilib plan`: of drawing alone, at the size that is asked for, with what would help."""

import re

import pytest
import torch

from t2ilib.config import ConfigError
from t2ilib.drawing.fit import bytes_held, drawing_run, lacks_memory, memory_told, shortage
from t2ilib.drawing.settings import build_settings
from t2ilib.memory import GIB
from t2ilib.planning.trace import plan_memory

SD15 = build_settings({"model": {"base": "sd15"}})
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def test_it_is_drawing_that_is_planned_and_what_would_fit_is_told(monkeypatch):
    plan = plan_memory(drawing_run(SD15, (512, 512)), "cuda")
    monkeypatch.setattr("t2ilib.drawing.fit.plan_memory", lambda run, device: plan)
    needed = plan.bytes_of("drawing") / GIB * 1.05 + 0.5
    told = shortage(SD15, (512, 512), 1, CUDA, (needed - 0.02) * GIB)
    figures = re.match(
        r"drawing 1 picture of 512x512 at once with sd15 needs ([\d.]+) GiB of cuda memory, and ([\d.]+) GiB are available: set"
        r" model.quantization=nf4 \(then ([\d.]+) GiB\)",
        told,
    )
    assert [float(figure) for figure in figures.groups()[:2]] == pytest.approx([needed, needed - 0.02], abs=0.06)
    assert float(figures[3]) < needed
    assert shortage(SD15, (512, 512), 1, CUDA, (needed + 0.02) * GIB) is None
    assert needed != pytest.approx(plan.bytes_of("encoding") / GIB * 1.05 + 0.5, abs=0.1), "or it might be that"


def test_what_surely_fits_and_what_cannot_be_foreseen_is_drawn(monkeypatch, caplog):
    def fails(*arguments):
        raise RuntimeError("no trace")

    monkeypatch.setattr("t2ilib.drawing.fit.plan_memory", fails)
    assert shortage(build_settings({}), (64, 64), 1, CPU, 64 * GIB) is None
    assert not caplog.records, "a tiny model is not traced"
    assert shortage(SD15, (512, 512), 1, CPU, 1 * GIB) is None
    assert "could not be foreseen (RuntimeError: no trace)" in caplog.text


def test_sides_of_any_shape_become_a_square_of_as_many_pixels():
    assert drawing_run(SD15, (1024, 512)).data.resolution == 728
    assert drawing_run(SD15, (64, 64), 4).evaluation.prompts == ("a picture",) * 4
    assert drawing_run(SD15, (64, 64)).trains == "nothing"


def test_only_errors_about_memory_are_taken_for_such():
    assert lacks_memory(torch.OutOfMemoryError())
    assert lacks_memory(MemoryError())
    assert lacks_memory(RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"))
    assert not lacks_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not lacks_memory(ValueError("out of memory"))
    with (
        pytest.raises(ConfigError, match=r"drawing with sd15 ran out of cpu memory \(x\)"),
        memory_told(SD15, None, 1, CPU),
    ):
        raise MemoryError("x")
    with pytest.raises(KeyError), memory_told(SD15, None, 1, CPU):
        raise KeyError("x")


def test_bytes_are_those_of_weights():
    layer = torch.nn.Linear(10, 3).half()
    assert bytes_held([layer, torch.nn.BatchNorm1d(4)]) == 33 * 2 + 16 * 4 + 8
