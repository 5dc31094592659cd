"""Objectives that learn from something else beside pictures and captions: one file each, a line in METHODS, and a section of its own in
`config.objective`."""

from t2ilib.training.methods.consistency import CONSISTENCY
from t2ilib.training.methods.imitation import IMITATION
from t2ilib.training.methods.method import Method
from t2ilib.training.methods.preferences import PREFERENCES

METHODS: dict[str, Method] = {
    "denoising": Method(lambda parts: parts.plain),
    "preferences": PREFERENCES,
    "imitation": IMITATION,
    "consistency": CONSISTENCY,
}
"""`ObjectiveConfig.method` -> what it is."""
