"""The notebooks keep to the rules that make them readable and that papermill needs."""

import ast
import json
from pathlib import Path

import pytest
import yaml

from t2ilib.notebooks import notebook_parameters
from t2ilib.study import check_parameters, load_study

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted([*ROOT.glob("experiments/*.ipynb"), *ROOT.glob("inference/*.ipynb")])
STUDIES = [path for path in ROOT.glob("experiments/*.yaml") if "variants" in yaml.safe_load(path.read_text())]


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
    """papermill reads this cell line by line: no `X | None`, no second `=`, no `#`, JSON-like values only."""
    cell = next(cell for cell in code_cells(path) if "parameters" in cell["metadata"].get("tags", []))
    for line in "".join(cell["source"]).splitlines():
        assert line.count("=") == 1, line
        assert "#" not in line
        assert " | " not in line
        ast.literal_eval(line.split("=")[1].strip())
    assert notebook_parameters(path)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_study_files_fit_their_notebooks(path: Path) -> None:
    study = load_study(path)
    check_parameters(study, path.parent / study.notebook)


def test_adapters_study_has_what_was_asked() -> None:
    study = load_study(ROOT / "experiments" / "adapters.yaml")
    asked = {
        "base", "text_encoder_unet_many", "text_encoder_unet_simple", "text_encoder_no_unet_many", "text_encoder_no_unet_simple",
        "dora_prodigy", "dora_adamw8bit", "text_encoder_no_unet_simple_sparse",
    }  # fmt: skip
    assert asked <= set(study.variants)
    assert len(study.presets["quick"].seeds) == 1
    assert len(study.presets["full"].seeds) >= 6
