"""Studies on Ray clusters: as here; workers that are killed and nodes that are lost leave no trace in the results, and no process.

Clusters here are of this machine alone, and nobody else can reach them.
"""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml

import t2ilib
from t2ilib.config import ConfigError
from t2ilib.studies import guard as guards
from t2ilib.studies import onray
from t2ilib.studies.bench import Bench
from t2ilib.studies.cards import VISIBLE
from t2ilib.studies.executor import TIMES_LOST, Executor
from t2ilib.studies.file import load_study
from t2ilib.studies.guard import MARK, Guard, marked
from t2ilib.studies.onray import ALONE, OBJECT_STORE_BYTES, TOKEN, require_shared_store, shares
from t2ilib.studies.place import Demand, Place, WorkerLost
from t2ilib.studies.runs import StudyRun, plan_runs
from t2ilib.studies.study import run_study
from t2ilib.studies.tuned import tuned_file
from t2ilib.studies.tuning import tune_study
from t2ilib.studies.where import ask_here, open_place

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

TRAIN = """import os, pathlib, signal, sys, time
import t2ilib
from t2ilib.evaluation.measures import measure
from t2ilib.shapes import source
from t2ilib.training import state
import json, psutil

source.NUM_VALIDATION = 6
killed, save = pathlib.Path(output) / "killed.json", state.save_checkpoint


def save_and_lose_the_worker(folder, checkpoint, keep):
    save(folder, checkpoint, keep)
    if checkpoint.step == 2 and "MARK" in os.environ and not killed.exists():
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
    measure(run, result.components, tracker, result.metrics, result.prompts)""".replace("MARK", MARK)


WAIT = """import json, os, pathlib, time, signal
folder = pathlib.Path(output)
(folder / "card.txt").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "-"))
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
OTHERWISE = ("memory/", "peak_", "steps_per_second", "data_wait_share", "adapter_mib", "drawing/")
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
        found.second = found.add_node(**args)
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


def begin(study_file: Path, *words: str, **variables: str) -> tuple[subprocess.Popen, list[Path]]:
    """A study of two runs that wait, in a process of its own, once both have begun; and their folders."""
    command = [
        sys.executable,
        "-c",
        "import sys; from t2ilib.cli import app; app(sys.argv[1:])",
        "study",
        "run",
        "toy.yaml",
    ]
    process = subprocess.Popen(
        [*command, "--only", "waits", "--preset", "two", *words],
        **{"cwd": study_file.parent, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True},
        env=os.environ | variables,
        start_new_session=True,
    )
    folders = [study_file.parent / "results" / "toy-two" / "waits" / f"seed{seed}" for seed in (0, 1)]
    until = time.monotonic() + 900
    while not all((folder / "executions.txt").exists() for folder in folders):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < until
        time.sleep(0.1)
    return process, folders


def require_silence(told: str) -> None:
    assert all(word not in told for word in ("raylet", "Traceback", "WARNING", "core_worker", "Error")), told


def test_trials_are_made_on_the_cluster_as_runs_are(study_file: Path, cluster) -> None:
    content = yaml.safe_load(study_file.read_text())
    content["search"], content["variants"]["waits"]["search"] = {"adapter.rank": {"low": 2, "high": 8}}, {}
    content |= {"tuning": {"seeds": [1000, 1001], "run": {"evaluation": {"prompts": []}}}, "score": "answer"}
    study_file.write_text(yaml.safe_dump(content))
    folder = study_file.parent / "results" / "toy-quick-tuning"
    folder.mkdir(parents=True)
    (folder / "go").touch()
    said: list[str] = []
    place = {"results": folder.parent, "on": f"ray:{cluster.address}"}
    trials = tune_study(study_file, only=["waits"], say=said.append, **place)
    told = json.loads(trials.read_text())["variants"]["waits"]
    assert [(trial["state"], trial["score"]) for trial in told["trials"]] == [("scored", 1000.53)]
    assert any("on the Ray cluster at" in line for line in said)
    seen = [json.loads(file.read_text()) for file in trials.parent.rglob("seen.json")]
    assert [found["OMP_NUM_THREADS"] for found in seen] == ["1", "1"]
    assert yaml.safe_load(tuned_file(study_file).read_text())


def test_a_run_whose_node_is_lost_goes_on_at_another(study_file: Path, cluster) -> None:
    process, folders = begin(study_file, "--on", f"ray:{cluster.address}")
    notebooks = [json.loads((folder / "process.json").read_text())["notebook"][0] for folder in folders]
    cluster.remove_node(cluster.second, allow_graceful=False)
    (study_file.parent / "results" / "go").touch()
    told = process.communicate(timeout=900)[0]
    assert process.returncode == 0, told
    assert told.count("its worker was lost") == 1
    assert sorted(len((folder / "executions.txt").read_text()) for folder in folders) == [1, 2]
    assert "2 of 2 runs finished" in told
    assert not any(map(psutil.pid_exists, notebooks))
    require_silence(told)


def test_a_cluster_of_ones_own_is_seen_by_nobody_and_ends_in_good_order(study_file: Path) -> None:
    """Each of two notebooks has one of two (faked) GPUs; Ctrl-C, which the terminal sends to all, reaches them as here."""
    pytest.importorskip("ray")
    home = study_file.parent / "home"
    home.mkdir()
    process, folders = begin(study_file, "--on", "ray", "--jobs", "2", HOME=str(home), **{VISIBLE: "GPU-aa,GPU-bb"})
    family = psutil.Process(process.pid).children(recursive=True)
    assert any("raylet" in member.name() for member in family)
    listening = {
        place.laddr.ip.removeprefix("::ffff:")
        for member in family
        for place in connections_of(member)
        if place.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}
    assert sorted((folder / "card.txt").read_text() for folder in folders) == ["GPU-aa", "GPU-bb"]
    assert not (home / ".ray").exists(), "a token for everybody's clusters"
    os.killpg(process.pid, signal.SIGINT)
    told = process.communicate(timeout=900)[0]
    assert process.returncode == 128 + signal.SIGINT, told
    assert "2 notebooks at a time, each with 1 GPU and" in told
    assert "stopping: running notebooks commit a checkpoint" in told
    assert all((folder / "checkpoints" / "step-000001").exists() for folder in folders)
    states = [
        run.state for run in plan_runs(load_study(study_file), study_file, "two", folders[0].parents[2], ["waits"])
    ]
    assert states == ["interrupted", "interrupted"]
    assert psutil.wait_procs(family, timeout=60)[1] == []
    require_silence(told)


def connections_of(process: psutil.Process) -> list:
    try:
        return process.net_connections("inet")
    except psutil.Error:  # gone meanwhile
        return []


@pytest.mark.parametrize(
    ("nodes", "jobs", "per_card", "expected"),
    [
        ([{"CPU": 16.0, "GPU": 4.0}], None, 1, (4, 1.0, 4)),
        ([{"CPU": 16.0, "GPU": 4.0}], 2, 1, (2, 1.0, 4)),
        ([{"CPU": 2.0, "GPU": 4.0}], None, 1, (4, 1.0, 0.5)),
        ([{"CPU": 9.0, "GPU": 2.0}, {"CPU": 64.0}], None, 2, (4, 0.5, 2)),  # a head without a GPU is left alone
        ([{"GPU": 1.0}], 7, 3, (7, 0.3333, 0)),  # more wait for their turn
        ([{"CPU": 5.0}], None, 1, (1, 0, 5)),
        ([{"CPU": 5.0}], 2, 1, (2, 0, 2)),
        ([{"CPU": 1.0}], 3, 1, (3, 0, 0.3333)),
        ([{"CPU": 4.0}, {"CPU": 8.0}, {}], None, 1, (2, 0, 4)),
        ([{"CPU": 4.0}, {"CPU": 4.0}], 3, 1, (3, 0, 2)),
    ],
)
def test_who_has_how_much_of_a_machine(nodes: list, jobs: int | None, per_card: int, expected: tuple) -> None:
    assert shares(nodes, jobs, per_card) == expected


def test_a_cluster_that_has_nothing_to_give_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no node of the cluster has a CPU or a GPU"):
        shares([{}, {"memory": 3.0}], 2)


@pytest.mark.parametrize(
    ("uri", "machines", "refused"),
    [
        ("sqlite:////shared/mlflow.db", 1, False),
        ("sqlite:////shared/mlflow.db", 2, True),
        ("sqlite+pysqlite:////shared/mlflow.db", 3, True),
        ("/shared/mlruns", 2, True),
        ("http://127.0.0.1:5000", 2, True),
        ("http://localhost:5000", 1, False),
        ("http://10.0.0.5:5000", 2, False),
        ("databricks", 2, False),
        ("postgresql://somebody@db/mlflow", 2, False),
    ],
)
def test_several_machines_need_an_mlflow_server(uri: str, machines: int, refused: bool) -> None:
    if not refused:
        return require_shared_store(uri, machines)
    with pytest.raises(ConfigError, match="start an MLflow server that all of them reach, and set MLFLOW_TRACKING_URI"):
        require_shared_store(uri, machines)


@pytest.mark.parametrize(
    ("on", "message"),
    [
        ("rya", "--on 'rya' does not exist; choose from here, ray. Did you mean 'ray'"),
        ("ray:", "--on ray:: an address is missing behind the colon"),
        ("here:there", "here is this machine, and has no address"),
        ("ray:head", "write --on ray:auto, or --on ray:HOST:PORT"),
        ("ray:127.0.0.1:1", "nobody answers there .*refused"),
        ("ray:ray://head:10001", "run the study on a node of the cluster"),
    ],
)
def test_mistakes_about_the_place(on: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message), open_place(on, Demand(1, 1, 1, "sqlite:///x", print)):
        pass


def test_without_ray_the_error_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(ConfigError, match=r"--on ray needs Ray: pip install 't2ilib\[ray\]'"),
        open_place("ray", Demand(1, 1, 1, "sqlite:///x", print)),
    ):
        pass


CHILD = """import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3000)"], start_new_session=True)
print("up", flush=True)
time.sleep(3000)"""
WORKER = """import os, subprocess, sys, time
from pathlib import Path
from t2ilib.studies.file import load_study
from t2ilib.studies.guard import MARK, Guard
guard = Guard(Path(sys.argv[1]), "abc")
subprocess.Popen([sys.executable, "-c", sys.argv[2]], env=os.environ | {MARK: "abc"}, start_new_session=True)
time.sleep(3000)"""


def test_a_notebook_is_dead_with_its_worker_and_before_the_next_begins(tmp_path: Path) -> None:
    """What it has started too, whatever sessions they are in, and whatever signals they ignore."""
    command = [sys.executable, "-c", WORKER, str(tmp_path), CHILD]
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert worker.stdout.readline() == "up\n"
    until = time.monotonic() + 60
    while len(marked("abc")) < 2:
        assert time.monotonic() < until
        time.sleep(0.05)
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3000)"], env=os.environ | {MARK: "x"})
    worker.kill()
    guard = Guard(tmp_path, "def")
    assert marked("abc") == []
    assert bystander.poll() is None
    bystander.kill()
    guard.close()
    worker.communicate()


def test_a_notebook_that_does_not_end_is_not_doubled(tmp_path: Path, monkeypatch) -> None:
    """And one that ended in good order holds nobody up."""
    first = Guard(tmp_path, "one")
    monkeypatch.setattr(guards, "SECONDS_TO_WAIT", 0.2)
    told: list[str] = []
    monkeypatch.setattr("builtins.print", lambda word, **_: told.append(word))
    guards.guard(tmp_path, "two")
    assert told == [guards.REFUSED]
    first.close()
    monkeypatch.setattr("sys.stdin", io.StringIO())
    guards.guard(tmp_path, "two")
    assert told == [guards.REFUSED, guards.HELD]


@pytest.mark.parametrize(("losses", "state"), [(TIMES_LOST, "finished"), (TIMES_LOST + 1, "failed")])
def test_lost_workers_are_replaced_so_many_times(losses: int, state: str, tmp_path: Path, monkeypatch) -> None:
    said, times = [], []

    def execute(notebook, output, parameters, variables, follow, started, stopping) -> tuple[int, str]:
        started(lambda: None)
        times.append(variables["OMP_NUM_THREADS"])
        if len(times) <= losses:
            raise WorkerLost("its worker was lost (the machine is gone)")
        write_notebook(output, "pass")
        (output.parent / "metrics.json").write_text("{}")
        return 0, ""

    monkeypatch.setattr(StudyRun, "parameters", lambda self, parent: {})
    run = StudyRun("v", 0, {}, tmp_path / "v", tmp_path / "x.ipynb", {"study": "toy"})
    Executor([run], Place(1, execute, ask_here, 1, threads=3), "parent", "uri", said.append).run()
    assert run.state == state
    assert times == ["3"] * (TIMES_LOST + 1)
    assert sum("it goes on from its last checkpoint" in line for line in said) == TIMES_LOST
    if state == "failed":
        assert "(the machine is gone), for the 4th time" in (run.folder / "failed.txt").read_text()


def test_a_worker_that_is_not_like_the_study_refuses(tmp_path: Path) -> None:
    asked = (tmp_path / "x.ipynb", tmp_path / "run" / "notebook.ipynb", tmp_path / "p.yaml", {}, tmp_path)
    with pytest.raises(ConfigError, match=r"and the study is run by 9\.9: install the same on all nodes"):
        Bench().start(*asked, "9.9")
    with pytest.raises(ConfigError, match=r"does not see .*x.ipynb: on a cluster .* storage that all nodes share"):
        Bench().start(*asked, t2ilib.__version__)


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
