"""`t2ilib ui`: MLflow's UI on a store that is there, on this machine, and the address of one that runs elsewhere."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from typer.testing import CliRunner

from t2ilib.cli import app
from t2ilib.config import ConfigError
from t2ilib.tracking import ui
from t2ilib.tracking.store import open_client, tracking_uri
from t2ilib.tracking.ui import choose_port, open_ui
from t2ilib.tracking.views import view_tag


@pytest.fixture(autouse=True)
def no_store_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def test_the_ui_of_a_store_answers_says_its_addresses_and_ends_with_the_command(tmp_path: Path) -> None:
    client, experiment = open_client(tracking_uri(None, tmp_path), "toy", tmp_path)
    for key in ("toy-quick-runs", "toy-quick-means"):
        for name, value in view_tag(key, {}).items():
            client.set_experiment_tag(experiment, name, value)
    command = [sys.executable, "-m", "t2ilib.cli", "ui", "--results", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        first, study, last = (process.stdout.readline() for _ in range(3))
        address = first.removeprefix("MLflow UI: ").partition("/#/")[0]
        assert address.startswith("http://127.0.0.1:")
        assert study.startswith(
            f"  toy-quick: {address}/#/experiments/{experiment}/runs?viewStateShareKey=toy-quick-runs&"
        )
        assert last == "Ctrl-C ends it\n"
        with urllib.request.urlopen(f"{address}/api/2.0/mlflow/experiments/get?experiment_id={experiment}") as answer:
            assert b'"toy"' in answer.read()
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    with contextlib.closing(socket.socket()) as probe:
        assert probe.connect_ex(("127.0.0.1", int(address.rpartition(":")[2]))) != 0, "the server lives on"


def test_of_a_server_the_address_is_told_and_none_is_started(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(ui, "study_views", lambda store, file: {"toy-quick": "#/experiments/1"})
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5999/")
    assert open_ui(Path("nowhere")) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("MLflow UI: http://127.0.0.1:5999/#/")
    assert told[1] == "  toy-quick: http://127.0.0.1:5999/#/experiments/1"


def test_a_store_that_is_not_there_is_told_and_not_made(tmp_path: Path) -> None:
    for arguments in (
        ["--results", str(tmp_path)],
        ["--uri", f"sqlite:///{tmp_path}/other.db"],
        ["--uri", f"{tmp_path}/x"],
    ):
        done = CliRunner().invoke(app, ["ui", *arguments])
        assert done.exit_code == 2
        assert f"there is no MLflow store at {tmp_path}" in done.output
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"http://127.0.0.1:9 cannot be used"):
        open_ui(tmp_path, "http://127.0.0.1:9")


def test_a_port_that_is_taken_is_told_or_another_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} of 127.0.0.1 is taken: choose another with --port"):
            choose_port(port)
        monkeypatch.setattr(ui, "PORT", port)
        assert choose_port(None) not in (port, 0)


def test_a_server_that_does_not_start_is_told_with_what_it_said(tmp_path: Path, monkeypatch) -> None:
    open_client(tracking_uri(None, tmp_path), "toy", tmp_path)
    (tmp_path / "mlflow.py").write_text("raise SystemExit('not today')")
    monkeypatch.setitem(os.environ, "PYTHONPATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"did not start on http://127.0.0.1:.*not today"):
        open_ui(tmp_path)
