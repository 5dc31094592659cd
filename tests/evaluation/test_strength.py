"""The numbers that ship are of enough runs, and those that the benchmark wrote."""

import json
from pathlib import Path

import pytest

from t2ilib.evaluation.strength import SHIPPED, strengths

WRITTEN = Path(__file__).parents[2] / "results" / "measures" / "strengths.json"


def test_every_number_is_of_forty_runs_or_says_of_how_many() -> None:
    for name, found in strengths().items():
        for truth, told in found.items():
            assert told["low"] <= told["rank_correlation"] <= told["high"], (name, truth)
            assert told["runs"] >= 30
    assert strengths()["learned/clip-patches"]["learned"]["runs"] >= 40


def test_they_are_those_of_the_committed_benchmark() -> None:
    assert json.loads(WRITTEN.read_text()) == json.loads(SHIPPED.read_text())


def test_the_benchmark_flags_what_was_over_trained_and_nothing_good() -> None:
    benchmark = pytest.importorskip("measures")
    told = {path.stem: json.loads(path.read_text()) for path in sorted(WRITTEN.parent.glob("*-*.json"))}
    runs = {name: benchmark.flagged(one["metrics"], one["ceilings"]) for name, one in told.items()}
    over_trained = [name for name in runs if name.split("-", 1)[1] in benchmark.OVER_TRAINED]
    good = [name for name in runs if name.split("-", 1)[1] in benchmark.GOOD]
    assert len(over_trained) >= 4
    assert len(good) >= 8
    assert all(runs[name] for name in over_trained if name.startswith(benchmark.CONCEPTS))
    assert not [name for name in good if runs[name]], "of the concept that came after, too"
    confirming = [name for name in over_trained if name.startswith(benchmark.CONFIRMING)]
    assert sum(bool(runs[name]) for name in confirming) == 1, "of 3: the page on measures says so"
