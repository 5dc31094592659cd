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
    """300 steps on eight pictures in all concepts, also the one by which nothing was chosen, where less over-training goes unseen."""
    benchmark = pytest.importorskip("measures")
    told = {path.stem: json.loads(path.read_text()) for path in sorted(WRITTEN.parent.glob("*-*.json"))}
    runs = {name: benchmark.flagged(one["metrics"], one["ceilings"]) for name, one in told.items()}
    over_trained = {f"{concept}-{name}" for concept in benchmark.CONCEPTS for name in benchmark.OVER_TRAINED}
    over_trained |= {f"{benchmark.CONFIRMING}-few_8_300"}
    good = {name for name in runs if name.split("-", 1)[1] in benchmark.GOOD}
    assert (len(over_trained), len(good)) == (7, 21)
    assert not {name for name in over_trained if not runs[name]}
    assert not {name for name in good if runs[name]}
