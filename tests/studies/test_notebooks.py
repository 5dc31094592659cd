"""The notebooks keep to the rules that make them readable and that papermill needs."""

import ast
import json
from pathlib import Path

import pytest
import yaml

from t2ilib.config import RunConfig
from t2ilib.runfile import build_run
from t2ilib.studies.file import load_study
from t2ilib.studies.notebooks import notebook_parameters
from t2ilib.studies.runs import check_notebooks, plan_runs

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted([*ROOT.glob("experiments/*.ipynb"), *ROOT.glob("inference/*.ipynb")])
STUDIES = [path for path in ROOT.glob("experiments/*.yaml") if "presets" in yaml.safe_load(path.read_text())]


def code_cells(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_thin_and_stripped(path: Path) -> None:
    cells = code_cells(path)
    assert len(cells) <= 10
    for cell in cells:
        assert not cell["outputs"]
        assert cell["execution_count"] is None
        python = "".join(line for line in cell["source"] if not line.startswith("%"))
        assert not any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in ast.walk(ast.parse(python)))
    first = json.loads(path.read_text())["cells"][0]
    assert first["cell_type"] == "markdown"
    assert "".join(first["source"]).startswith("# ")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_parameters_are_plain_assignments(path: Path) -> None:
    """JSON-like values, nothing derived, and one statement after the other: what papermill reads and injects."""
    cell = next(cell for cell in code_cells(path) if "parameters" in cell["metadata"].get("tags", []))
    for statement in ast.parse("".join(cell["source"])).body:
        assert isinstance(statement, ast.Assign)
        json.dumps(ast.literal_eval(statement.value))
    assert notebook_parameters(path)


def test_parameters_are_sections_and_fields_of_a_run() -> None:
    """What a person edits by hand makes a run as it stands, and a study can inject every section there is; where it writes to, and a card's
    settings, are added below."""
    declared = {
        name: ast.literal_eval(value)
        for name, value in notebook_parameters(ROOT / "experiments" / "train.ipynb").items()
    }
    assert (declared["output"], declared.pop("card")) == (None, None)
    assert list(declared) == list(RunConfig.model_fields)
    declared["output"] = "here"
    assert build_run(declared).shapes.scenes == ("base", "heart", "striped", "blueprint")
    scratch = {
        name: ast.literal_eval(value)
        for name, value in notebook_parameters(ROOT / "experiments" / "scratch.ipynb").items()
    }
    assert list(scratch) == [name for name in RunConfig.model_fields if name not in ("student", "adapter", "prior")]
    scratch["output"] = "here"
    assert build_run(scratch).trains == "unet"
    drawn = notebook_parameters(ROOT / "inference" / "base.ipynb")
    assert set(drawn) <= set(RunConfig.model_fields)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_study_files_fit_their_notebooks(path: Path) -> None:
    study = load_study(path)
    for preset in study.presets:
        runs = plan_runs(study, path, preset, Path("results"))
        check_notebooks(runs)
        assert all(run.config() for run in runs)


def test_adapters_study_has_what_was_asked() -> None:
    study = load_study(ROOT / "experiments" / "adapters.yaml")
    asked = {
        "base", "text_encoder_unet_many", "text_encoder_unet_simple", "text_encoder_no_unet_many", "text_encoder_no_unet_simple",
        "dora_prodigy", "dora_adamw8bit", "text_encoder_no_unet_simple_sparse",
    }  # fmt: skip
    assert asked <= set(study.variants)
    assert len(study.presets["quick"].seeds) == 1
    assert len(study.presets["full"].seeds) >= 6
