"""The store: wherever it lies, it is found again; it is made by what is logged, and by nothing that is refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from PIL import Image
from typer.testing import CliRunner

from t2ilib.cli import app
from t2ilib.config import ConfigError, RunConfig
from t2ilib.runfile import build_run
from t2ilib.tracking.store import check_store, database_file, open_client, sqlite_uri, tracking_uri
from t2ilib.tracking.tracker import open_tracker

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture(autouse=True)
def no_store_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def make_run(output: Path, **tracking) -> RunConfig:
    return build_run({"output": str(output), "adapter": {}, "tracking": {"experiment": "tests", **tracking}})


@pytest.mark.parametrize("name", ["what? #2", "50%41's & 100%3F,\"é 猫;a+b=c"])
def test_a_store_lies_in_the_folder_that_was_named_whatever_it_is_called(tmp_path: Path, name: str) -> None:
    """Metrics, pictures and files are written there and read back by another client, and nothing lies beside it."""
    run = make_run(tmp_path / name / "run")
    run.output.mkdir(parents=True)
    (run.output / "note.txt").write_text("content")
    for step in (1, 2):  # a second attempt goes on where the first one ended
        with open_tracker(run) as tracker:
            tracker.log_metrics({"loss": 1.0 / step}, step)
            tracker.log_image(Image.new("RGB", (8, 8)), "samples", step)
            tracker.log_artifact(run.output / "note.txt")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert {path.name for path in (tmp_path / name).iterdir()} == {"run", "mlflow.db", "mlflow-artifacts"}
    note = json.loads((run.output / "tracking.json").read_text())
    assert note["uri"] == tracking_uri(None, tmp_path / name)
    assert database_file(note["uri"]) == tmp_path / name / "mlflow.db"
    client = MlflowClient(note["uri"])
    assert [metric.value for metric in client.get_metric_history(note["run_id"], "A first look/loss")] == [1.0, 0.5]
    assert len(client.list_artifacts(note["run_id"], "images")) >= 2
    (tmp_path / "copy").mkdir()
    assert Path(client.download_artifacts(note["run_id"], "note.txt", str(tmp_path / "copy"))).read_text() == "content"
    stored = list((tmp_path / name / "mlflow-artifacts").rglob("note.txt"))
    assert [path.read_text() for path in stored] == ["content"]


def test_stores_of_other_kinds_have_no_file() -> None:
    assert database_file("http://127.0.0.1:5000") is None
    assert database_file("sqlite:///:memory:") is None
    assert database_file("sqlite:///mlflow.db") == Path.cwd() / "mlflow.db"
    assert sqlite_uri(Path("mlflow.db")) == f"sqlite:///{Path.cwd() / 'mlflow.db'}"
    with pytest.raises(ConfigError, match=r"'sqlite:mlflow\.db' is no SQLite URI: write sqlite:///"):
        database_file("sqlite:mlflow.db")


def test_a_relative_uri_of_the_users_is_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with open_tracker(make_run(tmp_path / "run", uri="sqlite:///mine.db")) as tracker:
        tracker.log_metrics({"loss": 1.0}, 1)
    assert (tmp_path / "mine.db").exists()


def test_nothing_is_made_until_something_is_logged(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="refused"), open_tracker(make_run(tmp_path / "results" / "run")):
        raise ValueError("refused")
    assert not list(tmp_path.iterdir())
    client, _ = open_client(tracking_uri(None, tmp_path), "another", tmp_path)
    with open_tracker(make_run(tmp_path / "run")):
        pass
    assert client.get_experiment_by_name("tests") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.path=nowhere"], "data.path nowhere"),
        (["data.source=shapes", "training.batch_size=64"], "batch_size 64 is more than the 48 training pictures"),
        (["data.source=shapes", "model.base=owner/model"], "owner/model is not in the local cache"),
        (["data.source=shapes", "evaluation.measures=[clap]"], "'clap' does not exist"),
    ],
)
def test_a_training_that_is_refused_leaves_nothing_behind(tmp_path: Path, changes: list[str], message: str) -> None:
    config = {"output": str(tmp_path / "results" / "run"), "adapter": {}, "tracking": {"experiment": "tests"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    arguments = [word for change in changes for word in ("--set", change)]
    result = CliRunner().invoke(app, ["train", str(tmp_path / "run.yaml"), *arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("kind: lora, rank: 32", "kind: lora, rnk: 32"),
        ("evaluation: {guidance_scale: 3.0}", "evaluation: {measures: [clap]}"),
        ("notebook: train.ipynb", "notebook: nowhere.ipynb"),
    ],
)
def test_a_study_that_is_refused_leaves_nothing_behind(tmp_path: Path, old: str, new: str) -> None:
    for notebook in EXPERIMENTS.glob("*.ipynb"):
        shutil.copy(notebook, tmp_path)
    text = (EXPERIMENTS / "adapters.yaml").read_text()
    assert old in text
    (tmp_path / "study.yaml").write_text(text.replace(old, new))
    result = CliRunner().invoke(app, ["study", "run", str(tmp_path / "study.yaml"), "--results", str(tmp_path / "r")])
    assert result.exit_code == 2, result.output
    assert not (tmp_path / "r").exists()


def test_a_store_that_cannot_be_made_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is loaded, not by what is first logged."""
    run = make_run(tmp_path / "results" / "run")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
        with (
            pytest.raises(ConfigError, match=r"a new MLflow store and what goes with it need 32 MiB"),
            open_tracker(run),
        ):
            pytest.fail("opened")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
        with (
            pytest.raises(ConfigError, match=rf"{tmp_path} must not be written to; set tracking.uri"),
            open_tracker(run),
        ):
            pytest.fail("opened")
    with pytest.raises(ConfigError, match=r"http://127.0.0.1:9 cannot be used"):
        check_store("http://127.0.0.1:9", "tests")
    (tmp_path / "mlflow.db").write_bytes(b"no database, but longer than the header of one" * 9)
    with pytest.raises(ConfigError, match=r"mlflow.db away, and a new one is made"):
        check_store(tracking_uri(None, tmp_path), "tests")
