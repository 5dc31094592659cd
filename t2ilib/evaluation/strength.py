"""How far a measure without a checker can be trusted: its rank correlation with what the checker of the drawn world counts.

The numbers are those of experiments/benchmarks/measures.py, shipped beside this file. They are of the tiny models and their CLIP: a measure
that is weak there is not to be trusted anywhere, one that is strong there has passed a first test and no more. Imports no torch.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).with_name("strength.json")
PASSES = 0.5
"""The least that the lower end of the interval must be."""

ANY_MODEL = "[^/]+(?<!-patches)"
"""Patches are another thing than a model's one vector: of them `{model}-patches` speaks."""


@cache
def strengths() -> dict[str, dict[str, Any]]:
    """Metric, with {model} for the embedding model -> what of the truth it might stand for -> rank_correlation, low, high (95 %), runs."""
    return json.loads(SHIPPED.read_text())


def strength_of(metric: str) -> dict[str, Any]:
    """What of the truth a metric might stand for -> its numbers, by the metric's whole name; {} for one that was never held against it."""
    for name, found in strengths().items():
        if re.fullmatch(re.escape(name).replace(re.escape("{model}"), ANY_MODEL), metric):
            return found
    return {}


def passes(metric: str, truth: str) -> bool:
    """Whether a metric was shown to order runs as the checker does."""
    return strength_of(metric).get(truth, {"low": -1.0})["low"] >= PASSES


TRUTHS = {
    "learned": "what was learned",
    "kept": "what was kept",
    "copied": "which runs draw training scenes that nobody asked for",
    "gap": "which runs draw training captions better than held-out ones",
}


def told_strength(metric: str, *truths: str) -> str:
    """How strong it is, in a sentence, for these of TRUTHS, or for all that it was held against; "" for a metric that never was."""
    known = {truth: told for truth, told in strength_of(metric).items() if not truths or truth in truths}
    said = [
        f"{TRUTHS[truth]} {told['rank_correlation']:.2f} ({told['low']:.2f} to {told['high']:.2f})"
        + ("" if told["low"] >= PASSES else ", which is **weak**")
        for truth, told in known.items()
    ]
    count = max((told["runs"] for told in known.values()), default=0)
    return (
        f"Over {count} runs on the drawn world its rank correlation with the checker is: {'; '.join(said)}."
        if said
        else ""
    )
