"""Studies: mistakes are told before anything starts, runs are finished once, failures stay alone, kills resume.

The notebook here does no training: it writes what the runner expects, fails or waits as its parameters say.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import yaml

from t2ilib.config import ConfigError
from t2ilib.notebooks import error_text, notebook_parameters
from t2ilib.study import (
    load_study,
    plan_runs,
    run_study,
    status_rows,
)

PARAMETERS = """variant = "none"
seed = 0
output = "unset"
behaviour = "finish"
value: Optional[float] = None"""

BODY = """import json, os, pathlib, time
folder = pathlib.Path(output)
with (folder / "executions.txt").open("a") as log:
    log.write("x")
print("step 1/2  loss 0.5", flush=True)
if behaviour == "fail" and not (folder / "repaired").exists():
    raise ValueError("this variant was made to fail")
if behaviour == "die":
    os._exit(7)
if behaviour == "wait" and not (folder / "checkpoints" / "step-000001").exists():
    (folder / "checkpoints" / "step-000001").mkdir(parents=True)
    time.sleep(120)
(folder / "metrics.json").write_text(json.dumps({"answer": (value or 0.0) + seed}))"""


@pytest.fixture
def study_file(tmp_path: Path) -> Path:
    cells = [nbformat.v4.new_code_cell("from typing import Optional\n" + PARAMETERS), nbformat.v4.new_code_cell(BODY)]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "fake.ipynb")
    words = dict.fromkeys(("title", "overview", "hypothesis", "how_it_helps", "origin"), "-")
    content = {
        "name": "toy",
        "question": "?",
        "notebook": "fake.ipynb",
        "reference": "plain",
        "parameters": {"value": 1.0},
        "presets": {"quick": {"seeds": [0]}, "full": {"seeds": [0, 1]}},
        "variants": {
            "plain": words,
            "other": words | {"parameters": {"value": 2.5}},
            "broken": words | {"parameters": {"behaviour": "fail"}},
        },
    }
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def edit(path: Path, change) -> None:
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content, sort_keys=False))


def executions(results: Path) -> dict[str, int]:
    return {str(p.parent.relative_to(results)): len(p.read_text()) for p in sorted(results.rglob("executions.txt"))}


def test_notebook_parameters_are_read_without_running_it(study_file: Path) -> None:
    found = notebook_parameters(study_file.parent / "fake.ipynb")
    assert found == {"variant": "'none'", "seed": "0", "output": "'unset'", "behaviour": "'finish'", "value": "None"}


def test_typos_are_found_before_anything_starts(study_file: Path) -> None:
    def misspell(content: dict) -> None:
        content["parameters"]["valeu"] = 1
        content["variants"]["other"]["parameters"]["behavior"] = "finish"

    edit(study_file, misspell)
    with pytest.raises(ConfigError) as caught:
        run_study(study_file, results=study_file.parent / "results")
    message = str(caught.value)
    assert "parameters.valeu (did you mean 'value'?)" in message
    assert "variants.other.parameters.behavior (did you mean 'behaviour'?)" in message
    assert len(message.splitlines()) < 25
    assert not (study_file.parent / "results").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(reference="plian"), "Did you mean 'plain'"),
        (lambda c: c["variants"]["plain"].pop("hypothesis"), "variants.plain.hypothesis: Field required"),
        (lambda c: c.update(variant={}), "variant: Extra inputs are not permitted"),
        (lambda c: c["presets"]["quick"].update(seeds=[]), "presets.quick.seeds"),
    ],
)
def test_mistakes_in_the_study_file(study_file: Path, change, message: str) -> None:
    edit(study_file, change)
    with pytest.raises(ConfigError, match=message):
        load_study(study_file)


def test_unknown_preset_and_variant(study_file: Path) -> None:
    study = load_study(study_file)
    with pytest.raises(ConfigError, match=r"preset 'ful' does not exist; choose from quick, full. Did you mean 'full'"):
        plan_runs(study, "ful", Path("results"))
    with pytest.raises(ConfigError, match="variant 'othr' does not exist"):
        plan_runs(study, "quick", Path("results"), only=["othr"])


def test_variants_go_over_presets_over_the_study(study_file: Path) -> None:
    edit(study_file, lambda c: c["presets"]["full"].update(parameters={"value": 9.0}))
    runs = {
        (run.variant, run.seed): run.parameters["value"] for run in plan_runs(load_study(study_file), "full", Path("r"))
    }
    assert runs[("plain", 0)] == 9.0
    assert runs[("other", 1)] == 2.5


@pytest.mark.timeout(200)
def test_failures_stay_alone_and_finished_runs_are_not_run_again(study_file: Path) -> None:
    results, said = study_file.parent / "results", []
    runs = run_study(study_file, results=results, jobs=2, say=said.append)
    assert {run.variant: run.state for run in runs} == {"plain": "finished", "other": "finished", "broken": "failed"}
    assert any("FAILED: ValueError: this variant was made to fail" in line for line in said)
    result = json.loads((results / "toy-quick" / "other" / "seed0" / "result.json").read_text())
    assert result["metrics"] == {"answer": 2.5}
    assert result["parameters"]["value"] == 2.5
    assert (results / "toy-quick" / "other" / "seed0" / "notebook.html").exists()
    assert {row["variant"]: row["state"] for row in status_rows(study_file, "quick", results)}["broken"] == "failed"

    (results / "toy-quick" / "broken" / "seed0" / "repaired").touch()
    runs = run_study(study_file, results=results, say=said.append)
    assert all(run.state == "finished" for run in runs)
    assert executions(results) == {"toy-quick/broken/seed0": 2, "toy-quick/other/seed0": 1, "toy-quick/plain/seed0": 1}

    before = executions(results)
    run_study(study_file, results=results, say=said.append)
    assert executions(results) == before

    edit(study_file, lambda c: c["variants"]["other"]["parameters"].update(value=7.0))
    with pytest.raises(ConfigError, match=r"other seed 0: value 2.5 -> 7.0"):
        run_study(study_file, results=results, say=said.append)


@pytest.mark.timeout(120)
def test_dead_kernel_is_a_failure(study_file: Path) -> None:
    """papermill marks its cells "completed"; only the exit code tells."""
    edit(study_file, lambda c: c["variants"]["other"].update(parameters={"behaviour": "die"}))
    runs = run_study(study_file, only=["other"], results=study_file.parent / "results", say=lambda line: None)
    assert [run.state for run in runs] == ["failed"]


@pytest.mark.timeout(200)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_study_resumes(study_file: Path, number: signal.Signals) -> None:
    edit(study_file, lambda c: c["variants"]["plain"].update(parameters={"behaviour": "wait"}))
    results = study_file.parent / "results"
    code = (
        "import sys; from pathlib import Path; from t2ilib.study import run_study;"
        "run_study(Path(sys.argv[1]), only=['plain', 'other'], results=Path(sys.argv[2]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(study_file), str(results)], stdout=subprocess.PIPE, text=True
    )
    folder = results / "toy-quick" / "plain" / "seed0"
    until = time.monotonic() + 90
    while not (folder / "checkpoints" / "step-000001").exists() and time.monotonic() < until:
        time.sleep(0.1)
    os.kill(process.pid, number)
    process.communicate(timeout=60)
    assert process.returncode == (128 + signal.SIGTERM if number == signal.SIGTERM else -signal.SIGKILL)
    assert not (folder / "result.json").exists()
    assert {run.variant: run.state for run in plan_runs(load_study(study_file), "quick", results)}[
        "plain"
    ] == "interrupted"

    runs = run_study(study_file, only=["plain", "other"], results=results, say=lambda line: None)
    assert [run.state for run in runs] == ["finished", "finished"]


def test_error_text_finds_the_message_in_coloured_output() -> None:
    output = "\x1b[31mTraceback\x1b[0m\nt2ilib.config.ConfigError: 2 mistakes in x:\n  a: no\n  b: no\n\nmore"
    assert error_text(output) == "ConfigError: 2 mistakes in x:\n  a: no\n  b: no"
