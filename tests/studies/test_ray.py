"""Studies on Ray clusters: as here; workers that are killed and nodes that are lost leave no trace in the results, and no process.

Clusters here are of this machine alone, and nobody else can reach them.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml

from t2ilib.config import ConfigError
from t2ilib.studies import onray
from t2ilib.studies.bench import Bench
from t2ilib.studies.cards import VISIBLE
from t2ilib.studies.executor import TIMES_LOST, Executor
from t2ilib.studies.guard import MARK, Guard, marked
from t2ilib.studies.notebooks import execute_notebook
from t2ilib.studies.onray import ALONE, OBJECT_STORE_BYTES, TOKEN, require_shared_store, shares
from t2ilib.studies.place import Demand, WorkerLost
from t2ilib.studies.runs import StudyRun
from t2ilib.studies.study import run_study
from t2ilib.studies.where import open_place

PARAMETERS = """name = "none"
seed = 0
output = "unset"
adapter = {}
data = {}
shapes = {}
optimizer = {}
training = {}
evaluation = {}
tracking = {}"""

TRAIN = (
    """import os, pathlib, signal, sys, time
import t2ilib
from t2ilib.evaluation.measures import measure
from t2ilib.shapes import source
from t2ilib.training import state
import json, psutil

source.NUM_VALIDATION = 6
killed, save = pathlib.Path(output) / "killed.json", state.save_checkpoint


def save_and_lose_the_worker(folder, checkpoint, keep):
    save(folder, checkpoint, keep)
    if checkpoint.step == 2 and "%s" in os.environ and not killed.exists():
        worker = json.loads((pathlib.Path(output) / "process.json").read_text())["study"][0]
        killed.write_text(json.dumps([worker, os.getpid(), time.time()]))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.kill(worker, signal.SIGKILL)
        time.sleep(3000)


state.save_checkpoint = save_and_lose_the_worker
sections = dict(adapter=adapter, data=data, shapes=shapes, optimizer=optimizer, training=training, evaluation=evaluation)
run = t2ilib.build_run(dict(name=name, seed=seed, output=output, tracking=tracking, **sections))
with t2ilib.open_tracker(run) as tracker:
    result = t2ilib.train(run, tracker)
    measure(run, result.components, tracker, result.metrics, result.prompts)"""
    % MARK
)

WAIT = """import json, os, pathlib, time, signal
folder = pathlib.Path(output)
with (folder / "executions.txt").open("a") as log:
    log.write("x")
print("step 1/2  loss 0.5", flush=True)


def end(number, frame):
    (folder / "checkpoints" / "step-000001").mkdir(parents=True, exist_ok=True)
    raise SystemExit(143)


signal.signal(signal.SIGTERM, end)
while not (folder.parents[2] / "go").exists():
    time.sleep(0.05)
names = ("OMP_NUM_THREADS", "MLFLOW_TRACKING_URI", "T2ILIB_BATCH", "T2ILIB_HERE", "JUPYTER_PLATFORM_DIRS")
(folder / "seen.json").write_text(json.dumps({"folder": os.getcwd(), **{name: os.environ.get(name) for name in names}}))
(folder / "metrics.json").write_text(json.dumps({"answer": optimizer["learning_rate"] + seed}))"""

RUN = {
    "adapter": {"rank": 2, "init": "gaussian"},
    "data": {"source": "shapes"},
    "shapes": {"scenes": ["heart"], "num_pictures": 4},
    "optimizer": {"learning_rate": 3e-2},
    "training": {"steps": 4, "batch_size": 2, "checkpoint_every": 1, "keep_checkpoints": 1},
    "evaluation": {
        "validate_every": 2,
        "sample_every": 0,
        "validation_timesteps": 1,
        "validation_pictures": 1,
        "prompts": ["a red heart"],
        "num_inference_steps": 1,
        "measures": [],
    },
}
OTHERWISE = ("memory/", "peak_", "steps_per_second", "data_wait_share", "adapter_mib")
"""What the machine and the moment decide."""


def write_notebook(path: Path, body: str) -> None:
    cells = [nbformat.v4.new_code_cell(PARAMETERS), nbformat.v4.new_code_cell(body)]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)


@pytest.fixture
def study_file(tmp_path: Path) -> Path:
    """Two variants: one that trains, one that waits for the file `go` beside the study's results."""
    write_notebook(tmp_path / "train.ipynb", TRAIN)
    write_notebook(tmp_path / "wait.ipynb", WAIT)
    content = {
        "name": "toy",
        "question": "?",
        "reference": "trained",
        "run": RUN,
        "presets": {"quick": {"seeds": [0]}, "two": {"seeds": [0, 1]}},
        "variants": {"trained": {"title": "Trained"}, "waits": {"title": "Waits", "notebook": "wait.ipynb"}},
    }
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return tmp_path / "toy.yaml"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two nodes with a core each, started by somebody else; its address."""
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_TMPDIR": tempfile.mkdtemp(dir="/tmp")}
    Path(variables["RAY_TMPDIR"], "ray").mkdir()
    with onray.environment(ALONE | onray.QUIET | variables):
        Cluster = pytest.importorskip("ray.cluster_utils").Cluster

        args = {"num_cpus": 1, "object_store_memory": OBJECT_STORE_BYTES, "node_ip_address": "127.0.0.1"}
        found = Cluster(True, head_node_args=args | {"include_dashboard": False})
        found.added = []
        found.more = lambda: found.added.append(found.add_node(**args))
        found.more()
        yield found
        found.shutdown()
        shutil.rmtree(variables["RAY_TMPDIR"], ignore_errors=True)


def kept(metrics: dict) -> dict:
    return {name: value for name, value in metrics.items() if not name.startswith(OTHERWISE)}


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_worker_that_is_killed_leaves_no_trace(study_file: Path, cluster, monkeypatch) -> None:
    """Its notebook, which does not listen to SIGTERM, is dead before the next goes on, from the checkpoint; the result is the one
    that it has here, where nothing was killed, to the bit."""
    monkeypatch.setenv("T2ILIB_HERE", "there too")
    monkeypatch.chdir(study_file.parent)
    for place in ("here", "ray"):
        (study_file.parent / place).mkdir()
        (study_file.parent / place / "go").touch()
    said: list[str] = []
    run_study(study_file, only=["trained"], jobs=2, results=study_file.parent / "here", say=said.append)
    runs = run_study(study_file, results=study_file.parent / "ray", say=said.append, on=f"ray:{cluster.address}")
    failures = [(run.folder / "failed.txt").read_text()[-3000:] for run in runs if run.state == "failed"]
    assert [run.state for run in runs] == ["finished", "finished"], failures
    assert any("2 notebooks at a time, each with 1 core" in line for line in said)
    lost = [line for line in said if "its worker was lost" in line]
    assert len(lost) == 1, said
    assert lost[0].startswith("[1/2] trained seed 0: its worker was lost (")
    assert lost[0].endswith("it goes on from its last checkpoint (1 of 3 times)")

    here, there = (study_file.parent / place / "toy-quick" / "trained" / "seed0" for place in ("here", "ray"))
    worker, notebook, when = json.loads((there / "killed.json").read_text())
    assert not alive(worker, when)
    assert not alive(notebook, when)
    assert files_in(there) - files_in(here) == {"killed.json", ".executing.lock"}
    assert files_in(here) <= files_in(there)
    ours, theirs = (json.loads((folder / "result.json").read_text()) for folder in (here, there))
    assert ours.keys() == theirs.keys()
    assert kept(ours["metrics"]) == kept(theirs["metrics"])
    for name in ("variant", "seed", "status", "jobs", "digest", "run", "measures"):
        assert ours[name] == theirs[name]
    rows = [[kept(json.loads(line)) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (here, there)]
    assert rows[0] == rows[1]
    weights = [path for path in files_in(here) if path.endswith(".safetensors")]
    assert len(weights) > 1
    for path in weights:
        assert (here / path).read_bytes() == (there / path).read_bytes(), path
    seen = json.loads((there.parents[1] / "waits" / "seed0" / "seen.json").read_text())
    assert seen.pop("MLFLOW_TRACKING_URI").startswith("sqlite:///")
    told = {"OMP_NUM_THREADS": "1", "T2ILIB_BATCH": "1", "T2ILIB_HERE": "there too", "JUPYTER_PLATFORM_DIRS": "1"}
    assert seen == {"folder": str(study_file.parent)} | told
    assert {run["status"] for run in runs_in_mlflow(study_file.parent / "ray")} == {"FINISHED"}


@pytest.mark.parametrize("how", ["a node", "the study"])
def test_what_is_lost_or_stopped_goes_on(study_file: Path, cluster, how: str) -> None:
    """A node dies: its run goes on at the other. Ctrl-C: notebooks stop in good order, and the same command goes on; two runs, a node each."""
    results = study_file.parent / "results"
    folders = [results / "toy-two" / "waits" / f"seed{seed}" for seed in (0, 1)]
    words = ["study", "run", "toy.yaml", "--only", "waits", "--preset", "two", "--on", f"ray:{cluster.address}"]
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; from t2ilib.cli import app; app(sys.argv[1:])", *words],
        **{"cwd": study_file.parent, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True},
        start_new_session=True,
    )
    notes = [folder / "executions.txt" for folder in folders]
    until = time.monotonic() + 900
    while not all(note.exists() for note in notes):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < until
        time.sleep(0.1)
    before = [json.loads((folder / "process.json").read_text())["notebook"] for folder in folders]
    if how == "a node":
        cluster.remove_node(cluster.added.pop(), allow_graceful=False)
        (study_file.parent / "go").touch()
        told = process.communicate(timeout=900)[0]
        cluster.more()
        assert process.returncode == 0, told
        assert told.count("its worker was lost") == 1
        assert sorted(len(note.read_text()) for note in notes) == [1, 2]
        assert "2 of 2 runs finished" in told
    else:
        os.killpg(process.pid, signal.SIGINT)
        told = process.communicate(timeout=900)[0]
        assert process.returncode == 128 + signal.SIGINT, told
        assert "stopping: running notebooks commit a checkpoint" in told
        assert all((folder / "checkpoints" / "step-000001").exists() for folder in folders)
        assert not any((folder / "result.json").exists() or (folder / "failed.txt").exists() for folder in folders)
    assert not any(map(psutil.pid_exists, (pid for pid, _ in before)))
    assert all(word not in told for word in ("raylet", "Traceback", "WARNING", "core_worker")), told


def alive(pid: int, when: float) -> bool:
    """Whether a process that lived then does still."""
    try:
        process = psutil.Process(pid)
        return process.create_time() < when and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def runs_in_mlflow(results: Path) -> list[dict]:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{results}/mlflow.db")
    experiment = client.get_experiment_by_name("toy").experiment_id
    return [{"name": run.info.run_name, "status": run.info.status} for run in client.search_runs([experiment])]
