"""experiments/benchmarks/levers.py in small: every lever is a run, and a row tells what it should."""

import re

import levers
import pytest

from t2ilib.runfile import build_run, merge
from t2ilib.training import compute


@pytest.mark.parametrize("base", [*levers.ON_CPU.items(), *levers.ON_GPU.items()], ids=lambda base: base[0])
def test_every_lever_is_a_run(base) -> None:
    for name, lever in levers.LEVERS.items():
        if base[0].endswith("whole") or not lever.whole:
            build_run(merge(base[1], lever.beside, lever.sections)), name


def test_a_row_has_time_memory_and_losses() -> None:
    row = levers.compare("checkpointing", levers.ON_CPU["sd15 lora"], rounds=1, steps=1)
    found = re.fullmatch(
        r" +[\d.]+ ms +[\d.]+ \(.*\) +[\d.]+ \(.*\) +(\d+) MiB +([\d.]+)   losses ([\de+-]+) apart in 2 steps", row
    )
    assert found, row
    assert float(found[2]) < 1
    assert float(found[3]) == 0
    assert levers.compare("attention xformers", levers.ON_CPU["sd15 lora"], 1, 1).startswith(
        "not here: compute.attention"
    )


def test_a_compiled_row_says_what_compiling_took(monkeypatch) -> None:
    monkeypatch.setattr(compute, "COMPILER", "eager")
    monkeypatch.setattr(compute, "BLOCKS", ("BasicTransformerBlock",))
    row = levers.compare("compile", levers.ON_CPU["sd15 whole"], rounds=2, steps=1)
    assert re.search(r"in 3 steps, first step \d+ s, then 0 graphs more$", row)
