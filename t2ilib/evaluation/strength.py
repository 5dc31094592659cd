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


@cache
def strengths() -> dict[str, dict[str, Any]]:
    """Metric, with {model} for the embedding model -> what of the truth it might stand for -> rank_correlation, low, high (95 %), runs."""
    return json.loads(SHIPPED.read_text())
