"""How far a measure without a checker can be trusted: its rank correlation with what the checker of the drawn world counts.

The numbers are those of experiments/benchmarks/measures.py, shipped beside this file. They are of the tiny models and their CLIP: a measure
that is weak there is not to be trusted anywhere, one that is strong there has passed a first test and no more. Imports no torch.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).with_name("strength.json")
PASSES = 0.5
"""The least that the lower end of the interval must be."""
CHECKED = "clip-patches"
"""The embedding model by which measures are told to be strong where another has judged: the tiny models' CLIP, all patches."""


@cache
def strengths() -> dict[str, dict[str, Any]]:
    """Metric -> what of the truth it might stand for -> rank_correlation, low, high (95 %), runs."""
    return json.loads(SHIPPED.read_text())


def was_checked(metric: str, truth: str) -> bool:
    """Whether a metric was held against this of TRUTHS."""
    return truth in strengths().get(metric, {})


def passes(metric: str, truth: str) -> bool:
    """Whether a metric was shown to order runs as the checker does."""
    return was_checked(metric, truth) and strengths()[metric][truth]["low"] >= PASSES


TRUTHS = {
    "learned": "what was learned",
    "kept": "what was kept",
    "gap": "how much better training captions are drawn than held-out ones",
}


def told_strength(metric: str, *truths: str) -> str:
    """How strong a metric is, in a sentence, for these of TRUTHS, or for all that it was held against; of another embedding model what is
    known of the tiny CLIP's; "" for a metric that was never held against anything."""
    found = strengths().get(metric)
    by = "" if found else " by the tiny models' CLIP"
    found = found or strengths().get(f"{metric.rpartition('/')[0]}/{CHECKED}", {})
    known = {truth: told for truth, told in found.items() if not truths or truth in truths}
    said = [
        f"{TRUTHS[truth]} {told['rank_correlation']:.2f} ({told['low']:.2f} to {told['high']:.2f})"
        + ("" if told["low"] >= PASSES else ", which is **weak**")
        for truth, told in known.items()
    ]
    count = max((told["runs"] for told in known.values()), default=0)
    beginning = f"Over {count} runs on the drawn world its rank correlation{by} with the checker is:"
    return f"{beginning} {'; '.join(said)}." if said else ""
