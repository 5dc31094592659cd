"""A server that dies: nothing that was logged is lost, no run ends or waits for it, and what it did not get is told."""

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient
from mlflow_server import Server
from PIL import Image
from typer.testing import CliRunner

from t2ilib.cli import app
from t2ilib.config import ConfigError, RunConfig
from t2ilib.runfile import build_run
from t2ilib.tracking import mlflow_run, outbox
from t2ilib.tracking.mlflow_run import MlflowTracker
from t2ilib.tracking.naming import shown_name
from t2ilib.tracking.outbox import UNSENT, Outbox, send_kept
from t2ilib.tracking.tracker import open_tracker
from t2ilib.training.history import METRICS, read_rows
from t2ilib.training.loop import train

LOSS = shown_name("loss")


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def up(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server, which answers, and is the one that runs are logged to."""
    if server.process is None:
        server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    for module in (mlflow_run, outbox):
        monkeypatch.setattr(module, "SECONDS_AT_END", 1.0)
    return server


def make_run(output: Path, **changes) -> RunConfig:
    values = {"output": str(output), "adapter": {"rank": 2}, "tracking": {"experiment": "outbox"}}
    return build_run(values | changes)


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (shade, 0, 0))


def history(client: MlflowClient, run_id: str, name: str = LOSS) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, name)]


def files_of(client: MlflowClient, run_id: str, path: str | None = None) -> set[str]:
    found = set()
    for item in client.list_artifacts(run_id, path):
        found |= files_of(client, run_id, item.path) if item.is_dir else {item.path}
    return found


def test_a_training_whose_server_is_killed_and_comes_back_loses_nothing(
    up: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(
        tmp_path / "run",
        data={"source": "shapes"},
        shapes={"scenes": ["heart"], "num_pictures": 4},
        training={"steps": 8, "batch_size": 2, "checkpoint_every": 4},
        evaluation={"prompts": ["a heart"], "sample_every": 2, "num_inference_steps": 1, "validation_timesteps": 1},
    )
    log_metrics, monitored = MlflowTracker.log_metrics, []

    def disturbed(self, values: dict[str, float], step: int) -> None:
        if step == 3 and up.process is not None and not monitored:
            up.kill()
            monitored.append("killed")
        if step == 7 and monitored == ["killed"]:
            assert (run.output / UNSENT).exists(), "nothing was kept meanwhile"
            up.start()
            monitored.append("started")
        log_metrics(self, values, step)

    monkeypatch.setattr(MlflowTracker, "log_metrics", disturbed)
    monkeypatch.setattr(mlflow_run, "SECONDS_BETWEEN_FLUSHES", 0.0)
    monkeypatch.setattr(mlflow_run, "SECONDS_AT_END", 60.0)
    with open_tracker(run) as tracker:
        train(run, tracker)
    assert monitored == ["killed", "started"]
    client = MlflowClient(up.uri)
    stored = client.get_run(tracker.run_id)
    assert stored.info.status == "FINISHED"
    rows = read_rows(run.output / METRICS)
    told = {(shown_name(name), row["step"], value) for row in rows for name, value in row.items() if name != "step"}
    found = {(name, *point) for name in stored.data.metrics for point in history(client, tracker.run_id, name)}
    assert told <= found
    assert len(history(client, tracker.run_id)) == 8
    files = files_of(client, tracker.run_id)
    assert {"run.yaml", "manifest.csv", "adapter/pytorch_lora_weights.safetensors"} <= files
    assert any(path.startswith("checkpoints/step-000008/") for path in files)
    for step in (0, 2, 4, 6, 8):
        grids = [path for path in files if path.startswith(f"images/samples+step+{step}+")]
        assert sorted(Path(path).suffix for path in grids) == [".png", ".webp"], step
    assert stored.data.tags["t2ilib.model"].startswith("models:/")
    assert not (run.output / UNSENT).exists()


def test_what_a_server_that_does_not_return_lacks_is_told_and_sent_later_once(
    up: Server, tmp_path: Path, caplog, capsys
) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "elsewhere.txt").write_text("as it was")
    with open_tracker(run) as tracker:
        tracker.log_metrics({"loss": 1.0}, 1)
        tracker.log_image(picture(1), "samples", 1)
        up.kill()
        began = time.monotonic()
        for step in range(2, 200):
            tracker.log_metrics({"loss": 1.0 / step, "nan": float("nan")}, step)
            tracker.flush()
        tracker.log_image(picture(2), "samples", 2)
        tracker.log_artifact(tmp_path / "elsewhere.txt", "under")
        assert time.monotonic() - began < 20, "every step waited"
    (tmp_path / "elsewhere.txt").write_text("changed since")
    assert caplog.text.count("does not take what is logged") == 1
    assert f"`t2ilib send {run.output}` sends it" in caplog.text
    assert len(list((run.output / UNSENT).glob("*.jsonl"))) == 1
    done = CliRunner().invoke(app, ["send", str(tmp_path)])
    assert done.exit_code == 1
    assert "the rest is kept in" in done.output.lower()

    with open_tracker(run) as tracker:  # it has begun, and goes on without the server
        tracker.log_metrics({"loss": 1.0 / 199}, 199)  # from a checkpoint of before: the same steps come again
        tracker.log_metrics({"loss": 1.0 / 200}, 200)
    assert "The run has begun, and goes on without it" in caplog.text
    with (run.output / UNSENT / f"{tracker.run_id}.jsonl").open("a") as cut:
        cut.write('{"kind": "metrics", "val')  # by a kill

    folder = run.output / UNSENT
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    up.start()
    client = MlflowClient(up.uri)
    assert len(history(client, tracker.run_id)) == 1
    done = CliRunner().invoke(app, ["send", str(tmp_path)])
    assert (done.output, done.exit_code) == (f"{run.output}: all is sent\n", 0)
    assert not folder.exists()
    for path, content in kept.items():  # as after a kill between sending and clearing away
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    with open_tracker(run) as again:
        again.log_metrics({"loss": 1.0 / 201}, 201)
    assert again.run_id == tracker.run_id
    assert history(client, tracker.run_id) == [(step, 1.0 / step) for step in range(1, 202)]
    assert [step for step, _ in history(client, tracker.run_id, "nan")] == list(range(2, 200))
    assert client.get_run(tracker.run_id).info.status == "FINISHED"
    files = files_of(client, tracker.run_id)
    assert len([path for path in files if path.startswith("images/")]) == 4, "a picture and its small one, of two steps"
    path = client.download_artifacts(tracker.run_id, "under/elsewhere.txt", str(tmp_path))
    assert Path(path).read_text() == "as it was"
    assert not (run.output / UNSENT).exists()
    assert CliRunner().invoke(app, ["send", str(tmp_path)]).output == f"nothing waits in {tmp_path}\n"


def test_what_the_store_refuses_holds_nothing_else_up_and_is_told(up: Server, tmp_path: Path, caplog) -> None:
    run = make_run(tmp_path / "run")
    with open_tracker(run) as tracker:
        tracker.log_artifact(tmp_path / "gone.txt")
        tracker.log_metrics({"loss": 0.5, "no such name: $%^&": 1.0}, 1)
        tracker.flush()
        tracker.log_metrics({"loss": 0.25}, 2)
    client = MlflowClient(up.uri)
    assert (2, 0.25) in history(client, tracker.run_id)
    assert client.get_run(tracker.run_id).info.status == "FINISHED"
    assert "gone.txt is not there any more" in caplog.text
    assert len((run.output / UNSENT / f"{tracker.run_id}.refused").read_text().splitlines()) == 3


def test_a_server_that_hangs_costs_one_wait_not_one_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "SECONDS_TO_WORK", 2)
    monkeypatch.setattr(outbox, "SECONDS_TO_ANSWER", 1)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(64)
        box = Outbox(tmp_path, f"http://127.0.0.1:{deaf.getsockname()[1]}", "0" * 32)
        began = time.monotonic()
        for step in range(100):
            box.add("metrics", values=[["loss", 0.5, 1, step]])
            assert not box.send()
        assert time.monotonic() - began < 10
        assert box.close(0.0)
    lines = [json.loads(line) for line in box.file.read_text().splitlines()]
    assert [step for line in lines[1:] for *_, step in line["values"]] == list(range(100))


def test_a_server_that_is_not_there_at_the_start_is_told_at_once(tmp_path: Path, monkeypatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    began = time.monotonic()
    with (
        pytest.raises(ConfigError, match=rf"the MLflow store {uri} cannot be used .*: start the server, or set"),
        open_tracker(make_run(tmp_path / "run")),
    ):
        pytest.fail("opened")
    assert time.monotonic() - began < 30
    assert not (tmp_path / "run").exists()


def test_a_file_that_another_process_sends_is_left_alone(tmp_path: Path) -> None:
    first, second = (Outbox(tmp_path, "http://127.0.0.1:9", "1" * 32) for _ in range(2))
    first.add("metrics", values=[["loss", 1.0, 1, 1]])
    assert not first.send()
    second.add("metrics", values=[["loss", 1.0, 2, 2]])
    assert not second.send()
    assert send_kept(tmp_path) == {tmp_path: f"{tmp_path}: another process is sending what it kept"}
    assert first.close(0.0)
    assert second.close(0.0)
    steps = [line["values"][0][3] for line in map(json.loads, first.file.read_text().splitlines()) if "values" in line]
    assert steps == [1, 2]


def test_what_was_measured_again_is_corrected(tmp_path: Path) -> None:
    """Which a resumed run does not: it logs nothing again at a step that was logged."""
    known, logged = {"A first look/held_out_loss": 0.5, "kept": 1.0}, []
    client = SimpleNamespace(
        get_run=lambda run_id: SimpleNamespace(data=SimpleNamespace(metrics=known)),
        log_batch=lambda run_id, metrics: logged.extend((run_id, m.key, m.value, m.timestamp, m.step) for m in metrics),
    )
    box = Outbox(tmp_path, "uri", "id", client)
    box.add("corrections", values={"held_out_loss": 0.4, "kept": 1.0, "new": 2.0}, step=7, time=5)
    assert box.close() == ""
    assert logged == [("id", "A first look/held_out_loss", 0.4, 5, 7), ("id", "new", 2.0, 5, 7)]
