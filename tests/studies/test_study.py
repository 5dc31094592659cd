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
from t2ilib.environment import environment_now
from t2ilib.runfile import load_run
from t2ilib.shapes import world
from t2ilib.studies import notebooks, study, where
from t2ilib.studies.file import load_study
from t2ilib.studies.notebooks import error_text, find_notebook, notebook_parameters
from t2ilib.studies.runs import plan_runs, require_same_versions, write_out
from t2ilib.studies.study import run_study, status_rows, write_study

PARAMETERS = """name = "none"
seed = 0
output = "unset"
model = {
    "revision": "finish",  # what to do
}
adapter = None
optimizer = {"learning_rate": 0.5}
tracking = {}"""

BODY = """import json, os, pathlib, time
folder, behaviour, value = pathlib.Path(output), model.get("revision"), optimizer["learning_rate"]
with (folder / "executions.txt").open("a") as log:
    log.write("x")
print("step 1/2  loss 0.5", flush=True)
if behaviour == "fail" and not (folder / "repaired").exists():
    raise ValueError("this variant was made to fail")
if behaviour == "budget" and not (folder / "repaired").exists():
    from t2ilib.tracking.ending import Stopped
    raise Stopped(75, "training.time_budget 1h: stopped after step 1 of 2 with a checkpoint", "SCHEDULED")
if behaviour == "die":
    os._exit(7)
if behaviour == "wait" and not (folder / "checkpoints" / "step-000001").exists():
    (folder / "checkpoints" / "step-000001").mkdir(parents=True)
    time.sleep(3000)
(folder / "metrics.json").write_text(json.dumps({"answer": value + seed}))
(folder / "seen.json").write_text(json.dumps([name, adapter, tracking, os.getcwd()]))"""


@pytest.fixture
def study_file(tmp_path: Path) -> Path:
    cells = [nbformat.v4.new_code_cell(PARAMETERS), nbformat.v4.new_code_cell(BODY)]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "fake.ipynb")
    content = {
        "name": "toy",
        "question": "?",
        "notebook": "fake.ipynb",
        "reference": "plain",
        "run": {"adapter": {"rank": 2}, "optimizer": {"learning_rate": 1.0}},
        "presets": {"quick": {"seeds": [0]}, "full": {"seeds": [0, 1]}},
        "variants": {
            "plain": {"title": "Plain"},
            "other": {"title": "Other", "run": {"optimizer": {"learning_rate": 2.5}}},
            "broken": {"title": "Broken", "run": {"model": {"revision": "fail"}}},
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
    assert list(found) == ["name", "seed", "output", "model", "adapter", "optimizer", "tracking"]
    assert found["optimizer"] == "{'learning_rate': 0.5}"


def test_every_mistake_is_found_where_it_stands_before_anything_starts(study_file: Path) -> None:
    """Unknown fields, wrong types and names, impossible combinations, in any part and any preset, all in one message."""

    def spoil(content: dict) -> None:
        content["run"]["adapter"] = {"rnk": 3}
        content["presets"]["full"]["run"] = {"training": {"steps": "many"}}
        content["variants"]["other"]["run"] = {"optimizer": {"name": "adamm"}, "shapes": {"scenes": ["hart"]}}
        content["variants"]["plain"]["run"] = {"training": {"scenes": ["heart"]}}
        content["variants"]["broken"]["run"] = {"adapter": None}

    edit(study_file, spoil)
    with pytest.raises(ConfigError) as caught:
        run_study(study_file, results=study_file.parent / "results")
    assert str(caught.value).splitlines()[1:] == [
        "  run.adapter.rnk: no such field. Did you mean 'rank'?",
        "  variants.plain.run.training.scenes: no such field. It is a field of shapes.",
        "  variants.other.run.shapes.scenes.0: 'hart' does not exist; choose 'base', 'heart', 'striped' or 'blueprint'."
        " Did you mean 'heart'?",
        "  variants.other.run.optimizer.name: 'adamm' does not exist; choose 'adamw', 'adamw8bit' or 'prodigy'."
        " Did you mean 'adamw'?",
        "  variants.broken (preset quick): this run has no adapter section: add one, or set training.trains to unet or nothing",
        "  presets.full.run.training.steps: Input should be a valid integer, unable to parse string as an integer (got 'many')",
    ]
    assert not (study_file.parent / "results").exists()


def test_what_a_notebook_does_not_declare_is_told(study_file: Path) -> None:
    edit(study_file, lambda c: c["variants"]["other"]["run"].update(evaluation={"sample_every": 3}))
    with pytest.raises(ConfigError, match=r"fake.ipynb does not declare evaluation, which this study sets: add it to"):
        run_study(study_file, results=study_file.parent / "results")
    edit(study_file, lambda c: c["variants"]["other"].update(notebook="elsewhere.ipynb", run={}))
    with pytest.raises(ConfigError, match=r"elsewhere.ipynb does not exist"):
        run_study(study_file, results=study_file.parent / "results")
    assert not (study_file.parent / "results").exists()


def test_notebooks_lie_beside_the_study_file_or_come_with_the_package(study_file: Path, monkeypatch) -> None:
    """A copied study file is found its notebooks, in a checkout and where the package is installed; its own ones come first."""
    shipped = Path(notebooks.__file__).parents[2] / "experiments"
    assert find_notebook("fake.ipynb", study_file) == study_file.parent / "fake.ipynb"
    assert find_notebook("train.ipynb", study_file) == shipped / "train.ipynb"
    installed = study_file.parent / "site-packages" / "t2ilib"
    (installed / "notebooks").mkdir(parents=True)
    (installed / "notebooks" / "train.ipynb").touch()
    monkeypatch.setattr(notebooks, "PACKAGE", installed)
    assert find_notebook("train.ipynb", study_file) == installed / "notebooks" / "train.ipynb"
    (study_file.parent / "train.ipynb").touch()
    assert find_notebook("train.ipynb", study_file) == study_file.parent / "train.ipynb"
    with pytest.raises(
        ConfigError, match=r"compare.ipynb does not exist: .* comes with t2ilib \(train.ipynb, scratch.ipynb, compare"
    ):
        run_study(study_file, results=study_file.parent / "results")
    assert not (study_file.parent / "results").exists(), "told after the last run"


def test_pictures_are_looked_at_before_anything_starts(study_file: Path, caplog) -> None:
    """And the split is told, once for all runs that share it."""
    results = study_file.parent / "results"
    pictures = study_file.parent / "pictures"

    def own(content: dict) -> None:
        content.update(notebook="train.ipynb")
        content["run"] = {"adapter": {}, "data": {"path": str(pictures)}, "training": {"batch_size": 6}}
        content["variants"] = {name: {"title": name} for name in ("plain", "other")}

    edit(study_file, own)
    with pytest.raises(ConfigError, match=r"data.path .*pictures is not a folder"):
        run_study(study_file, results=results)
    world.write_folder(pictures, world.mixed_scenes(6, "train", 0, ["heart"]), 0)
    with (
        caplog.at_level("INFO", "t2ilib"),
        pytest.raises(ConfigError, match="batch_size 6 is more than the 5 training"),
    ):
        run_study(study_file, results=results)
    assert caplog.text.count("held out: ") == 1
    assert not results.exists()


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        ({"path": "nowhere"}, "prior.path nowhere is not a folder"),
        ({"prompts": ["a {red|green circle"]}, "prior.prompts: .* has a brace without its partner"),
        (
            {"prompts": ["a circle"], "num_pictures": 1},
            "prior.share makes 2 of 4 samples pictures of the class, and there are 1",
        ),
    ],
)
def test_pictures_of_the_class_are_too(study_file: Path, prior: dict, message: str) -> None:
    def with_prior(content: dict) -> None:
        content.update(notebook="train.ipynb")
        content["run"] = {"adapter": {}, "data": {"source": "shapes"}, "training": {"batch_size": 4}}
        content["variants"] = {"plain": {"title": "plain"}, "other": {"title": "other", "run": {"prior": prior}}}

    edit(study_file, with_prior)
    with pytest.raises(ConfigError, match=message):
        run_study(study_file, results=study_file.parent / "results")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(reference="plian"), "Did you mean 'plain'"),
        (lambda c: c["variants"]["other"].update(against="plian"), "Did you mean 'plain'"),
        (lambda c: c["variants"]["plain"].pop("title"), "variants.plain.title: Field required"),
        (lambda c: c.update(variant={}), "variant: Extra inputs are not permitted"),
        (lambda c: c["presets"]["quick"].update(seeds=[]), "presets.quick.seeds"),
        (
            lambda c: c["variants"].update({"alpha 4/rank 4": {"title": "x"}}),
            "'alpha 4/rank 4' is the name of a folder too",
        ),
        (lambda c: c["variants"].update({"../../escape": {"title": "x"}}), "is the name of a folder too: use letters"),
        (lambda c: c["presets"].update({"..": {"seeds": [0]}}), "'..' is the name of a folder too"),
        (lambda c: c["run"].update(seed=3), "run: leave seed out: the seeds are the preset's"),
        (lambda c: c["run"].update(evaluation={"measures": ["chekcer"]}), "'chekcer' does not exist"),
    ],
)
def test_mistakes_in_the_study_file(study_file: Path, change, message: str, monkeypatch) -> None:
    monkeypatch.setattr(study, "check_notebooks", lambda runs: None)  # which declares no evaluation
    edit(study_file, change)
    with pytest.raises(ConfigError, match=message):
        run_study(study_file, results=study_file.parent / "results")


def test_the_flat_form_is_told_with_what_it_says_in_the_new_one(study_file: Path) -> None:
    old = {
        "parameters": {"base": "tiny-sd15", "rank": 4, "optimizer": "prodigy", "study": "toy", "gone": 1},
        "presets": {"quick": {"seeds": [0], "parameters": {"steps": 3, "checked_prompts": 2}}},
        "variants": {"plain": {"title": "Plain"}, "alone": {"title": "Base", "parameters": {"kind": "none"}}},
    }
    study_file.write_text(yaml.safe_dump({"name": "toy", "question": "?", "reference": "plain"} | old))
    with pytest.raises(ConfigError, match="has `parameters`, as study files had them") as caught:
        load_study(study_file)
    shown = yaml.safe_load(str(caught.value).split("in the new form:")[1])
    assert shown["run"].pop("unknown") == {"gone": 1}
    assert shown["run"]["model"] == {"base": "tiny-sd15", "quantization": "nf4"}
    assert shown["run"]["optimizer"] == {"name": "prodigy"}
    assert shown["variants"] == {"alone": {"run": {"adapter": None, "training": {"trains": "nothing", "steps": 0}}}}
    shown["presets"]["quick"]["seeds"] = [0]
    shown["variants"] = {"plain": {"title": "Plain"}, "alone": {"title": "Base"} | shown["variants"]["alone"]}
    study_file.write_text(yaml.safe_dump({"name": "toy", "question": "?", "reference": "plain"} | shown))
    loaded = load_study(study_file)
    assert loaded.settings("quick", "plain")["shapes"]["checked_prompts"] == 2


def test_a_variant_written_out_is_the_run_that_the_study_makes(study_file: Path) -> None:
    loaded = load_study(study_file)
    run = plan_runs(loaded, study_file, "full", Path("results"), ["other"], [1])[0]
    written = study_file.parent / "run.yaml"
    written.write_text(write_out(run))
    left_out = {"output", "tracking"}
    assert load_run(written).model_dump(exclude=left_out) == run.config().model_dump(exclude=left_out)
    assert load_run(written).training_digest() == run.config().training_digest()


def test_unknown_preset_and_variant(study_file: Path) -> None:
    loaded = load_study(study_file)
    with pytest.raises(ConfigError, match=r"preset 'ful' does not exist; choose from quick, full. Did you mean 'full'"):
        plan_runs(loaded, study_file, "ful", Path("results"))
    with pytest.raises(ConfigError, match="variant 'othr' does not exist"):
        plan_runs(loaded, study_file, "quick", Path("results"), only=["othr"])


def test_a_preset_may_run_some_of_the_variants(study_file: Path) -> None:
    def change(content: dict) -> None:
        content["presets"]["quick"]["variants"] = ["other", "plain"]

    edit(study_file, change)
    study = load_study(study_file)
    assert [run.variant for run in plan_runs(study, study_file, "quick", Path("r"))] == ["plain", "other"]
    assert {run.variant for run in plan_runs(study, study_file, "full", Path("r"))} == {"plain", "other", "broken"}
    assert [run.variant for run in plan_runs(study, study_file, "quick", Path("r"), ["broken"])] == ["broken"]
    folder = study_file.parent / "results"
    for begun, told in (([], ["plain", "other"]), (["broken"], ["plain", "other", "broken"])):
        for name in begun:
            (folder / name).mkdir(parents=True)
        write_study(study, "quick", folder)
        assert list(json.loads((folder / "study.json").read_text())["variants"]) == told
    edit(study_file, lambda content: content["presets"]["quick"].update(variants=["plain", "othr"]))
    with pytest.raises(
        ConfigError, match=r"presets\.quick\.variants: variant 'othr' does not exist.*Did you mean 'other'"
    ):
        load_study(study_file)
    edit(study_file, lambda content: content["presets"]["quick"].update(variants=["other"]))
    with pytest.raises(ConfigError, match="leaves out plain, which others are compared with"):
        load_study(study_file)


def test_variants_go_over_presets_over_the_study_field_by_field(study_file: Path) -> None:
    def change(content: dict) -> None:
        content["presets"]["full"]["run"] = {"optimizer": {"learning_rate": 9.0, "name": "adamw8bit"}}
        content["variants"]["broken"]["run"] = {"adapter": None, "training": {"trains": "nothing", "steps": 0}}

    edit(study_file, change)
    runs = plan_runs(load_study(study_file), study_file, "full", Path("r"))
    said = {(run.variant, run.seed): run.settings for run in runs}
    assert said["plain", 0]["optimizer"] == {"learning_rate": 9.0, "name": "adamw8bit"}
    assert said["other", 1]["optimizer"] == {"learning_rate": 2.5, "name": "adamw8bit"}
    assert said["other", 1]["adapter"] == {"rank": 2}
    assert said["broken", 0]["adapter"] is None
    injected = next(run for run in runs if run.variant == "broken").parameters("parent")
    assert injected["model"] == {}, "what the study does not say is RunConfig's default, not the notebook's"
    assert injected["adapter"] is None
    told = {"variant": "broken", "study": "toy", "preset": "full", "mlflow.runColor": "#2ca02c"}
    assert injected["tracking"]["tags"] == told
    assert "evaluation" not in injected, "the notebook does not declare it"


def test_failures_stay_alone_and_finished_runs_are_not_run_again(study_file: Path) -> None:
    results, said = study_file.parent / "results", []
    runs = run_study(study_file, results=results, jobs=2, say=said.append)
    assert {run.variant: run.state for run in runs} == {"plain": "finished", "other": "finished", "broken": "failed"}
    assert any("FAILED: ValueError: this variant was made to fail" in line for line in said)
    result = json.loads((results / "toy-quick" / "other" / "seed0" / "result.json").read_text())
    assert result["metrics"] == {"answer": 2.5}
    assert result["run"]["optimizer"]["learning_rate"] == 2.5
    assert result["jobs"] == 2, "so that nobody compares speeds"
    name, adapter, tracking, folder = json.loads((results / "toy-quick" / "other" / "seed0" / "seen.json").read_text())
    assert (name, adapter, tracking["experiment"]) == ("other seed 0", {"rank": 2}, "toy")
    assert folder == os.getcwd(), "relative paths of a study would not mean what they mean in a run config"
    assert (results / "toy-quick" / "other" / "seed0" / "notebook.html").exists()
    assert {row["variant"]: row["state"] for row in status_rows(study_file, "quick", results)}["broken"] == "failed"

    (results / "toy-quick" / "broken" / "seed0" / "repaired").touch()
    (results / "toy-quick" / "broken" / "seed0" / "checkpoints").mkdir()
    runs = run_study(study_file, results=results, say=said.append)
    assert all(run.state == "finished" for run in runs)
    resumed = json.loads((results / "toy-quick" / "broken" / "seed0" / "result.json").read_text())
    assert resumed["jobs"] is None, "beside how many others its first steps were taken, nobody knows"
    assert executions(results) == {"toy-quick/broken/seed0": 2, "toy-quick/other/seed0": 1, "toy-quick/plain/seed0": 1}

    before = executions(results)
    run_study(study_file, results=results, say=said.append)
    assert executions(results) == before

    edit(study_file, lambda c: c["variants"]["other"]["run"]["optimizer"].update(learning_rate=7.0))
    with pytest.raises(ConfigError, match=r"other seed 0: optimizer.learning_rate 2.5 -> 7.0"):
        run_study(study_file, results=results, say=said.append)


def test_a_run_whose_time_is_spent_has_not_failed_and_goes_on(study_file: Path) -> None:
    results, said = study_file.parent / "results", []
    edit(study_file, lambda content: content["variants"]["broken"]["run"]["model"].update(revision="budget"))
    runs = run_study(study_file, only=["broken"], results=results, say=said.append)
    assert [run.state for run in runs] == ["interrupted"]
    assert "[1/1] broken seed 0: Stopped: training.time_budget 1h: stopped after step 1 of 2 with a checkpoint" in said
    (runs[0].folder / "repaired").touch()
    assert [run.state for run in run_study(study_file, only=["broken"], results=results, say=said.append)] == [
        "finished"
    ]


def test_changed_prompts_and_measures_are_measured_again_not_trained_again(study_file: Path) -> None:
    """One execution more, of the runs that it is about; what would be other steps, or steps again, is refused."""
    results, said = study_file.parent / "results", []
    fake = study_file.parent / "fake.ipynb"
    fake.write_text(fake.read_text().replace("tracking = {}", "tracking = {}\\nevaluation = {}"))

    def prompts(content: dict) -> None:
        del content["variants"]["broken"]
        content["run"]["evaluation"] = {"prompts": ["a cat"]}

    def states() -> dict[str, str]:
        return {row["variant"]: row["state"] for row in status_rows(study_file, "quick", results)}

    edit(study_file, prompts)
    run_study(study_file, results=results, say=said.append)
    edit(study_file, lambda c: c["variants"]["other"]["run"].update(evaluation={"prompts": ["a dog"], "measures": []}))
    assert states() == {"plain": "finished", "other": "edited"}
    with pytest.raises(ConfigError, match=r"prompts \['a cat'\] -> \['a dog'\] \(.* its checkpoints are gone\)"):
        run_study(study_file, results=results, say=said.append)
    other = results / "toy-quick" / "other" / "seed0"
    for folder in ("checkpoints/step-000001", "samples/step-000000"):
        (other / folder).mkdir(parents=True)
    assert states() == {"plain": "finished", "other": "outdated"}
    runs = run_study(study_file, results=results, say=said.append)
    assert [run.state for run in runs] == ["finished", "finished"]
    assert executions(results) == {"toy-quick/other/seed0": 2, "toy-quick/plain/seed0": 1}
    assert any(line.endswith("other seed 0: starting (measuring again)") for line in said)
    edit(study_file, lambda c: c["variants"]["other"]["run"]["evaluation"].update(prompts=["a hen"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, "execute_notebook", lambda *_: (1, "RuntimeError: out of memory"))
        run_study(study_file, results=results, say=said.append)
    assert states() == {"plain": "finished", "other": "outdated"}, "what was measured before is lost"
    edit(study_file, lambda c: c["variants"]["other"]["run"]["evaluation"].update(prompts=["a dog"]))
    assert states() == {"plain": "finished", "other": "finished"}
    assert "1 to do (1 of them only to measure again)" in "\n".join(said)
    assert json.loads((other / "result.json").read_text())["run"]["evaluation"]["prompts"] == ["a dog"]
    assert (other / "checkpoints" / "step-000001").exists()
    assert not (other / "samples").exists(), "grids of the prompts of before"
    edit(study_file, lambda c: c["run"]["evaluation"].update(validation_timesteps=4))
    assert states() == {"plain": "edited", "other": "edited"}, "losses of before were measured by another ruler"


def test_runs_of_other_versions_are_not_added_to(study_file: Path) -> None:
    """Told before anything runs, with what compares the newcomers all the same; nothing is asked where nothing is to run."""
    results, quiet = study_file.parent / "results", []
    edit(study_file, lambda c: c["variants"].pop("broken"))
    run_study(study_file, only=["plain"], results=results, say=quiet.append)
    path = results / "toy-quick" / "plain" / "seed0" / "result.json"
    result = json.loads(path.read_text())
    assert result["environment"] == [], "this notebook does not say what it was made with, and then nobody knows"
    path.write_text(json.dumps(result | {"environment": [environment_now("cpu")]}))
    require_same_versions(plan_runs(load_study(study_file), study_file, "quick", results))
    path.write_text(json.dumps(result | {"environment": [environment_now("cpu") | {"torch": "1.0"}]}))
    with pytest.raises(ConfigError, match=r"finished ones were made with\n  torch 1.0: plain seed 0\n") as told:
        run_study(study_file, results=results, say=quiet.append)
    assert "--only other --only <the reference> --results <another folder>" in str(told.value)
    assert executions(results) == {"toy-quick/plain/seed0": 1}
    run_study(study_file, only=["plain"], results=results, say=quiet.append)


def test_dead_kernel_is_a_failure(study_file: Path) -> None:
    """papermill marks its cells "completed"; only the exit code tells."""
    edit(study_file, lambda c: c["variants"]["other"].update(run={"model": {"revision": "die"}}))
    runs = run_study(study_file, only=["other"], results=study_file.parent / "results", say=lambda line: None)
    assert [run.state for run in runs] == ["failed"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_study_resumes(study_file: Path, number: signal.Signals) -> None:
    edit(study_file, lambda c: c["variants"]["plain"].update(run={"model": {"revision": "wait"}}))
    results = study_file.parent / "results"
    code = (
        "import sys; from pathlib import Path; from t2ilib.studies.study import run_study;"
        "run_study(Path(sys.argv[1]), only=['plain', 'other'], results=Path(sys.argv[2]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(study_file), str(results)], stdout=subprocess.PIPE, text=True
    )
    folder = results / "toy-quick" / "plain" / "seed0"
    until = time.monotonic() + 900
    while not (folder / "checkpoints" / "step-000001").exists():
        assert process.poll() is None, "the study ended before it was killed"
        assert time.monotonic() < until
        time.sleep(0.1)
    os.kill(process.pid, number)
    process.communicate()
    assert process.returncode == (128 + signal.SIGTERM if number == signal.SIGTERM else -signal.SIGKILL)
    assert not (folder / "result.json").exists()
    assert {run.variant: run.state for run in plan_runs(load_study(study_file), study_file, "quick", results)}[
        "plain"
    ] == "interrupted"

    runs = run_study(study_file, only=["plain", "other"], results=results, say=lambda line: None)
    assert [run.state for run in runs] == ["finished", "finished"]


def test_error_text_finds_the_message_in_coloured_output() -> None:
    output = "\x1b[31mTraceback\x1b[0m\nt2ilib.config.ConfigError: 2 mistakes in x:\n  a: no\n  b: no\n\nmore"
    assert error_text(output) == "ConfigError: 2 mistakes in x:\n  a: no\n  b: no"
    assert error_text("Stopped: training.time_budget 1h: stopped") == "Stopped: training.time_budget 1h: stopped"
