"""What a study asks of the place where its notebooks are executed, and what such a place is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Demand:
    """What is asked for. `runs`: how many there are; `jobs`: notebooks at a time, None for what suits the place; `per_card`: how many may have the
    same GPU; `uri`: the MLflow store that they log to; `say`: tells a line."""

    runs: int
    jobs: int | None
    per_card: int
    uri: str
    say: Callable[[str], None]


@dataclass(frozen=True)
class Place:
    """Where notebooks are executed. `jobs`: at a time; `execute`: takes and gives what `notebooks.execute_notebook` does, and raises
    `WorkerLost`; `ask`: a function and its arguments -> what it gives on a machine such as the notebooks will have; `sharing`: how many share
    one, or its GPU; `cards`: GPUs to be had by turns, none where the place gives them out itself; `threads`: of a kernel, None for its share
    of the cores here; `about`: a line about all that, or ""."""

    jobs: int
    execute: Callable[..., tuple[int, str]]
    ask: Callable[..., Any]
    sharing: int
    cards: Sequence[str] = ()
    threads: int | None = None
    about: str = ""


class WorkerLost(RuntimeError):
    """The machine or process that executed a notebook is gone, and the notebook with it. That says nothing about the run."""
