"""What there is to choose from: adapters of runs, of MLflow's registry and by path, bases, studies and their variants.

An adapter in the page is a text: a path or `models:/<name>@<alias>`, and behind it ` at step 500` where it is meant as it was then. Such a text
is taken as an adapter and as nothing else: no file is shown because its path was typed.
"""

import re
from collections.abc import Sequence

from t2ilib.drawing.finding import Found
from t2ilib.drawing.settings import AdapterChoice

Choice = tuple[str, str]
"""What is shown, and the value behind it."""
AT_STEP = re.compile(r"(?P<path>.*\S)\s+at\s+step\s+(?P<step>\d{1,12})\s*", re.DOTALL | re.IGNORECASE)
NO_ADAPTER: Choice = ("none", "")
BASE_ALONE: Choice = ("the base alone", "")
ALL_RUNS = "all runs"
SHIPPED_BASES = ("tiny-sdxl", "tiny-sd15")


def read_adapter(text: str, strength: float = 1.0) -> dict[str, object]:
    """An adapter as the page has it, as the fields of an AdapterChoice."""
    found = AT_STEP.fullmatch(text)
    path, step = (found["path"], int(found["step"])) if found else (text, None)
    return {"path": path.strip(), "step": step, "strength": strength}


def written_adapter(choice: AdapterChoice) -> str:
    """An adapter as the page has it."""
    return choice.path if choice.step is None else f"{choice.path} at step {choice.step}"


def shown_run(run: Found) -> str:
    """A run in a list: what it is called, and what tells it from others."""
    steps = "" if run.finished else f", at step {run.steps[-1]} so far"
    return f"{run.name} ({run.kind}, rank {run.rank}, over {run.base}, {run.when:%d %b %H:%M}{steps})"


def value_of(run: Found) -> str:
    """A run's adapter as the page has it: of a run that is still going, its newest."""
    return str(run.path) if run.finished else f"{run.path} at step {run.steps[-1]}"


def adapter_choices(runs: Sequence[Found], registered: Sequence[str]) -> list[Choice]:
    """All adapters there are: none, those of MLflow's registry, and those of runs."""
    return [NO_ADAPTER, *((name, name) for name in registered), *((shown_run(run), value_of(run)) for run in runs)]


def newest_for(runs: Sequence[Found], base: str) -> str:
    """The newest finished adapter over a base, as the page has it; "" where there is none."""
    return next((value_of(run) for run in runs if run.finished and run.base == base), "")


def base_choices(runs: Sequence[Found], *others: str) -> list[str]:
    """The bases that can be named: those that ship, those that are in use, those of runs."""
    return list(dict.fromkeys([*others, *SHIPPED_BASES, *(run.base for run in runs)]))


def study_of(run: Found) -> str | None:
    """The study that a run is part of (results/<study>-<preset>/<variant>/seed<k>); None for a run of its own."""
    parts = run.name.split("/")
    return parts[0] if len(parts) > 2 and parts[-1].startswith("seed") else None


def studies(runs: Sequence[Found]) -> list[str]:
    """The studies that there are two adapters of, or one, which can be held against the base."""
    return [ALL_RUNS, *dict.fromkeys(study for run in runs if (study := study_of(run)))]


def variant_choices(runs: Sequence[Found], study: str, registered: Sequence[str] = ()) -> list[Choice]:
    """What can be compared: the base alone and the runs of a study, or everything. A study's are called by variant and seed."""
    if study == ALL_RUNS:
        return [BASE_ALONE, *adapter_choices(runs, registered)[1:]]
    own = [run for run in runs if study_of(run) == study]
    return [BASE_ALONE, *((run.name.removeprefix(f"{study}/"), value_of(run)) for run in own)]


def runs_with_steps(runs: Sequence[Found]) -> list[Choice]:
    """The runs whose adapter can be had as it was at a step."""
    return [(f"{shown_run(run)}, {len(run.steps)} checkpoints", str(run.path)) for run in runs if run.steps]
