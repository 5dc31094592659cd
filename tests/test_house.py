"""The house: which room may call which. Imports go down only, wherever in a file they stand, and no two modules call each other.

A module belongs to the longest name here that its own begins with. It may import from lower rows, from its own entry, and from
nothing else; so a new package must be given its place before it can be used.
"""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "t2ilib"

ROWS = (
    ("cli",),
    ("app",),
    ("hub",),
    ("pipeline",),
    ("report",),
    ("studies",),
    ("drawing",),
    ("planning",),
    ("training.loop", "shapes.card"),
    ("shapes.pretraining",),
    ("training",),
    ("evaluation", "adapters", "shapes.models"),
    ("data",),
    ("models",),
    ("shapes.checker", "shapes.coco", "shapes.source"),
    (
        "shapes.world",
        "data.decoding",
        "data.download",
        "data.sources",
        "evaluation.metrics",
        "evaluation.rows",
        "presets",
        "statistics",
        "tracking",
    ),
    ("data.captions", "data.pictures", "environment", "memory", "pyfile", "runfile"),
    ("data.png", "data.progress", "data.records", "data.tagging", "data.views", "locking", "places", "text"),
    ("cachefolder", "config", "runlog", "seeds"),
)
"""The table in CONTRIBUTING.md, highest first."""
TORCH_FREE = (
    "cli",
    "report",
    "studies",
    "pipeline.file",
    "pipeline.job",
    "pipeline.marks",
    "planning.bound",
    "drawing.axes",
    "drawing.infotext",
    "drawing.pngtext",
    "drawing.samplers",
    "drawing.settings",
    "drawing.voting",
    "tracking",
    "config",
    "places",
    "presets",
    "data.advice",
    "data.download",
    "data.inspection",
    "memory",
    "data.captions",
    "data.tagging",
    "shapes.world",
    "drawing.stepgrid",
    "evaluation.steps",
    "evaluation.metrics",
    "evaluation.rows",
    "evaluation.strength",
    "environment",
    "statistics",
)
"""What must not load torch (or MLflow) when it is imported, so that commands answer at once and kernels get the memory."""


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")
        if name and name != "shapes":  # a package whose rooms lie in different rows, and which holds nothing itself
            found[name] = ast.parse(path.read_text())
    return found


MODULES = modules()


def imports_of(name: str) -> set[str]:
    """Modules of the package that a module imports, at its top, in a function or for type checking."""
    found = set()
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("t2ilib"):
            module = node.module.removeprefix("t2ilib").removeprefix(".")
            inside = {f"{module}.{alias.name}".removeprefix(".") for alias in node.names}
            found |= inside & MODULES.keys() or ({module} if module else set())
    return found


def entry_of(name: str) -> str:
    entries = [entry for row in ROWS for entry in row if name == entry or name.startswith(entry + ".")]
    assert entries, f"{name} has no place in the table"
    return max(entries, key=len)


def row_of(name: str) -> int:
    return next(number for number, row in enumerate(ROWS) if entry_of(name) in row)


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down_only(name: str) -> None:
    upwards = [
        other for other in imports_of(name) if entry_of(other) != entry_of(name) and row_of(other) <= row_of(name)
    ]
    assert not upwards, f"{name} imports {', '.join(upwards)}, which is not below it"


def test_no_circle() -> None:
    try:
        TopologicalSorter({name: imports_of(name) for name in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


def test_the_table_is_contributings_and_has_no_empty_rooms() -> None:
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    shown = [line.split() for line in text.split("<!-- the table -->")[1].splitlines() if line.startswith("    ")]
    assert [tuple(words) for words in shown] == list(ROWS)
    assert {entry for row in ROWS for entry in row} == {entry_of(name) for name in MODULES}


@pytest.mark.parametrize("package", TORCH_FREE)
def test_no_heavy_import(package: str) -> None:
    names = [name for name in MODULES if name == package or name.startswith(package + ".")]
    names = [name for name in names if not name.endswith("__main__")]
    code = f"import sys; [__import__('t2ilib.' + name) for name in {names!r}]; sys.exit(' '.join({{'torch', 'diffusers', 'mlflow'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == ""


def test_modules_do_one_job() -> None:
    long = {str(path): n for path in PACKAGE.rglob("*.py") if (n := len(path.read_text().splitlines())) > 400}
    assert not long, "more than one job each?"
