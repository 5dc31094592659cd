"""MLflow: how runs end, what they hold, and that a resumed run continues its curves without doubling points."""

import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image

from t2ilib.config import RunConfig
from t2ilib.data.manifest import load_datasets
from t2ilib.runfile import build_run
from t2ilib.tracking.store import HEARTBEAT, open_client, reap_stale_runs, tracking_uri
from t2ilib.tracking.tracker import NullTracker, open_tracker


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return make_run(tmp_path / "results" / "one")


def make_run(output: Path, **changes) -> RunConfig:
    values = {
        "name": "one",
        "output": str(output),
        "adapter": {"rank": 4},
        "tracking": {"experiment": "tests", "tags": {"variant": "v"}},
    }
    return build_run(values | changes)


def client_of(run: RunConfig) -> MlflowClient:
    return MlflowClient(tracking_uri(None, run.output.parent))


def only_run(run: RunConfig):
    client = client_of(run)
    found = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "FINISHED"), (ValueError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")],
)
def test_how_a_run_ends(run: RunConfig, error: type[BaseException] | None, status: str) -> None:
    if error is None:
        with open_tracker(run):
            pass
    else:
        with pytest.raises(error), open_tracker(run):
            raise error
    assert only_run(run).info.status == status


def test_what_a_run_holds(run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("T2ILIB_CACHE", str(tmp_path / "cache"))
    datasets = load_datasets(build_run({"adapter": {}, "data": {"source": "shapes"}, "shapes": {"num_pictures": 3}}))
    (tmp_path / "file.txt").write_text("content")
    with open_tracker(run) as tracker:
        tracker.log_metrics({"loss": 0.5}, 1)
        tracker.log_metrics({"loss": 0.25}, 2)
        tracker.log_datasets(*datasets)
        tracker.log_image(Image.new("RGB", (8, 8)), "samples", 0)
        tracker.log_image(Image.new("RGB", (8, 8)), "samples", 10)
        tracker.log_artifact(tmp_path / "file.txt")
    found, client = only_run(run), client_of(run)
    assert [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, "loss")] == [(1, 0.5), (2, 0.25)]
    assert found.data.params["adapter.rank"] == "4"
    assert found.data.tags["variant"] == "v"
    assert {(i.dataset.digest, i.tags[0].value) for i in found.inputs.dataset_inputs} == {
        (datasets[0].digest[:36], "training"), (datasets[1].digest[:36], "validation"),
    }  # fmt: skip
    images = [artifact.path for artifact in client.list_artifacts(found.info.run_id, "images")]
    assert len([path for path in images if path.endswith(".png")]) == 2
    assert "file.txt" in [artifact.path for artifact in client.list_artifacts(found.info.run_id)]


def test_resumed_run_continues_without_doubling(run: RunConfig) -> None:
    with open_tracker(run) as tracker:
        tracker.log_metrics({"loss": 1.0}, 1)
        tracker.log_metrics({"loss": 2.0}, 2)
    with open_tracker(run) as tracker:  # from a checkpoint of step 1: step 2 comes again
        tracker.log_metrics({"loss": 2.0}, 2)
        tracker.log_metrics({"loss": 3.0}, 3)
    history = client_of(run).get_metric_history(only_run(run).info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_every_run_has_the_same_parameters(tmp_path: Path) -> None:
    plain = build_run({"training": {"trains": "nothing", "steps": 0}})
    assert plain.flat().keys() == make_run(tmp_path).flat().keys()


def test_stale_runs_are_closed_and_live_ones_left(run: RunConfig) -> None:
    client, experiment = open_client(tracking_uri(None, run.output.parent), "tests", run.output.parent)
    beats = {"stale": time.time() - 3600, "alive": time.time()}
    ids = {name: client.create_run(experiment, tags={HEARTBEAT: str(beat)}).info.run_id for name, beat in beats.items()}
    assert reap_stale_runs(client, experiment) == [ids["stale"]]
    assert client.get_run(ids["stale"]).info.status == "KILLED"
    assert client.get_run(ids["alive"]).info.status == "RUNNING"


def test_image_keys_without_slash(run: RunConfig) -> None:
    with pytest.raises(ValueError, match="cannot have a /"), open_tracker(run) as tracker:
        tracker.log_image(Image.new("RGB", (8, 8)), "a/b", 0)


def test_uri_of_the_user_is_honoured(run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with open_tracker(run):
        pass
    assert MlflowClient(uri).get_experiment_by_name("tests") is not None
    assert not (run.output.parent / "mlflow.db").exists()


def test_without_experiment_nothing_is_logged(tmp_path: Path) -> None:
    with open_tracker(build_run({"adapter": {}, "output": str(tmp_path / "r")})) as tracker:
        assert isinstance(tracker, NullTracker)
    assert not list(tmp_path.iterdir())
