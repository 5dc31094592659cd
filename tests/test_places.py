"""Where results last, and the notebooks' first cell: Colab and Kaggle are emulated by what they set."""

import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest

from t2ilib import places
from t2ilib.config import ConfigError
from t2ilib.memory import GIB, MIB, require_disk
from t2ilib.places import place, results_folder, tell_place
from t2ilib.runfile import build_run

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted([*ROOT.glob("experiments/*.ipynb"), *ROOT.glob("inference/*.ipynb")])
SIGNS = ("COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE", "T2ILIB_RESULTS", "T2ILIB_BATCH", "T2ILIB_SOURCE")


@pytest.fixture(autouse=True)
def at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for sign in SIGNS:
        monkeypatch.delenv(sign, raising=False)
    monkeypatch.setattr(places, "DRIVE", tmp_path / "drive")
    monkeypatch.chdir(tmp_path)


def test_here_it_is_the_repositorys_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    assert place() == "here"
    assert results_folder("cat") == Path("results/cat")
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "experiments").mkdir()
    monkeypatch.chdir(tmp_path / "experiments")
    assert results_folder("cat") == Path("../results/cat")
    tell_place()
    assert capsys.readouterr().out == "results last in ../results\n"
    monkeypatch.setenv("T2ILIB_BATCH", "1")
    tell_place()
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("T2ILIB_RESULTS", str(tmp_path / "mine"))
    assert results_folder() == tmp_path / "mine"


def test_on_kaggle_it_is_what_kaggle_keeps(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    assert results_folder("cat") == Path("/kaggle/working/cat")
    tell_place()
    assert capsys.readouterr().out == "Kaggle: results last in /kaggle/working\n"


def test_on_colab_it_is_drive_which_is_mounted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
    asked = []

    def mount(where: str) -> None:
        asked.append(where)
        (tmp_path / "drive" / "MyDrive").mkdir(parents=True)

    drive = types.ModuleType("google.colab.drive")
    drive.mount = mount
    colab = types.ModuleType("google.colab")
    colab.drive = drive
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    for _ in range(2):
        assert results_folder("cat") == tmp_path / "drive" / "MyDrive" / "t2ilib" / "cat"
    assert asked == [str(tmp_path / "drive")]

    shutil.rmtree(tmp_path / "drive")
    drive.mount = lambda where: (_ for _ in ()).throw(ValueError("mount failed"))
    assert results_folder() == Path("/content/t2ilib")
    assert "Google Drive is not mounted (ValueError: mount failed)" in caplog.text
    assert "t2ilib results pack" in caplog.text
    drive.mount = mount
    monkeypatch.setenv("T2ILIB_BATCH", "1")
    assert results_folder() == Path("/content/t2ilib")
    assert len(asked) == 1, "a study's kernel asks nobody"


def first_cell(path: Path) -> str:
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    return "".join(cells[0]["source"])


def test_the_first_cell_is_the_same_everywhere_and_has_the_projects_address() -> None:
    """`make address URL=...` writes it into both."""
    (cell,) = {first_cell(path) for path in NOTEBOOKS}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    url = project.get("urls", {}).get("Repository")
    assert f'ADDRESS = "{f"git+{url}" if url else ""}"' in cell


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A kernel without t2ilib, on whose machine there are a torch and an old kernel; the commands that are run."""
    found, commands = importlib.util.find_spec, []
    there = {
        "torch": "2.8.0+cu126",
        "Torchvision": "0.23.0+cu126",
        "ipykernel": "6.17.1",
        "jupyter_client": "7.4.9",
        "pandas": "2.2.2",
    }
    distributions = [types.SimpleNamespace(name=name, version=version) for name, version in there.items()]
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "t2ilib" else found(name, *more)
    )
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: distributions)
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    return commands


@pytest.mark.parametrize("sign", ["COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"])
def test_the_first_cell_installs_beside_the_torch_that_is_there(
    lacking, monkeypatch: pytest.MonkeyPatch, sign: str
) -> None:
    """The command alone; it was run once by hand, in an environment with a torch and Colab's kernel, both of which stayed as they were."""
    monkeypatch.setenv(sign, "x")
    monkeypatch.setenv("T2ILIB_SOURCE", "git+https://example.org/t2ilib")
    monkeypatch.setenv("T2ILIB_BATCH", "1")
    exec(first_cell(NOTEBOOKS[0]), {})
    (command,) = lacking
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert command[-1] == "git+https://example.org/t2ilib"
    pins = Path(command[command.index("-c") + 1]).read_text().split()
    assert pins == ["torch==2.8.0+cu126", "torchvision==0.23.0+cu126", "ipykernel==6.17.1", "jupyter-client==7.4.9"]


@pytest.mark.parametrize(
    "values", [{}, {"T2ILIB_SOURCE": "git+https://example.org/t2ilib"}, {"COLAB_RELEASE_TAG": "x"}]
)
def test_the_first_cell_installs_nothing_at_home_or_from_nowhere(lacking, monkeypatch, values: dict) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    cell = first_cell(NOTEBOOKS[0]).replace('ADDRESS = "git+', 'ADDRESS = "" or "" and "')
    with pytest.raises(RuntimeError, match="t2ilib is not installed for this kernel"):
        exec(cell, {})
    assert not lacking


def test_a_disk_as_small_as_colabs_is_told_of_before_anything_is_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(107 * GIB, 87 * GIB, 20 * GIB))
    require_disk(tmp_path, 15 * GIB, "a base")
    with pytest.raises(ConfigError, match=f"need {25 * GIB / MIB:,.0f} MiB under .*, and 20,480 MiB are free"):
        require_disk(tmp_path, 25 * GIB, "checkpoints")


def test_pictures_are_read_where_nothing_can_be_written(tmp_path: Path) -> None:
    """As /kaggle/input is: nothing is left beside the pictures."""
    from PIL import Image

    from t2ilib.data.dataset import load_datasets

    data = tmp_path / "input"
    data.mkdir()
    for number in range(4):
        Image.effect_noise((64, 64), 40 + number).save(data / f"{number}.png")
        (data / f"{number}.txt").write_text(f"picture {number}")
    data.chmod(0o555)
    before = {path: path.stat().st_mtime_ns for path in (data, *data.iterdir())}
    try:
        training, held_out = load_datasets(
            build_run(
                {"output": str(tmp_path / "out"), "adapter": {}, "data": {"path": str(data), "validation_share": 0.25}}
            )
        )
    finally:
        data.chmod(0o755)
    assert len(training) + len(held_out) == 4
    assert {path: path.stat().st_mtime_ns for path in (data, *data.iterdir())} == before
