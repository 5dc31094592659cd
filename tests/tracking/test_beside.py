"""TensorBoard and Weights & Biases: read back with TensorBoard's own reader, and from W&B's transaction log; nothing is asked, shown or left
running, and a resumed run goes on without doubling points."""

import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
import wandb
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from t2ilib.config import ConfigError, RunConfig
from t2ilib.runfile import build_run
from t2ilib.tracking import beside
from t2ilib.tracking.beside import TensorBoard, WandB, last_events, last_row, read_history
from t2ilib.tracking.mlflow_run import MlflowTracker
from t2ilib.tracking.tracker import Trackers, open_tracker

LOSS = "A first look/loss"
STEPS = 4


@pytest.fixture(autouse=True)
def without_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def make_run(output: Path, *names: str, **changes) -> RunConfig:
    values = {
        "output": str(output),
        "adapter": {"rank": 4},
        "training": {"steps": STEPS},
        "tracking": {"beside": list(names)},
    }
    return build_run(values | changes)


def log_some(tracker, steps, output: Path) -> None:
    for step in steps:
        tracker.log_metrics({"loss": 1 / step, "learning_rate/unet": 0.5}, step)
        tracker.log_metrics({"held_out_loss": 2.0}, step)
        tracker.log_image(Image.new("RGB", (9, 7), (50 * step, 0, 0)), "samples", step)
    if steps[-1] < STEPS:
        return
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    (output / "progress").mkdir(parents=True, exist_ok=True)
    frames[0].save(output / "progress" / "grid.gif", save_all=True, append_images=frames[1:])
    tracker.log_artifact(output / "progress", "progress")


def events_of(run: RunConfig) -> EventAccumulator:
    return EventAccumulator(
        str(run.output / "tensorboard" / run.training_digest()), size_guidance={"scalars": 0, "images": 0}
    ).Reload()


def rows_of(run: RunConfig) -> list[dict]:
    folders = sorted((run.output / "wandb").glob("offline-run-*"))
    return [row for folder in folders for file in folder.glob("*.wandb") for row in read_history(file)]


def test_tensorboard_holds_what_was_logged(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "tensorboard")
    with open_tracker(run) as tracker:
        assert isinstance(tracker, TensorBoard)
        assert not run.output.exists(), "a run that is refused before it logs anything leaves nothing"
        log_some(tracker, (2, STEPS), run.output)
    events = events_of(run)
    assert [(e.step, e.value) for e in events.Scalars(LOSS)] == [(2, 0.5), (4, 0.25)]
    assert {LOSS, "A first look/held_out_loss", "learning_rate/unet"} <= set(events.Tags()["scalars"])
    assert [(e.step, e.width, e.height) for e in events.Images("samples")] == [(2, 9, 7), (4, 9, 7)]
    (shown,) = events.Images("progress/grid")
    assert shown.encoded_image_string == (run.output / "progress" / "grid.gif").read_bytes()
    settings = [path.read_text() for path in run.output.glob("tensorboard/*/*/hparams.yml")]
    assert len(settings) == 1
    assert "adapter.rank: '4'" in settings[0]


def test_tensorboard_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "tensorboard")
    with open_tracker(run) as tracker:
        log_some(tracker, (1, 2), run.output)
        tracker.log_metrics({"loss": 1 / 3}, 3)
    (file,) = (run.output / "tensorboard" / run.training_digest()).glob("events*")
    file.write_bytes(file.read_bytes()[:-5])  # step 3 was being written
    assert last_events(file.parent)[LOSS] == 2
    with open_tracker(run) as tracker:
        log_some(tracker, (2, 3, 4), run.output)
    events = events_of(run)
    assert [e.step for e in events.Scalars(LOSS)] == [1, 2, 3, 4]
    assert [e.step for e in events.Images("samples")] == [1, 2, 3, 4]
    assert len(events.Images("progress/grid")) == 1
    assert len(list(run.output.glob("tensorboard/*/*/hparams.yml"))) == 1


def test_wandb_without_login_holds_what_was_logged_and_goes_on(tmp_path: Path, capfd, caplog) -> None:
    caplog.set_level("INFO")
    run = make_run(tmp_path / "run", "wandb", name="one")
    with open_tracker(run) as tracker:
        assert isinstance(tracker, WandB)
        assert not run.output.exists()
        log_some(tracker, (1, 2), run.output)
    first = rows_of(run)
    assert [(row["_step"], row[LOSS], row["A first look/held_out_loss"]) for row in first] == [
        (1, 1.0, 2.0),
        (2, 0.5, 2.0),
    ]
    assert all(row["samples._type"] == "image-file" for row in first)
    (folder,) = (run.output / "wandb").glob("offline-run-*")
    assert "`wandb sync" in caplog.text
    assert str(folder) in caplog.text
    assert len(list((folder / "files" / "media").rglob("samples_*.png"))) == 2

    with open_tracker(
        run
    ) as tracker:  # from step 1 of a checkpoint; then measured after its last step, as notebooks do
        log_some(tracker, (2, 3, 4), run.output)
    with open_tracker(run) as tracker:
        tracker.log_metrics({"checker/all": 0.5}, 4)
    assert [row["_step"] for row in rows_of(run)] == [1, 2, 3, 4]
    folders = sorted((run.output / "wandb").glob("offline-run-*"))
    assert len({path.name.split("-")[3] for path in folders}) == 1, "one run of W&B"
    assert rows_of(run)[-1]["progress/grid._type"] == "video-file"
    assert "checker/all" in b"".join(file.read_bytes() for file in folders[-1].glob("*.wandb")).decode(errors="replace")
    names = {process.name() for process in psutil.Process().children(recursive=True)}
    assert not {name for name in names if name.startswith("wandb")}
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")


KILLED = """
import os, sys
from pathlib import Path
from t2ilib.runfile import build_run
from t2ilib.tracking.tracker import open_tracker
with open_tracker(build_run({"output": sys.argv[1], "adapter": {}, "tracking": {"beside": ["wandb"]}})) as tracker:
    for step in range(1, 400):
        tracker.log_metrics({"loss": 1 / step}, step)
    os.kill(os.getpid(), 9)
"""


def test_wandb_that_was_killed_leaves_no_process_and_is_read_as_far_as_it_wrote(tmp_path: Path) -> None:
    begun = set(psutil.pids())
    code = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "run")], capture_output=True).returncode
    assert code == -9
    new = [psutil.Process(pid) for pid in set(psutil.pids()) - begun if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs([p for p in new if "wandb" in p.name()], timeout=20)
    assert not alive
    folders = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    last = last_row(folders)
    assert -1 <= last < 400
    rows = [row["_step"] for folder in folders for file in folder.glob("*.wandb") for row in read_history(file)]
    assert rows == list(range(1, last + 1))


def test_a_transaction_log_over_many_blocks_is_read_whole_and_one_cut_anywhere_as_far_as_it_goes(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path / "run", "wandb")
    with open_tracker(run) as tracker:
        for step in range(1, 301):
            tracker.log_metrics({f"a/{i}": step / 7 for i in range(10)}, step)
    (file,) = run.output.glob("wandb/offline-run-*/*.wandb")
    data = file.read_bytes()
    assert len(data) > 3 * 2**15
    rows = list(read_history(file))
    assert [row["_step"] for row in rows] == list(range(1, 301))
    assert all(row["a/9"] == pytest.approx(row["_step"] / 7) for row in rows)
    for end in (0, 3, 7, 9, 2**15 - 1, 2**15, 2**15 + 3, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.wandb").write_bytes(data[:end])
        steps = [row["_step"] for row in read_history(tmp_path / "cut.wandb")]
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) == 0 if end < 100 else len(steps) < 301


def test_wandb_is_online_only_where_there_is_a_login(monkeypatch, tmp_path: Path) -> None:
    assert beside.wandb_mode() == "offline"
    host = urlsplit(wandb.setup().settings.base_url).hostname
    (tmp_path / "netrc").write_text(f"machine {host} login user password {'0' * 40}\n")
    assert beside.wandb_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert beside.wandb_mode() == "disabled"


def test_all_of_them_are_told_the_same(tmp_path: Path) -> None:
    run = make_run(tmp_path / "results" / "run", "tensorboard", "wandb")
    run = run.model_copy(update={"tracking": run.tracking.model_copy(update={"experiment": "tests"})})
    with open_tracker(run) as tracker:
        assert isinstance(tracker, Trackers)
        log_some(tracker, (1, 2), run.output)
        mlflow = tracker.trackers[0]
        assert isinstance(mlflow, MlflowTracker)
        assert tracker.run_id == mlflow.run_id
        tracker.flush()
        history = mlflow.client.get_metric_history(tracker.run_id, LOSS)
    values = [(1, 1.0), (2, 0.5)]
    assert [(m.step, m.value) for m in history] == values
    assert [(e.step, e.value) for e in events_of(run).Scalars(LOSS)] == values
    assert [(row["_step"], row[LOSS]) for row in rows_of(run)] == values


def test_a_tracker_that_is_not_installed_is_told_with_what_installs_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(beside.importlib.util, "find_spec", lambda name: None)
    with (
        pytest.raises(ConfigError, match=r"tracking.beside: wandb is not installed: pip install 't2ilib\[wandb\]'"),
        open_tracker(make_run(tmp_path / "run", "wandb")),
    ):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", ["offline-run-20261127_161600-d7e9", "run-20261127_161600-d7e9", "offline-run-20261127_161600-d7e9-1"])  # fmt: skip
def test_a_run_of_wandb_is_known_by_its_id_however_soon_it_began_again(folder: str) -> None:
    assert beside.id_of(Path("wandb") / folder) == "d7e9"
