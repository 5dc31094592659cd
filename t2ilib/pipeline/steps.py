"""What a pipeline can do: each step by its name, a module of its own."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from t2ilib.pipeline import captioning, downloading, drawing, measuring, training
from t2ilib.pipeline.job import Job


@dataclass(frozen=True)
class Step:
    """`depends`: the settings that the step depends on, as JSON. `needs`: lines that say what it will do and take; changes nothing, and in a
    dry run asks nobody. `do`: does it, goes on where it was broken off, and gives JSON. `made`: whether what it made is there. `each`:
    whether it is done for every run, or once for all."""

    depends: Callable[[Job], Any]
    needs: Callable[[Job], Iterator[str]]
    do: Callable[[Job], Any]
    made: Callable[[Job], bool]
    each: bool = True


STEPS: dict[str, Step] = {
    "download": Step(downloading.depends, downloading.needs, downloading.do, downloading.made, each=False),
    "process": Step(captioning.depends, captioning.needs, captioning.do, captioning.made),
    "train": Step(training.depends, training.needs, training.do, training.made),
    "measure": Step(measuring.depends, measuring.needs, measuring.do, measuring.made),
    "draw": Step(drawing.depends, drawing.needs, drawing.do, drawing.made, each=False),
}
