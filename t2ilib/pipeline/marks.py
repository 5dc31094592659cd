"""Marks: that a step is done, what it depended on, and what came of it. A small JSON file each, in `marks` of the pipeline's output.

A step depends on its own settings, and on what the steps before it depended on and gave. So one that has changed is done anew with all that
follow it, and one that has not is never done twice. A mark is written when everything else is, and whole or not at all.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from t2ilib.text import write_whole

FOLDER = "marks"


@dataclass(frozen=True)
class Mark:
    """`digest`: of what the step depended on; `result`: JSON of what it gave; `seconds` that it took."""

    digest: str
    result: Any
    seconds: float
    finished: str


def digest_of(step: str, settings: Any, before: Sequence[tuple[str, Any]]) -> str:
    """16 hex digits of what a step depends on. `before`: digests and results of the steps that it follows; None for a result that is not
    known."""
    said = json.dumps([step, settings, list(before)], sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def mark_path(output: Path, step: str, name: str | None) -> Path:
    return output / FOLDER / (f"{step}.json" if name is None else f"{step}-{name}.json")


def read_mark(path: Path) -> Mark | None:
    """None where there is none, or one that is not whole."""
    try:
        return Mark(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def write_mark(path: Path, digest: str, result: Any, seconds: float) -> Mark:
    mark = Mark(digest, result, round(seconds, 1), time.strftime("%Y-%m-%d %H:%M:%S"))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(asdict(mark), indent=1, default=str))
    return mark
