"""Results taken home: what is packed, what comes of it elsewhere, and that doing it twice adds nothing. The stores are read by MLflow's own client."""

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from mlflow import MlflowClient
from typer.testing import CliRunner

from t2ilib.adapters.load import adapter_file
from t2ilib.cli import app
from t2ilib.config import ConfigError
from t2ilib.data.download.archives import ArchiveError
from t2ilib.drawing.finding import list_adapters, resolve
from t2ilib.drawing.settings import AdapterChoice
from t2ilib.runfile import build_run
from t2ilib.studies.homecoming import merge_results
from t2ilib.studies.parcel import INDEX, pack_results
from t2ilib.tracking.models import MODEL_TAG, register_version, registered
from t2ilib.tracking.store import open_client, sqlite_uri, tracking_uri
from t2ilib.tracking.tracker import open_tracker
from t2ilib.training.loop import train

LOSS = "A first look/loss"
NAME = "study-quick"


def settings(output: Path, **sections) -> dict:
    return {
        "output": str(output),
        "adapter": {"rank": 2, "init": "gaussian"},
        "data": {"source": "shapes"},
        "shapes": {"scenes": ["heart"], "num_pictures": 4},
        "training": {"steps": 2, "batch_size": 2, "checkpoint_every": 1},
        "evaluation": {"validate_every": 0, "sample_every": 0, "validation_timesteps": 1, "validation_pictures": 1}
        | {"prompts": ["a red heart"], "num_inference_steps": 1},
        **sections,
    }


@pytest.fixture(scope="module")
def lent(tmp_path_factory) -> Path:
    """The results folder of a machine that is given back: a study's run with an adapter under a parent, registered; and a report."""
    results = tmp_path_factory.mktemp("lent") / "results"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        client, experiment = open_client(tracking_uri(None, results), "study", results)
        parent = client.create_run(experiment, run_name="parent").info.run_id
        client.set_terminated(parent)
        tracking = {"experiment": "study", "parent_run_id": parent, "tags": {"variant": "lora"}}
        run = build_run(settings(results / NAME / "lora" / "seed0", tracking=tracking))
        with open_tracker(run, results) as tracker:
            train(run, tracker)
        model = client.get_run(tracker.run_id).data.tags[MODEL_TAG]
        register_version(client, NAME, model, tracker.run_id, "champion", {"variant": "lora"})
    (results / NAME / "report.md").write_text("# What the study found\n")
    (results / NAME / "lora" / "seed0" / "result.json").write_text(json.dumps({"mlflow_run_id": tracker.run_id}))
    return results


@pytest.fixture(autouse=True)
def no_store_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def client_of(results: Path) -> MlflowClient:
    return MlflowClient(tracking_uri(None, results))


def all_runs(client: MlflowClient) -> dict:
    found = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return {run.info.run_id: run for run in found}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith("mlflow.db")
    }


def test_what_is_packed_is_small_and_has_what_matters(lent: Path, tmp_path: Path) -> None:
    packed = pack_results(lent, tmp_path / "home.zip")
    with zipfile.ZipFile(packed.file) as archive:
        names = set(archive.namelist())
        copies = json.loads(archive.read(INDEX))["copies"]
    run = f"{NAME}/lora/seed0"
    assert packed.runs == (run,)
    assert {f"{run}/run.yaml", f"{run}/metrics.jsonl", f"{NAME}/report.md", "mlflow.db"} <= names
    assert not [name for name in names if "checkpoints" in name]
    assert packed.left_out["checkpoints"] > 0
    adapters = [name for name in (*names, *copies) if name.endswith("pytorch_lora_weights.safetensors")]
    assert len(adapters) == 3, "the run's, its artifact, its model"
    assert len(names.intersection(adapters)) == 1, "packed once"
    with pytest.raises(ConfigError, match="is there already"):
        pack_results(lent, packed.file)
    whole = pack_results(lent, tmp_path / "whole.zip", checkpoints=True)
    assert whole.size > packed.size
    assert "checkpoints" not in whole.left_out
    assert not list(tmp_path.glob("*.part"))


def test_home_it_is_what_it_was_and_twice_adds_nothing(lent: Path, tmp_path: Path) -> None:
    away, home = tmp_path / "home.zip", tmp_path / "results"
    done = CliRunner().invoke(app, ["results", "pack", str(lent), str(away)])
    assert done.exit_code == 0, done.output
    assert "MiB" in done.output
    gone = lent.rename(lent.with_name("given-back"))
    try:
        done = CliRunner().invoke(app, ["results", "merge", str(away), "--into", str(home)])
        assert done.exit_code == 0, done.output
        assert "1 new" in done.output
    finally:
        gone.rename(lent)
    before, after = client_of(lent), client_of(home)
    old, new = all_runs(before), all_runs(after)
    assert old.keys() == new.keys(), "ids are kept"
    for run_id, run in old.items():
        found = new[run_id]
        assert found.data.params == run.data.params
        assert found.data.metrics == run.data.metrics
        assert {k: v for k, v in found.data.tags.items() if k != MODEL_TAG} == {
            k: v for k, v in run.data.tags.items() if k != MODEL_TAG
        }
        assert (found.info.status, found.info.start_time, found.info.end_time, found.info.run_name) == (
            run.info.status, run.info.start_time, run.info.end_time, run.info.run_name,
        )  # fmt: skip
        assert [d.dataset.digest for d in found.inputs.dataset_inputs] == [
            d.dataset.digest for d in run.inputs.dataset_inputs
        ]
        assert found.info.artifact_uri.startswith(home.as_uri())
        for name in run.data.metrics:
            assert [(m.step, m.value, m.timestamp) for m in after.get_metric_history(run_id, name)] == [
                (m.step, m.value, m.timestamp) for m in before.get_metric_history(run_id, name)
            ]
    child = next(run for run in new.values() if "mlflow.parentRunId" in run.data.tags)
    assert child.data.tags["mlflow.parentRunId"] in new
    place = Path(child.info.artifact_uri.removeprefix("file://"))
    assert (place / "run.yaml").exists()
    assert registered(tracking_uri(None, home)) == [f"models:/{NAME}@champion"]
    resolved = resolve(AdapterChoice(path=f"models:/{NAME}@champion"), home)
    assert home in resolved.parents
    ours = home / NAME / "lora" / "seed0"
    assert (
        resolved.read_bytes()
        == adapter_file(ours).read_bytes()
        == adapter_file(lent / NAME / "lora" / "seed0").read_bytes()
    )
    model = after.get_logged_model(child.data.tags[MODEL_TAG].removeprefix("models:/"))
    text = (Path(model.artifact_location.removeprefix("file://")) / "MLmodel").read_text()
    assert model.model_id in text
    assert [found.name for found in list_adapters(home)] == [f"{NAME}/lora/seed0"]
    note = json.loads((ours / "tracking.json").read_text())
    assert note["uri"] == tracking_uri(None, home)
    assert json.loads((ours / "result.json").read_text())["mlflow_run_id"] == note["run_id"] == child.info.run_id

    files, counts = (
        contents(home),
        [len(after.get_metric_history(child.info.run_id, name)) for name in child.data.metrics],
    )
    for source in (away, lent):
        again = merge_results([source], home)[0]
        assert (again.new, again.updated, again.num_files, again.conflicts) == ([], [], 0, [])
        assert again.known == [f"{NAME}/lora/seed0"]
        assert (again.logged.added, again.logged.points) == (0, 0)
        now = contents(home)
        assert {name: now[name] for name in files} == files
        assert all("/checkpoints/" in name for name in now.keys() - files.keys()), "which were not packed"
        assert source == lent or now == files
        assert [len(after.get_metric_history(child.info.run_id, name)) for name in child.data.metrics] == counts
        assert len(after.search_model_versions(f"name = '{NAME}'")) == 1
        assert len(after.search_logged_models([child.info.experiment_id])) == 1


def test_a_run_that_went_on_is_brought_up_to_date_and_another_is_a_conflict(lent: Path, tmp_path: Path) -> None:
    """Merged in the middle and again at its end; then a run of the same name that is another."""
    home, first, later = (tmp_path / name for name in ("home", "first", "later"))
    base = settings(Path("run"), tracking={"experiment": "own"})
    for folder, steps in ((first, 1), (later, 3)):
        if folder == later:
            shutil.copytree(first, later)
            moved = json.loads((later / "run" / "tracking.json").read_text()) | {"uri": tracking_uri(None, later)}
            (later / "run" / "tracking.json").write_text(json.dumps(moved))
        run = build_run(base | {"output": str(folder / "run"), "training": {"steps": steps, "batch_size": 2}})
        with open_tracker(run, folder) as tracker:
            train(run, tracker)
    assert merge_results([first], home)[0].new == ["run"]
    arrived = merge_results([later], home)[0]
    assert (arrived.new, arrived.updated, arrived.conflicts) == ([], ["run"], [])
    (only,) = all_runs(client_of(home)).values()
    assert [m.step for m in client_of(home).get_metric_history(only.info.run_id, LOSS)] == [1, 2, 3]
    assert adapter_file(home / "run").read_bytes() == adapter_file(later / "run").read_bytes()
    assert merge_results([first], home)[0].known == ["run"], "what is older takes nothing back"
    assert adapter_file(home / "run").read_bytes() == adapter_file(later / "run").read_bytes()

    other = tmp_path / "other"
    shutil.copytree(lent / NAME / "lora" / "seed0", other / "run")
    kept = contents(home)
    done = CliRunner().invoke(app, ["results", "merge", str(other), "--into", str(home)])
    assert done.exit_code == 1
    assert "run is another run than the one that is here" in done.output
    assert contents(home) == kept


def test_onto_a_server_runs_get_new_ids_and_are_known_again(lent: Path, tmp_path: Path) -> None:
    server, home = tmp_path / "server", tmp_path / "home"
    server.mkdir()
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        sqlite_uri(server / "mlflow.db"),
        "--artifacts-destination",
        str(server / "files"),
    ]
    quiet = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
    process = subprocess.Popen(command, cwd=server, env=quiet, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        uri = f"http://127.0.0.1:{port}"
        wait_for(uri)
        arrived = merge_results([lent], home, uri)[0]
        assert (arrived.conflicts, arrived.logged.added) == ([], 2)
        client, run_id = (
            MlflowClient(uri),
            json.loads((home / NAME / "lora" / "seed0" / "tracking.json").read_text())["run_id"],
        )
        old = json.loads((lent / NAME / "lora" / "seed0" / "tracking.json").read_text())["run_id"]
        found = client.get_run(run_id)
        assert found.data.tags["t2ilib.merged_from"] == old != run_id
        assert found.data.tags["mlflow.parentRunId"] in all_runs(client)
        assert found.data.metrics == client_of(lent).get_run(old).data.metrics
        assert registered(uri) == [f"models:/{NAME}@champion"]
        assert "run.yaml" in [item.path for item in client.list_artifacts(run_id)]
        again = merge_results([lent], home, uri)[0]
        assert (again.logged.added, again.logged.points, again.conflicts) == (0, 0, [])
        assert len(all_runs(client)) == 2
    finally:
        process.terminate()
        process.wait(30)


def wait_for(uri: str) -> None:
    import urllib.request

    for _ in range(300):
        try:
            urllib.request.urlopen(f"{uri}/health", timeout=1)
        except OSError:
            time.sleep(0.2)
        else:
            return
    pytest.fail("the server did not start")


def test_an_alias_that_is_given_away_already_is_named(lent: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    merge_results([lent], home)
    client = client_of(home)
    client.create_model_version(NAME, str(tmp_path), None)
    client.set_registered_model_alias(NAME, "champion", "2")
    arrived = merge_results([lent], home)[0]
    assert [sentence for sentence in arrived.conflicts if "@champion is version 2 in the target" in sentence]
    assert client.get_model_version_by_alias(NAME, "champion").version in (2, "2")


@pytest.mark.parametrize(
    ("members", "error", "message"),
    [
        ({"../out.txt": "x"}, ArchiveError, "leads out of the folder"),
        ({"run/run.yaml": "x"}, ConfigError, "was not made by `t2ilib results pack`"),
        ({INDEX: json.dumps({"version": 2, "copies": {}})}, ConfigError, "a later t2ilib"),
        ({INDEX: json.dumps({"version": 1, "copies": {"../../out.txt": INDEX}})}, ConfigError, "leads out of it"),
        (
            {INDEX: json.dumps({"version": 1, "copies": {"in.txt": "../../../etc/passwd"}})},
            ConfigError,
            "leads out of it",
        ),
    ],
)
def test_what_is_no_pack_is_refused_and_leaves_nothing(
    tmp_path: Path, members: dict, error: type, message: str
) -> None:
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    with pytest.raises(error, match=message):
        merge_results([tmp_path / "bad.zip"], tmp_path / "home")
    assert not list((tmp_path / "home").iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"bad.zip", "home"}


def test_one_run_alone_keeps_its_name(lent: Path, tmp_path: Path) -> None:
    run = lent / NAME / "lora" / "seed0"
    packed = pack_results(run, tmp_path / "one.zip")
    assert packed.runs == ("seed0",)
    assert merge_results([packed.file], tmp_path / "home")[0].new == ["seed0"]
    assert merge_results([run], tmp_path / "home")[0].known == ["seed0"]
    assert {path.name for path in (tmp_path / "home").iterdir()} == {"seed0"}


def test_mistakes_are_told(lent: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        merge_results([tmp_path / "nothing.zip"], tmp_path / "home")
    with pytest.raises(ConfigError, match="is the folder that it is to be merged into"):
        merge_results([lent], lent)
    with pytest.raises(ConfigError, match="is no folder"):
        pack_results(tmp_path / "nothing", tmp_path / "x.zip")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "mlflow.db").write_bytes(b"no database" * 99)
    with pytest.raises(ConfigError, match="cannot be read as an MLflow store"):
        merge_results([tmp_path / "store"], tmp_path / "home")
