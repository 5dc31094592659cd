"""MLflow: how runs end, what they hold, and that a resumed run continues its curves without doubling points."""

import contextlib
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image

from t2ilib.config import ConfigError, RunConfig
from t2ilib.data.dataset import load_datasets
from t2ilib.runfile import build_run, load_run
from t2ilib.shapes import checker
from t2ilib.tracking.naming import FIRST
from t2ilib.tracking.store import HEARTBEAT, open_client, reap_stale_runs, tracking_uri
from t2ilib.tracking.tracker import NullTracker, open_tracker
from t2ilib.training.history import COSTS
from t2ilib.training.validation import HELD_OUT


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
    with contextlib.suppress(*([error] if error else [])), open_tracker(run) as tracker:
        tracker.flush()
        if error is not None:
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
    assert [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, "A first look/loss")] == [
        (1, 0.5),
        (2, 0.25),
    ]
    assert found.data.params["adapter.rank"] == "4"
    assert found.data.tags["variant"] == "v"
    assert {(i.dataset.digest, i.tags[0].value) for i in found.inputs.dataset_inputs} == {
        (datasets[0].digest[:36], "training"), (datasets[1].digest[:36], "validation"),
    }  # fmt: skip
    images = [artifact.path for artifact in client.list_artifacts(found.info.run_id, "images")]
    assert len([path for path in images if path.endswith(".png")]) == 2
    assert "file.txt" in [artifact.path for artifact in client.list_artifacts(found.info.run_id)]


def test_what_matters_most_stands_first_in_the_charts(run: RunConfig) -> None:
    """Of everything that a run measures, in the order in which MLflow's charts sort sections: by letter, without case."""
    details = {*HELD_OUT, *COSTS, *checker.METRICS, "adapter/change_norm", "grad_norm", "learning_rate/unet"}
    details |= {"held_out_loss/t0062", "memory/end/process_mib", "aesthetic/concept", "checker/all"}
    names = [name.format(group=group) for name in details for group in ("concept", "base_kept")] + ["loss"]
    with open_tracker(run) as tracker:
        tracker.log_metrics(dict.fromkeys(names, 1.0), 1)
    logged = [name for name in only_run(run).data.metrics if not name.startswith("system/")]
    assert len(logged) == len(set(names))
    sections = sorted({name.rpartition("/")[0] for name in logged} - {""}, key=str.lower)
    assert sections[0] == FIRST
    first = {name.removeprefix(f"{FIRST}/") for name in logged if name.startswith(f"{FIRST}/")}
    assert first == {
        *("loss", "held_out_loss", "concept_all", "base_kept_all", "world_all", "steps_per_second"),
        *("peak_device_mib", "peak_process_mib", "adapter_mib", "trainable_parameters"),
    }
    with open_tracker(run) as tracker:  # a name that has changed is the same metric when the run goes on
        tracker.log_metrics({"loss": 2.0}, 1)
        tracker.log_metrics({"loss": 3.0}, 2)
    history = client_of(run).get_metric_history(only_run(run).info.run_id, f"{FIRST}/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (2, 3.0)]


def test_resumed_run_continues_without_doubling(run: RunConfig) -> None:
    with open_tracker(run) as tracker:
        tracker.log_metrics({"loss": 1.0}, 1)
        tracker.log_metrics({"loss": 2.0}, 2)
    with open_tracker(run) as tracker:  # from a checkpoint of step 1: step 2 comes again
        tracker.log_metrics({"loss": 2.0}, 2)
        tracker.log_metrics({"loss": 3.0}, 3)
    history = client_of(run).get_metric_history(only_run(run).info.run_id, "A first look/loss")
    assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_parameters_are_what_sets_a_run_apart_and_the_whole_config_is_a_file(tmp_path: Path, monkeypatch) -> None:
    """As they stand in the store from the first thing that is logged; a section that a run has not has no parameters."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    plain = {
        "seed": "0",
        "model.base": "tiny-sdxl",
        "model.quantization": "none",
        "data.resolution": "64",
        "optimizer.name": "adamw",
        "optimizer.learning_rate": "0.001",
        "training.trains": "adapter",
        "training.steps": "200",
        "training.batch_size": "4",
    }
    adapter = {"adapter.kind": "lora", "adapter.rank": "4", "adapter.targets": "attention"}
    shapes = {"data.source": "shapes", "shapes.scenes": "['heart']", "shapes.jitter": "0.5"}
    cases = {
        "plain": ({}, plain | adapter),
        "changed": (
            {
                "seed": 3,
                "adapter": {"rank": 16, "targets": ["to_q", "to_k"], "dropout": 0.1},
                "model": {"quantization": "nf4"},
                "data": {"source": "shapes"},
                "shapes": {"scenes": ["heart"], "jitter": 0.5},
                "objective": {"snr_gamma": None},
                "evaluation": {"prompts": ["a heart"]},
            },
            plain
            | shapes
            | {"seed": "3", "adapter.kind": "lora", "adapter.rank": "16", "adapter.targets": "['to_q', 'to_k']"}
            | {"adapter.dropout": "0.1", "model.quantization": "nf4", "objective.snr_gamma": "None"}
            | {"evaluation.prompts": "['a heart']"},
        ),
        "base": (
            {"adapter": None, "training": {"trains": "nothing", "steps": 0}},
            plain | {"training.trains": "nothing", "training.steps": "0"},
        ),
    }
    for name, (changes, expected) in cases.items():
        run = make_run(tmp_path / "results" / name, **changes)
        with open_tracker(run) as tracker:
            tracker.flush()
            stored = client_of(run).get_run(tracker.run_id)
            file = client_of(run).download_artifacts(tracker.run_id, "run.yaml", str(tmp_path))
        assert stored.data.params == expected
        assert load_run(Path(file)) == run


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
    with open_tracker(run) as tracker:
        tracker.flush()
    assert MlflowClient(uri).get_experiment_by_name("tests") is not None
    assert not (run.output.parent / "mlflow.db").exists()


def test_without_experiment_nothing_is_logged(tmp_path: Path) -> None:
    with open_tracker(build_run({"adapter": {}, "output": str(tmp_path / "r")})) as tracker:
        assert isinstance(tracker, NullTracker)
    assert not list(tmp_path.iterdir())


def test_what_is_refused_before_anything_is_logged_leaves_the_run_as_it_was(run: RunConfig) -> None:
    with open_tracker(run) as tracker:
        tracker.log_metrics({"loss": 1.0}, 1)
    before = only_run(run)
    note = (run.output / "tracking.json").read_text()
    with pytest.raises(ValueError, match="refused"), open_tracker(run):
        raise ValueError("refused")
    after = only_run(run)
    assert (after.info.status, after.info.end_time) == ("FINISHED", before.info.end_time)
    assert (run.output / "tracking.json").read_text() == note


def test_other_settings_are_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first attempt that failed keeps its parameters and curve; the next one, with another config, has its own."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    output = tmp_path / "results" / "one"
    for rate in (1e-3, 2e-3):
        with open_tracker(make_run(output, optimizer={"learning_rate": rate})) as tracker:
            tracker.log_metrics({"loss": rate}, 1)
    client = client_of(make_run(output))
    found = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert {(r.data.params["optimizer.learning_rate"], r.data.metrics["A first look/loss"]) for r in found} == {
        ("0.001", 1e-3),
        ("0.002", 2e-3),
    }


def test_half_a_note_of_a_kill_is_no_note(run: RunConfig) -> None:
    run.output.mkdir(parents=True)
    (run.output / "tracking.json").write_text('{"uri": "sqlite')
    with open_tracker(run) as tracker:
        tracker.log_metrics({"loss": 1.0}, 1)
    assert only_run(run).info.run_id == tracker.run_id


def test_a_run_that_was_deleted_in_the_ui_is_made_anew(run: RunConfig) -> None:
    with open_tracker(run) as tracker:
        first = tracker.run_id
    client_of(run).delete_run(first)
    with open_tracker(run) as tracker:
        assert tracker.run_id != first
    assert only_run(run).info.run_id == tracker.run_id


def test_a_deleted_experiment_is_told_with_the_way_back(run: RunConfig) -> None:
    with open_tracker(run) as tracker:
        tracker.flush()
    client = client_of(run)
    number = client.get_experiment_by_name("tests").experiment_id
    client.delete_experiment(number)
    with (
        pytest.raises(
            ConfigError, match=rf"'tests' was deleted: restore it \(`mlflow experiments restore -x {number}`\)"
        ),
        open_tracker(run),
    ):
        pass


def test_a_new_store_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.store.tracking import sqlalchemy_store

    class Breaks(sqlalchemy_store.SqlAlchemyStore):
        def __init__(self, uri: str, root: str):
            Path(uri.removeprefix("sqlite:///")).write_bytes(b"half")
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sqlalchemy_store, "SqlAlchemyStore", Breaks)
        with pytest.raises(OSError, match="No space left"):
            open_client(tracking_uri(None, tmp_path), "tests", tmp_path)
    assert not list(tmp_path.iterdir())
    open_client(tracking_uri(None, tmp_path), "tests", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]


def test_stores_that_do_not_work_are_told_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sqlite3

    half = tmp_path / "mlflow.db"
    with sqlite3.connect(half) as database:
        database.execute("create table _alembic_tmp_experiments (x int)")
        database.execute("create table experiments (x int)")
    with pytest.raises(ConfigError, match=r"half made by a full disk: move .*mlflow.db away, and a new one is made"):
        open_client(tracking_uri(None, tmp_path), "tests", tmp_path)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(
        ConfigError, match=r"the MLflow store http://127.0.0.1:9 cannot be used .* start the server, or set"
    ):
        open_client("http://127.0.0.1:9", "tests", tmp_path)
