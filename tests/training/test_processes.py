"""Two processes train what one does: losses, weights, checkpoints, streams; and they end together, whatever ends them."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from safetensors.torch import load_file

from t2ilib.cli import errors
from t2ilib.config import ConfigError
from t2ilib.data import opening
from t2ilib.runfile import build_run
from t2ilib.training.checkpoint import list_checkpoints
from t2ilib.training.history import read_rows
from t2ilib.training.loop import train
from t2ilib.training.processes import own_parts, require_parts, share_of
from t2ilib.training.sharding import PLUGINS, require_no_plugin, require_shardable

ROOT = Path(__file__).parents[2]
CPU_2 = ROOT / "experiments" / "accelerate" / "cpu-2.yaml"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


def values_of(output: Path, **changes) -> dict:
    """A small run; `changes`: sections, or fields of them."""
    values = {
        "output": str(output),
        "adapter": {"rank": 2, "alpha": 2.0},
        "data": {"source": "shapes"},
        "shapes": {"scenes": ["heart"], "num_pictures": 8, "checked_prompts": 0},
        "objective": {"caption_dropout": 0.3},
        "training": {"steps": 4, "batch_size": 4, "checkpoint_every": 2},
        "evaluation": {
            "validate_every": 0,
            "validation_timesteps": 1,
            "validation_pictures": 1,
            "sample_every": 0,
            "prompts": ["a red heart"],
            "num_inference_steps": 1,
        },
    }
    for section, fields in changes.items():
        values[section] = fields if fields is None else values.get(section, {}) | fields
    return values


DROPS = {"dropout": 0.3, "text_encoder_targets": "attention"}
UNET = {"adapter": None, "shapes": {"num_pictures": 6}, "data": {"cache": "off"}}
AVERAGED = {"trains": "unet", "ema_horizon": 3, "steps": 3, "gradient_checkpointing": True}
SPREAD = {"shard": True}


def streamed(folder: Path) -> dict:
    return {"shapes": None, "data": {"source": "webdataset", "path": str(folder), "streaming": True, "resolution": 32}}


def cases(folder: Path, shards: Path) -> dict[str, dict]:
    """What both processes do, in this order."""

    def two(name: str, **changes) -> dict[str, dict]:
        return {name: values_of(folder / "two" / name, **changes)}

    return {
        **two("plain"),
        **two("dropped", adapter=DROPS),
        **two("resumed", adapter=DROPS),
        **two("unet", **UNET, training=AVERAGED | {"accumulation": 2}),
        **two("sharded", **UNET, training=AVERAGED | {"steps": 2}, compute=SPREAD),
        **two("spread-later", **UNET, training=AVERAGED, compute=SPREAD),
        **two("stream", **streamed(shards), training={"steps": 6}),
        **two("undivided", training={"batch_size": 5}),
        **two("nowhere", shapes=None, data={"source": "folder", "path": str(folder / "nowhere")}),
        **two("mismatched", adapter={"targets": ["no_such_layer"]}),
        **two("broken"),
        **two("poisoned"),
        **two("signalled", training={"checkpoint_every": 100}),
    }


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Twelve pictures of noise in two shards."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(2):
        with tarfile.open(folder / f"s-{shard}.tar", "w") as tar:
            for i in range(shard * 6, shard * 6 + 6):
                pixels, data = np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8), io.BytesIO()
                PIL.Image.fromarray(pixels).save(data, "PNG")
                for ending, content in (("png", data.getvalue()), ("txt", f"it {i}".encode())):
                    info = tarfile.TarInfo(f"{i:03d}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory, machine):
    """`one(name, **changes)` trains a run in this process and gives its folder."""
    folder, threads = tmp_path_factory.mktemp("one"), torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "BLOCK", 5)
        yield lambda name, **changes: train(build_run(values_of(folder / name, **changes))).output
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def two(tmp_path_factory, shards, machine) -> Path:
    """The folder in which two processes have done all `cases`."""
    folder = tmp_path_factory.mktemp("together")
    given, threads = cases(folder, shards), torch.get_num_threads()
    torch.set_num_threads(1)
    for name in ("resumed", "spread-later"):  # begun by one process
        begun = {"training": given[name]["training"] | {"steps": 2}, "compute": {}}
        train(build_run(given[name] | begun))
    torch.set_num_threads(threads)
    (folder / "cases.json").write_text(json.dumps(given))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*launcher, str(Path(__file__).with_name("one_of_two.py")), str(folder / "cases.json")],
        env=ENVIRONMENT | {"T2ILIB_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def told(two: Path, name: str) -> list[str]:
    """How a case ended in each process, "" for well."""
    return [(two / f"{name}-{number}.txt").read_text() for number in range(2)]


def steps_of(output: Path) -> list[tuple[float, float]]:
    """Loss and norm of the gradients of every step."""
    return [
        (row["loss"], row["grad_norm"]) for row in read_rows(output / "metrics.jsonl") if "learning_rate/unet" in row
    ]


def require_same(found: Path, expected: Path, close: float = 1e-6) -> None:
    """The same losses and gradients in every step, and the same last checkpoint by name, shape and nearly by value."""
    assert len(steps_of(found)) == len(steps_of(expected)) > 1
    assert np.allclose(steps_of(found), steps_of(expected), rtol=1e-4, atol=close)
    assert np.abs(np.subtract(steps_of(found), steps_of(expected))[:, 0]).max() < close
    paths = [list_checkpoints(folder / "checkpoints")[-1] for folder in (found, expected)]
    assert paths[0].name == paths[1].name
    for stem in ("weights", "ema"):
        if (paths[1] / f"{stem}.safetensors").exists():
            ours, theirs = (load_file(path / f"{stem}.safetensors") for path in paths)
            assert ours.keys() == theirs.keys()
            for name, tensor in theirs.items():
                assert torch.allclose(ours[name], tensor, rtol=1e-3, atol=1e-5), name


def test_two_processes_give_what_one_gives(two, one) -> None:
    """Without dropout, and so whatever the parts of a batch are."""
    assert told(two, "plain") == ["", ""]
    require_same(two / "two" / "plain", one("plain"))
    last = read_rows(two / "two" / "plain" / "metrics.jsonl")[-1]
    assert {"held_out_loss", "adapter/change_norm", "data_wait_share"} <= last.keys()
    assert (two / "two" / "plain" / "samples" / "grid-000004.png").exists()


def test_dropout_too_is_that_of_one_process_which_accumulates_twice_as_often(two, one) -> None:
    """The same parts with the same numbers, text encoders with adapters among what is averaged; here only sums differ in their order."""
    require_same(two / "two" / "dropped", one("dropped", adapter=DROPS, training={"accumulation": 2}), close=1e-8)


def test_what_one_process_began_two_go_on_with(two) -> None:
    """Its first two steps had other dropout masks, being taken whole; the last two follow from them."""
    assert told(two, "resumed") == ["", ""]
    rows = steps_of(two / "two" / "resumed")
    assert len(rows) == 4
    assert rows[:2] != steps_of(two / "two" / "dropped")[:2]
    assert [path.name for path in list_checkpoints(two / "two" / "resumed" / "checkpoints")][-1] == "step-000004"


def test_what_two_processes_began_one_goes_on_with(two, one) -> None:
    """From the checkpoint that a signal made them write after their third step."""
    folder = two / "two" / "signalled"
    before = steps_of(folder)
    assert train(build_run(values_of(folder))).resumed_from == len(before) == 3
    assert steps_of(folder)[:3] == before
    assert np.allclose(steps_of(folder), steps_of(two / "two" / "plain"), rtol=1e-4, atol=1e-6)


def test_a_whole_unet_and_its_average_of_pictures_encoded_in_the_steps(two, whole) -> None:
    assert told(two, "unet") == ["", ""]
    require_near(two / "two" / "unet", whole)


@pytest.fixture(scope="module")
def whole(one) -> Path:
    """A whole UNet of pictures encoded in the steps, with its average, in one process."""
    return one("unet", **UNET, training=AVERAGED)


def require_near(found: Path, expected: Path) -> None:
    """Of whole networks the weights are the same but for some that have hardly a gradient, of which Adam makes full steps all the same."""
    assert np.allclose(steps_of(found), steps_of(expected), rtol=1e-4, atol=1e-6)
    assert len(steps_of(found)) == len(steps_of(expected)) == 3
    for name in ("checkpoints/step-000003/ema", "model/unet/diffusion_pytorch_model"):
        ours, theirs = (load_file(folder / f"{name}.safetensors") for folder in (found, expected))
        assert ours.keys() == theirs.keys()
        assert max(float((ours[key] - tensor).norm() / tensor.norm()) for key, tensor in theirs.items()) < 1e-2
        difference = sum(float((ours[key] - tensor).square().sum()) for key, tensor in theirs.items())
        assert difference / sum(float(tensor.square().sum()) for tensor in theirs.values()) < 1e-6


def test_a_network_that_is_spread_is_the_whole_one_also_when_one_process_goes_on_with_it(two, whole) -> None:
    """Its held-out loss before and after, its average and its last weights; first steps spread, the last in one process."""
    assert told(two, "sharded") == ["", ""]
    folder = two / "two" / "sharded"
    assert (folder / "samples" / "grid-000002.png").exists()
    assert train(build_run(values_of(folder, **UNET, training=AVERAGED))).resumed_from == 2
    require_near(folder, whole)


def test_a_network_that_one_process_began_is_spread(two, whole) -> None:
    assert told(two, "spread-later") == ["", ""]
    require_near(two / "two" / "spread-later", whole)
    held_out = [
        [row["held_out_loss"] for row in read_rows(folder / "metrics.jsonl") if "held_out_loss" in row][-1]
        for folder in (two / "two" / "spread-later", whole)
    ]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"adapter": {}}, "training adapter: it is for whole UNets"),
        ({"training": {"trains": "unet"}, "optimizer": {"name": "adamw8bit"}}, "adamw8bit, which wants whole tensors"),
    ],
)
def test_what_cannot_be_spread_is_refused(changes: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=f"compute.shard does not go with .*{says}"):
        require_shardable(build_run({"compute": SPREAD} | changes), accelerator_of(2))


def test_one_process_has_nobody_to_share_with() -> None:
    run = build_run({"compute": SPREAD, "training": {"trains": "unet"}})
    with pytest.raises(ConfigError, match="launch several"):
        require_shardable(run, accelerator_of(1))


@pytest.mark.parametrize("name", PLUGINS)
def test_what_accelerate_would_spread_in_its_own_way_is_refused(name: str, monkeypatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ConfigError, match=f"launched with {name}.*compute.shard"):
        require_no_plugin()


def test_a_stream_is_the_same_and_written_down_once(two, one, shards) -> None:
    """Into the second pass over it."""
    assert told(two, "stream") == ["", ""]
    found, expected = two / "two" / "stream", one("stream", **streamed(shards), training={"steps": 6})
    require_same(found, expected)
    for name in ("manifest.csv", "stream.jsonl"):
        assert (found / name).read_bytes() == (expected / name).read_bytes()


def test_pictures_are_encoded_once_each_process_its_share(two) -> None:
    """8 pictures of the first run and one that is held out."""
    shares = []
    for path in (two / "cache" / "encoded").glob("latents-*/*.safetensors"):
        shares += [len(latents) for latents in load_file(path).values()]
    assert sorted(shares) == [4, 5]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("undivided", "ConfigError: training.batch_size 5 is the pictures of a step over all processes"),
        ("nowhere", "ConfigError: "),
        ("mismatched", "ConfigError: "),
        ("poisoned", "NonFiniteLoss: the loss of 2 sample(s) is not finite at step 2"),
    ],
)
def test_a_mistake_is_told_by_the_main_process_and_ends_both(two, name: str, says: str) -> None:
    main, other = told(two, name)
    assert main.startswith(says), main
    assert other == "EndedElsewhere: 1"


def test_a_mistake_of_one_process_is_told_by_it_and_ends_both(two) -> None:
    assert told(two, "broken") == ["EndedElsewhere: 1", "ConfigError: the disk of this one is full"]


def test_a_signal_to_one_process_stops_both_after_one_checkpoint(two) -> None:
    assert told(two, "signalled") == ["Interrupted: SIGTERM after step 3, of which there is a checkpoint"] * 2
    assert "step-000003" in [path.name for path in list_checkpoints(two / "two" / "signalled" / "checkpoints")]


def launch(config: Path, values: dict | str, folder: Path) -> subprocess.Popen:
    file = folder / "run.yaml"
    file.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "-m", "t2ilib.cli"]
    return subprocess.Popen(
        [*command, "train", str(file)], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_the_launcher_is_told_to_stop_and_everything_was_said_and_written_once(tmp_path: Path) -> None:
    training = {"steps": 2000, "checkpoint_every": 2000}
    values = values_of(tmp_path / "run", training=training, tracking={"experiment": "launched"})
    launcher = launch(CPU_2, values, tmp_path)
    rows = tmp_path / "run" / "metrics.jsonl"
    until = time.monotonic() + 600
    while not (rows.exists() and len(read_rows(rows)) > 3):
        assert launcher.poll() is None, launcher.stdout.read()
        assert time.monotonic() < until
        time.sleep(0.05)
    launcher.send_signal(signal.SIGTERM)
    output, _ = launcher.communicate()
    assert launcher.returncode != 0
    assert len(list_checkpoints(tmp_path / "run" / "checkpoints")) == 1
    steps = [row["step"] for row in read_rows(rows) if "grad_norm" in row]
    assert steps == list(range(1, len(steps) + 1))
    for line in ("2 processes train as one", "memory at loaded", "step 1/2000", "SIGTERM: committing a checkpoint"):
        assert output.count(line) == 1, output

    from mlflow import MlflowClient

    note = json.loads((tmp_path / "run" / "tracking.json").read_text())
    client = MlflowClient(note["uri"])
    runs = client.search_runs([client.get_experiment_by_name("launched").experiment_id])
    assert [run.info.status for run in runs] == ["KILLED"]


def test_a_run_file_that_is_wrong_is_told_once(tmp_path: Path) -> None:
    launcher = launch(CPU_2, "training: {stepps: 3}", tmp_path)
    output, _ = launcher.communicate()
    assert launcher.returncode != 0
    assert output.count("ConfigError: ") == output.count("training.stepps: no such field.") == 1, output


def accelerator_of(processes: int, number: int = 0) -> SimpleNamespace:
    return SimpleNamespace(num_processes=processes, process_index=number, scaler=None)


def test_every_sample_is_in_one_part_of_one_process() -> None:
    ids = list(range(10, 34))
    for processes, accumulation in ((1, 1), (1, 4), (3, 2), (4, 1)):
        parts = {}
        for number in range(processes):
            parts |= dict(own_parts(ids, accumulation, accelerator_of(processes, number)))
        assert [i for _, part in sorted(parts.items()) for i in part] == ids
        assert {len(part) for part in parts.values()} == {24 // processes // accumulation}


@pytest.mark.parametrize(
    ("batch", "accumulation", "processes", "suitable"),
    [(5, 1, 2, "take 4, 6, 8, 10 or another multiple of 2"), (4, 2, 4, "take 8, 16, 24, 32 or another multiple of 8")],
)
def test_a_batch_that_does_not_divide_is_refused_with_those_that_do(batch, accumulation, processes, suitable) -> None:
    run = build_run({"adapter": {}, "training": {"batch_size": batch, "accumulation": accumulation}})
    with pytest.raises(ConfigError, match=suitable):
        require_parts(run, accelerator_of(processes))
    require_parts(run, accelerator_of(1))


def test_what_contrasts_a_whole_batch_is_refused() -> None:
    run = build_run({"data": {"source": "shapes"}, "shapes": {"trains": "clip"}})
    with pytest.raises(ConfigError, match="contrasts all pictures of a batch"):
        require_parts(run, accelerator_of(2))


def test_a_process_needs_the_memory_of_its_share() -> None:
    run = build_run({"adapter": {}, "training": {"batch_size": 16, "accumulation": 2}})
    assert share_of(run, 1) == run
    assert share_of(run, 4).training.batch_size == 4
    assert share_of(run, 16).training.batch_size == 2  # a picture for each accumulation is the least


def test_what_one_process_alone_finds_wrong_it_tells_once_the_first_had_time(monkeypatch, capsys) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(errors, "SECONDS_FOR_THE_FIRST", 0.3)
    begun = time.monotonic()
    with pytest.raises(SystemExit), errors.readable_errors():
        raise ConfigError("my pictures are not there")
    assert time.monotonic() - begun > 0.3
    assert "my pictures are not there" in capsys.readouterr().err
