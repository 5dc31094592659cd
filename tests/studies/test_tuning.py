"""Tuning: each variant at its own best, on seeds, pictures and prompts that its final runs never see, however often it is killed.

No notebook runs here but in one test: a stand-in writes what a notebook would, a U over the learning rate.
"""

import json
import math
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import nbformat
import pytest
import yaml
from mlflow import MlflowClient

from t2ilib.config import ConfigError
from t2ilib.runfile import build_run
from t2ilib.shapes import world
from t2ilib.studies import executor, where
from t2ilib.studies.file import load_study
from t2ilib.studies.runs import plan_runs
from t2ilib.studies.study import run_study, write_study
from t2ilib.studies.tuned import tuned_file, tuned_preset
from t2ilib.studies.tuning import PATIENCE, SCORE, tune_study
from t2ilib.tracking.store import open_client, sqlite_uri, tracking_uri
from t2ilib.tracking.tracker import open_tracker

RATE = "optimizer.learning_rate"
PARAMETERS = """name = "none"
seed = 0
output = "unset"
model = {}
adapter = None
data = {}
shapes = {}
optimizer = {}
training = {}
evaluation = {}
tracking = {}"""
MEASURES = {
    "concept/all": {"title": "learned", "unit": "share", "better": "higher", "role": "learned"},
    "base_kept/all": {"title": "kept", "unit": "share", "better": "higher", "role": "kept"},
}
BODY = f"""import json, math, os, pathlib
folder, rate, best = pathlib.Path(output), optimizer.get("learning_rate", 1.0), float(model.get("revision") or 1e-3)
with (folder / "executions.txt").open("a") as log:
    log.write("x")
if rate > 0.05 and optimizer.get("name") != "prodigy":
    raise type("NonFiniteLoss", (ValueError,), {{}})("step 3: the loss is not a number")
share = max(0.0, 1 - abs(math.log10(rate / best)) / 3)
(folder / "metrics.json").write_text(json.dumps({{"concept/all": share, "base_kept/all": 1.0, "seen": seed}}))
(folder / "metrics.about.json").write_text(json.dumps({MEASURES!r}))"""


def stand_in(notebook, output, parameters, variables, follow, started, stopping, pause: float = 0.0) -> tuple[int, str]:
    """What a notebook would leave, after `pause` seconds in which it may be killed."""
    told = yaml.safe_load(Path(parameters).read_text())
    folder = Path(told["output"])
    (folder / "checkpoints" / "step-000001").mkdir(parents=True, exist_ok=True)
    time.sleep(pause)
    names = ("output", "seed", "model", "optimizer")
    try:
        exec(BODY, {name: told[name] for name in names})
    except ValueError as error:
        return 1, f"{type(error).__name__}: {error}"
    (folder / "seen.yaml").write_text(yaml.safe_dump(told))
    return 0, ""


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
        "base": "base",
        "run": {
            "adapter": {"rank": 2},
            "data": {"source": "shapes"},
            "shapes": {"scenes": ["heart"], "num_pictures": 8, "checked_prompts": 4},
            "optimizer": {"learning_rate": 0.002},
            "training": {"batch_size": 2, "steps": 3},
        },
        "presets": {"quick": {"seeds": [0, 1]}},
        "search": {RATE: {"low": 1e-4, "high": 1e-2, "log": True}},
        "tuning": {"trials": 6, "seeds": [1000]},
        "variants": {
            "base": {"title": "Base", "run": {"adapter": None, "training": {"trains": "nothing", "steps": 0}}},
            "plain": {"title": "Plain", "run": {"model": {"revision": "0.001"}}},
            "far": {"title": "Far", "run": {"model": {"revision": "0.02"}}},
            "itself": {"title": "Itself", "run": {"optimizer": {"name": "prodigy", "learning_rate": 1.0}}},
        },
    }
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An MLflow store for all these tests: making one takes longer than all else that they do."""
    uri = sqlite_uri(tmp_path_factory.mktemp("store") / "mlflow.db")
    open_client(uri, "toy", tmp_path_factory.getbasetemp())
    return uri


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch, store: str) -> None:
    """Stand-ins in place of notebooks."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setattr(where, "execute_notebook", stand_in)
    monkeypatch.setattr(executor, "export_html", lambda notebook, hide_code: notebook)


def edit(path: Path, change) -> None:
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content, sort_keys=False))


def quiet(line: str) -> None:
    pass


def trials_of(file: Path, variant: str) -> list[dict]:
    return json.loads(file.read_text())["variants"][variant]["trials"]


def test_every_variant_is_tuned_to_its_own_best_and_runs_at_it(study_file: Path, fast: None) -> None:
    """One inside the range, one beyond it, whose range is extended until training diverges, one that tunes itself."""
    results, said = study_file.parent / "results", []
    file = tune_study(study_file, results=results, say=said.append)
    assert file == results / "toy-quick-tuning" / "tuning.json"
    told = json.loads(file.read_text())
    assert list(told["variants"]) == ["plain", "far", "itself"], "the untouched base has nothing to tune"
    plain, far, itself = told["variants"].values()
    assert [trial["values"][RATE] for trial in plain["trials"][:5]] == [1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2]
    assert len(plain["trials"]) == 6
    best = plain["trials"][plain["best"]]
    assert best["values"] == {RATE: 1e-3}
    assert best["score"] == pytest.approx(1.0)
    assert (plain["class"], far["class"], itself["class"]) == ("tuned", "tuned", "tunes itself")
    assert [trial["values"][RATE] for trial in far["trials"][5:]] == [0.03, 0.09], (
        "as far as it takes, beyond its budget"
    )
    assert [trial["state"] for trial in far["trials"]] == ["scored"] * 6 + ["diverged"]
    assert far["trials"][far["best"]]["values"] == {RATE: 0.03}
    assert far["at_end"] == plain["at_end"] == {}
    assert any("far trial 6 diverged" in line for line in said)
    assert [trial["values"] for trial in itself["trials"]] == [{}], "run once, for the table"
    assert told["score"]["title"] == "learned and kept together"

    study = load_study(study_file)
    at_best = {run.variant: run.settings for run in plan_runs(study, study_file, "quick-tuned", results)}
    assert at_best["plain"]["optimizer"] == {"learning_rate": 1e-3}
    assert at_best["far"]["optimizer"] == {"learning_rate": 0.03}
    assert at_best["itself"]["optimizer"] == {"name": "prodigy", "learning_rate": 1.0}
    assert "part" not in at_best["plain"]["data"], "final runs see the final pictures"
    common = {run.variant: run.settings for run in plan_runs(study, study_file, "quick", results)}
    assert common["far"]["optimizer"] == {"learning_rate": 0.002}, "the study at one common rate stays"
    runs = run_study(study_file, "quick-tuned", jobs=2, results=results, say=quiet)
    assert all(run.state == "finished" for run in runs)
    finished = json.loads((results / "toy-quick-tuned" / "far" / "seed1" / "result.json").read_text())
    assert finished["run"]["optimizer"]["learning_rate"] == 0.03
    shown = json.loads((results / "toy-quick-tuned" / "study.json").read_text())
    assert shown["variants"]["far"]["run"]["optimizer"]["learning_rate"] == 0.03
    assert shown["tuned"]["far"] == {"optimizer": {"learning_rate": 0.03}}
    assert (results / "toy-quick-tuned" / "tuning.json").read_text() == file.read_text()

    counted = executions(results / "toy-quick-tuning")
    assert tune_study(study_file, results=results, say=quiet) == file
    assert executions(results / "toy-quick-tuning") == counted, "a tuning that has ended makes no more trials"
    edit(study_file, lambda c: c["tuning"].update(trials=7))
    tune_study(study_file, results=results, say=quiet)
    assert [len(trials_of(file, name)) for name in ("plain", "far", "itself")] == [7, 7, 1]


def executions(folder: Path) -> Counter[str]:
    return Counter({str(p.parent.relative_to(folder)): len(p.read_text()) for p in folder.rglob("executions.txt")})


def test_trials_are_runs_of_their_own_in_mlflow(study_file: Path, fast: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child run a trial, with its values and its score, under a parent of their own."""
    results = study_file.parent / "results"

    def logged(notebook, output, parameters, *rest) -> tuple[int, str]:
        told = yaml.safe_load(Path(parameters).read_text())
        with open_tracker(build_run(told)) as tracker:
            tracker.log_metrics({"loss": 1.0}, 3)
        return stand_in(notebook, output, parameters, *rest)

    monkeypatch.setattr(where, "execute_notebook", logged)
    edit(study_file, lambda c: [c["variants"].pop("far"), c["tuning"].update(trials=5)])
    file = tune_study(study_file, results=results, say=quiet)
    assert [trial["state"] for trial in trials_of(file, "plain")] == ["scored"] * 5
    client = MlflowClient(tracking_uri(None, results))
    parent = (file.parent / "mlflow-parent.txt").read_text()
    assert client.get_run(parent).data.tags["preset"] == "quick-tuning"
    assert client.get_run(parent).info.status == "FINISHED"
    experiment = client.get_run(parent).info.experiment_id
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    found = {(run.data.tags["variant"], run.data.tags["trial"]): run for run in children}
    assert found.keys() == {("plain", str(number)) for number in range(5)} | {("itself", "0")}
    for trial in trials_of(file, "plain"):
        run = found["plain", str(trial["number"])]
        assert run.data.metrics[SCORE] == pytest.approx(trial["score"])
        assert float(run.data.params[RATE]) == trial["values"][RATE]
        assert run.data.params["data.part"] == "tuning"


def test_a_tuning_that_is_killed_again_and_again_loses_no_trial_and_makes_none_twice(
    study_file: Path, fast: None
) -> None:
    """And ends with the trials of one that nothing disturbed. A trial whose notebook had not ended is the same one again, in its folder."""
    edit(study_file, lambda c: [c["tuning"].update(trials=7), c["variants"].pop("itself")])
    straight = tune_study(study_file, jobs=3, results=study_file.parent / "straight", say=quiet)
    results = study_file.parent / "results"
    folder, script = results / "toy-quick-tuning", Path(__file__).parents[1] / "tuning_killing.py"
    done = subprocess.run(
        [sys.executable, str(script), str(study_file), str(results), "3", "6"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("killed") >= 3
    for variant in ("plain", "far"):
        both = [trials_of(file, variant) for file in (straight, folder / "tuning.json")]
        seen = [[(t["number"], t["state"], t["values"], t["score"]) for t in trials] for trials in both]
        assert seen[0] == seen[1]
        assert len(list((folder / variant).glob("trial-*"))) == len(seen[1])


def test_a_trial_that_fails_is_tried_again_by_the_next_call_and_then_given_up(
    study_file: Path, fast: None, monkeypatch
) -> None:
    edit(study_file, lambda c: [c["variants"].pop("far"), c["variants"].pop("itself")])
    results, said = study_file.parent / "results", []

    def broken(notebook, output, parameters, *rest) -> tuple[int, str]:
        rate = yaml.safe_load(Path(parameters).read_text())["optimizer"]["learning_rate"]
        return (1, "RuntimeError: out of memory") if rate == 3.16e-3 else stand_in(notebook, output, parameters, *rest)

    monkeypatch.setattr(where, "execute_notebook", broken)
    file = tune_study(study_file, results=results, say=said.append)
    assert [t["state"] for t in trials_of(file, "plain")] == ["scored"] * 3 + ["running", "scored"]
    assert not tuned_file(study_file).exists(), "its search has not ended"
    assert PATIENCE == 2
    tune_study(study_file, results=results, say=said.append)
    trials = trials_of(file, "plain")
    assert [t["state"] for t in trials] == ["scored"] * 3 + ["given up", "scored", "scored"]
    assert executions(file.parent)["plain/trial-000/seed1000"] == 1
    assert any("trial 3 failed 2 times and is given up" in line for line in said)


def test_several_seeds_a_trial_are_averaged_and_a_formula_may_be_a_loss(study_file: Path, fast: None) -> None:
    def change(content: dict) -> None:
        content.update(score="concept/all - 0.001 * seen")
        content["tuning"] = {"trials": 5, "seeds": [1000, 1002]}
        content["variants"] = {name: content["variants"][name] for name in ("base", "plain")}

    edit(study_file, change)
    file = tune_study(study_file, results=study_file.parent / "results", say=quiet)
    scores = [trial["score"] for trial in trials_of(file, "plain")]
    shares = [1 - abs(math.log10(trial["values"][RATE] / 1e-3)) / 3 for trial in trials_of(file, "plain")]
    assert scores == pytest.approx([share - 1.001 for share in shares])


def test_what_was_asked_may_not_change_while_it_is_searched(study_file: Path, fast: None) -> None:
    results = study_file.parent / "results"
    edit(study_file, lambda c: [c["variants"].pop("far"), c["variants"].pop("itself")])
    tune_study(study_file, results=results, say=quiet)
    edit(study_file, lambda c: c["search"][RATE].update(low=1e-5))
    with pytest.raises(ConfigError, match="plain was searched with other search than the study now says"):
        tune_study(study_file, results=results, say=quiet)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["tuning"].update(seeds=[1, 2000]), "tuning.seeds: 1: seeds of the preset quick too"),
        (lambda c: c["search"].update({"optimizer.rate": {"low": 1, "high": 2}}), "search.optimizer.rate: no such field; optimizer has"),
        (lambda c: c["search"].update({"adapter.dropout": {"low": 0, "high": 2}}), "search.adapter.dropout: 2.0 is refused"),
        (lambda c: c["variants"]["far"].update(search={"adapter.rank": {"low": 0, "high": 2}}), "variants.far.search.adapter.rank: 0.0 is refused"),
        (lambda c: c["tuning"].update(trials=3), "tuning.trials"),
        (lambda c: c["tuning"].update(run={"training": {"steps": -1}}), "tuning.run: it is refused over base, preset quick"),
        (lambda c: c.update(score="learned +"), "score 'learned \\+' is no formula"),
        (lambda c: c.update(search={}), "says nothing to search: add"),
        (lambda c: c["run"]["shapes"].update(num_pictures=1500), "data.part tuning needs"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_a_trial_is_made(study_file: Path, change, message: str) -> None:
    edit(study_file, change)
    with pytest.raises(ConfigError, match=message):
        tune_study(study_file, results=study_file.parent / "results", say=quiet)
    assert not (study_file.parent / "results").exists()


def test_what_is_tuned_on_is_no_part_of_final_runs(study_file: Path, fast: None) -> None:
    """Seeds, scenes and prompts of the drawn world; `tests/shapes` and `tests/data` show that all scenes differ."""
    results = study_file.parent / "results"
    edit(study_file, lambda c: [c["variants"].pop("far"), c["variants"].pop("itself")])
    file = tune_study(study_file, results=results, say=quiet)
    seen = [yaml.safe_load(path.read_text()) for path in file.parent.rglob("seen.yaml")]
    assert len(seen) == 6
    assert {told["seed"] for told in seen} == {1000}
    assert {told["data"]["part"] for told in seen} == {"tuning"}
    with pytest.raises(ConfigError, match=r"seeds 1000 are those that quick-tuned was tuned with"):
        plan_runs(load_study(study_file), study_file, "quick-tuned", results, seeds=[7, 1000])


def test_prompts_on_ones_own_pictures_are_others_than_those_of_final_runs(study_file: Path, fast: None) -> None:
    results, pictures = study_file.parent / "results", study_file.parent / "pictures"
    world.write_folder(pictures, world.mixed_scenes(40, "train", 0, ["heart"]), 0)

    def own(content: dict) -> None:
        content["run"] |= {"data": {"path": str(pictures), "validation_share": 0.3}}
        del content["run"]["shapes"]
        content["variants"] = {name: content["variants"][name] for name in ("base", "plain")}

    edit(study_file, own)
    file = tune_study(study_file, results=results, say=quiet)
    final = plan_runs(load_study(study_file), study_file, "quick", results)[-1].config()
    asked = {
        prompt
        for told in file.parent.rglob("seen.yaml")
        for prompt in yaml.safe_load(told.read_text())["evaluation"]["prompts"]
    }
    assert 2 <= len(asked) <= 8
    from t2ilib.data.dataset import load_datasets

    assert not asked & set(load_datasets(final)[1].captions())

    edit(study_file, lambda c: c["run"].update(evaluation={"prompts": ["a heart", "a red heart"]}))
    edit(study_file, lambda c: c["tuning"].update(prompts=["a blue heart", "a heart"]))
    with pytest.raises(ConfigError, match=r"tuning.prompts: 'a heart' is a prompt of the final runs of plain too"):
        tune_study(study_file, results=results, say=quiet)
    for caption in pictures.glob("metadata.jsonl"):
        lines = [json.loads(line) | {"text": "a heart"} for line in caption.read_text().splitlines()]
        caption.write_text("\n".join(map(json.dumps, lines)))
    edit(study_file, lambda c: c["tuning"].update(prompts=[]))
    with pytest.raises(ConfigError, match=r"give tuning\.prompts"):
        tune_study(study_file, results=results, say=quiet)


def test_variants_that_were_not_tuned_do_not_run_beside_those_that_were(study_file: Path, fast: None) -> None:
    results = study_file.parent / "results"
    with pytest.raises(ConfigError, match="preset 'quick-tuned' does not exist"):
        plan_runs(load_study(study_file), study_file, "quick-tuned", results)
    with pytest.raises(ConfigError, match=r"preset quick was not tuned: t2ilib study tune .*toy.yaml --preset quick"):
        tuned_preset(study_file, "quick")
    tune_study(study_file, only=["plain"], results=results, say=quiet)
    assert tuned_preset(study_file, "quick") == "quick-tuned"
    with pytest.raises(
        ConfigError, match=r"far, itself were not tuned.*t2ilib study tune .*toy.yaml --preset quick --only far"
    ):
        run_study(study_file, "quick-tuned", results=results, say=quiet)
    with pytest.raises(ConfigError, match="is at tuned values already"):
        tune_study(study_file, "quick-tuned", results=results, say=quiet)
    tune_study(study_file, only=["far", "itself"], results=results, say=quiet)
    assert list(load_study(study_file).presets["quick-tuned"].tuned) == ["plain", "far", "itself"]
    write_study(load_study(study_file), "quick-tuned", results / "toy-quick-tuned")
    edit(study_file, lambda c: c["presets"].update({"quick-tuned": {"seeds": [3]}}))
    with pytest.raises(ConfigError, match=r"presets.quick-tuned is what .*toy.tuned.yaml makes of quick"):
        load_study(study_file)


def test_a_gpu_is_shared_while_tuning_only_if_that_is_asked(study_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("t2ilib.studies.where.visible_cards", lambda: ["0"])
    with pytest.raises(ConfigError, match=r"--jobs 2: this machine's GPU takes 1 notebook at a time.*--per-card 2"):
        tune_study(study_file, jobs=2, results=study_file.parent / "results")
    assert not list((study_file.parent / "results").rglob("trial-*"))
