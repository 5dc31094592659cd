"""Runs on pictures that are encoded once, or in every step: the same training, whatever was there before, whoever else writes and
whenever it is killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from t2ilib.cli import app
from t2ilib.data import cache
from t2ilib.data.dataset import load_datasets
from t2ilib.data.store.tensorfile import read_shard
from t2ilib.models.components import Components
from t2ilib.models.load import load_base
from t2ilib.runfile import build_run, save_run
from t2ilib.shapes import world
from t2ilib.training.checkpoint import list_checkpoints
from t2ilib.training.loop import build_accelerator, train
from t2ilib.training.objectives import addressed_noise
from t2ilib.training.setups import setup_diffusion

CHANCE = {"crop": "random", "flip": 0.5, "views": 3, "captions": ["shuffle_tags"]}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Twelve drawn pictures, four of each of three shapes, with two captions of tags each."""
    path = tmp_path_factory.mktemp("pictures") / "drawn"
    world.write_folder(path, world.mixed_scenes(12, "train", 0, ("base",)), 0, num_phrasings=1)
    rows = [json.loads(line) for line in (path / "metadata.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        with Image.open(path / row["file_name"]) as image:
            upright = image.convert("RGB")
        upright.resize(((64, 64), (64, 48), (44, 64))[number % 3]).save(path / row["file_name"])
        row["text"] = [row["text"], f"drawn, {row['text'].replace(' ', ', ')}"]
    (path / "metadata.jsonl").write_text(
        "\n".join(json.dumps({k: row[k] for k in ("file_name", "text")}) for row in rows)
    )
    return path


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """A cache folder for each test, and one thread, as processes that are killed have."""
    monkeypatch.setenv("T2ILIB_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def values_of(output: Path, path: Path, **sections) -> dict:
    values = {
        "output": str(output),
        "adapter": {"rank": 2},
        "data": {"path": str(path), "resolution": 32, "validation_share": 0.25},
        "objective": {"caption_dropout": 0.2},
        "training": {"steps": 5, "batch_size": 2, "checkpoint_every": 2},
        "evaluation": {
            "validate_every": 0,
            "validation_timesteps": 2,
            "sample_every": 0,
            "prompts": ["a red heart"],
            "num_inference_steps": 1,
        },
    }
    return values | {name: {**values.get(name, {}), **section} for name, section in sections.items()}


def run_of(output: Path, path: Path, seed: int = 0, **sections):
    return build_run({**values_of(output, path, **sections), "seed": seed})


def tensors(output: Path) -> dict[str, bytes]:
    """Of the adapter, by name, as bytes; and those of the last checkpoint."""
    last = list_checkpoints(output / "checkpoints")[-1]
    found = {}
    for file in (output / "adapter" / "pytorch_lora_weights.safetensors", last / "weights.safetensors"):
        found |= {f"{file.name} {name}": tensor.numpy().tobytes() for name, tensor in load_file(file).items()}
    return found


def losses(output: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "grad_norm" in row}


def entries(folder: Path) -> list[bytes]:
    """The keys in all shards below, as often as they are there."""
    found = []
    for shard in folder.rglob("*.safetensors"):
        fingerprint = json.loads(shard.read_bytes()[8:].split(b"}", 1)[0] + b"}}")["__metadata__"]["store"]
        found += [key for group in read_shard(shard, fingerprint)[0] for key in group.keys.tolist()]
    return found


def test_what_is_kept_and_what_is_encoded_in_every_step_train_alike(folder, tmp_path) -> None:
    """To rounding. Latents are the same bits, for pictures are always encoded alone. Captions are kept from batches of 16 and encoded
    in the step two at a time, for which kernels give other last bits (1e-6 of pooled text); Adam turns these into a part of its
    step of 1e-4 a weight, where a gradient is near zero."""
    for kept, workers in {"all": 2, "latents": 1, "off": 3}.items():
        train(run_of(tmp_path / kept, folder, data={**CHANCE, "cache": kept, "workers": workers}))
    assert tensors(tmp_path / "latents") == tensors(tmp_path / "off")
    assert losses(tmp_path / "latents") == losses(tmp_path / "off")
    for step, loss in losses(tmp_path / "all").items():
        assert losses(tmp_path / "off")[step] == pytest.approx(loss, rel=1e-5)
    whole, other = (
        load_file(list_checkpoints(tmp_path / kept / "checkpoints")[-1] / "weights.safetensors")
        for kept in ("all", "off")
    )
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=2e-5, msg=name)
    moved = max(float(tensor.abs().max()) for name, tensor in whole.items() if "lora_B" in name)
    assert moved > 1e-4  # B begins at zero, so the tolerance is far below what was learned


def test_a_run_is_the_same_whatever_the_workers_and_what_was_there_before(folder, tmp_path, monkeypatch) -> None:
    others = {"validation_share": 0.6, "flip": 0.5, "crop": "random", "views": 2, "captions": ["lower"]}
    for workers in (1, 2, 4):
        monkeypatch.setenv("T2ILIB_CACHE", str(tmp_path / f"cache of {workers}"))
        if workers == 4:  # after a run that sees other parts of the pictures, some of them alike
            train(run_of(tmp_path / "another", folder, data=others, training={"steps": 1}))
            some = entries(tmp_path / "cache of 4" / "encoded")
        train(run_of(tmp_path / str(workers), folder, data={**CHANCE, "workers": workers}))
    assert tensors(tmp_path / "1") == tensors(tmp_path / "2") == tensors(tmp_path / "4")
    own, all_of_both = (set(entries(tmp_path / f"cache of {workers}" / "encoded")) for workers in (1, 4))
    assert len(own & set(some)) > 5
    assert own | set(some) == all_of_both


def test_the_second_run_of_a_study_encodes_nothing(folder, tmp_path, monkeypatch, caplog) -> None:
    caplog.set_level("INFO")
    train(run_of(tmp_path / "first", folder, data=CHANCE))
    assert "views of pictures in" in caplog.text
    assert "captions in" in caplog.text
    before = sorted(entries(tmp_path / "cache"))
    caplog.clear()
    encoded, asked = [], []
    encode_pictures, encode_text = Components.encode_pictures, Components.encode_text
    monkeypatch.setattr(Components, "encode_pictures", lambda *a: encoded.append(a) or encode_pictures(*a))
    monkeypatch.setattr(Components, "encode_text", lambda self, c: asked.append(c) or encode_text(self, c))
    train(run_of(tmp_path / "second", folder, seed=1, data=CHANCE, adapter={"rank": 4}))
    assert not encoded
    assert not asked
    assert "encoded" not in caplog.text
    assert sorted(entries(tmp_path / "cache")) == before
    assert tensors(tmp_path / "second") != tensors(tmp_path / "first")


FORKED = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
from t2ilib.data import store
from t2ilib.models.load import load_base
from t2ilib.runfile import build_run
from t2ilib.training import loop

store.SECONDS_BETWEEN_COMMITS = 0.0  # every entry is a shard of its own

def die_after(count, function, counts=lambda *args: True):
    def called(*args, **options):
        called.count += counts(*args)
        if called.count > count:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)
    called.count = 0
    return called

def start(values, encoding=None, count=0):
    process = os.fork()
    if process == 0:
        try:
            if encoding == "steps":
                loop.take_gradients = die_after(count, loop.take_gradients)
            elif encoding:
                store.Writer.add = die_after(count, store.Writer.add, lambda self, keys, tensors: encoding in tensors)
            loop.train(build_run(values))
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    return process

groups = json.loads(sys.stdin.read())
load_base(build_run(groups[0][0][0]).model, torch.device("cpu"))  # imports what every process needs
for group in groups:
    processes = [start(*job) for job in group]
    print("codes", *(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes), flush=True)
"""
"""Trains in processes that are killed after so many entries or steps, group after group, those of a group at once. They are forked from one
that has imported everything, which is what takes the time."""


def test_killed_while_encoding_and_in_an_epoch_and_two_at_once(folder, tmp_path) -> None:
    """A process that is killed after 7 views, another after the first captions, a third in the 2nd of the three steps after a checkpoint:
    the run that is resumed after them is the straight one. And two that start at once on one cache encode nothing twice."""
    killed = values_of(tmp_path / "killed", folder, data={**CHANCE, "cache_path": str(tmp_path / "a")})
    straight = values_of(tmp_path / "straight", folder, data={**CHANCE, "cache_path": str(tmp_path / "b")})
    twin = values_of(tmp_path / "twin", folder, data={**CHANCE, "cache_path": str(tmp_path / "b")})
    groups = [
        [(killed, "latents", 7)],
        [(killed, "pooled", 1)],
        [(killed, "steps", 3), (straight,), (twin,)],
        [(killed,)],
    ]
    done = subprocess.run(
        [sys.executable, "-c", FORKED],
        input=json.dumps(groups),
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    codes = [line for line in done.stdout.splitlines() if line.startswith("codes")]
    assert codes == ["codes -9", "codes -9", "codes -9 0 0", "codes 0"], done.stderr
    assert list_checkpoints(tmp_path / "killed" / "checkpoints")
    assert tensors(tmp_path / "killed") == tensors(tmp_path / "straight") == tensors(tmp_path / "twin")
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    for kept in ("a", "b"):
        keys = entries(tmp_path / kept)
        assert len(keys) == len(set(keys)) > 50
    assert sorted(entries(tmp_path / "a")) == sorted(entries(tmp_path / "b"))


def test_a_damaged_cache_is_told_by_name_with_what_to_do(folder, tmp_path) -> None:
    run = run_of(tmp_path / "run", folder)
    train(run)
    (shard,) = (tmp_path / "cache" / "encoded").glob("latents-*/*.safetensors")
    whole = shard.read_bytes()
    save_run(run_of(tmp_path / "again", folder), tmp_path / "again.yaml")
    told = {}
    for name, damaged in {"cut": whole[:-9], "flipped": whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:]}.items():
        shard.write_bytes(damaged)
        result = CliRunner().invoke(app, ["train", str(tmp_path / "again.yaml")])
        assert result.exit_code == 2
        told[name] = " ".join(result.output.split())
        assert f"{shard} is " in told[name]
        assert told[name].endswith("delete this file, and what it held is encoded again")
    assert "cut off" in told["cut"]
    assert "is damaged" in told["flipped"]
    shard.unlink()
    train(run_of(tmp_path / "again", folder))
    assert tensors(tmp_path / "again") == tensors(tmp_path / "run")


def test_buckets_train_are_measured_and_go_on_in_the_middle_of_an_epoch(folder, tmp_path) -> None:
    """Three sizes, of four pictures each; the held-out ones of several sizes too."""
    data = {**CHANCE, "buckets": True, "resolution": 64, "cache": "latents"}
    shapes = []
    straight = run_of(tmp_path / "straight", folder, data=data)
    forward = cache.EncodedDataset.batch

    def watched(self, ids, step, dropped, device):
        found = forward(self, ids, step, dropped, device)
        shapes.append((self.samples.held_out, tuple(found["latents"].shape[2:]), found["time_ids"][:, 4:].tolist()))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache.EncodedDataset, "batch", watched)
        train(straight)
    for _, (height, width), targets in shapes:
        assert {(int(h), int(w)) for h, w in targets} == {(8 * height, 8 * width)}
    sizes = {held_out: {size for which, size, _ in shapes if which is held_out} for held_out in (False, True)}
    assert sizes[True] == {(8, 8), (6, 10), (10, 6)}
    assert sizes[False] == sizes[True]
    _, held_out = load_datasets(straight)
    (last,) = sorted((tmp_path / "straight" / "held_out").glob("*5.json"))
    assert [row["picture"] for row in json.loads(last.read_text())] == [r.path.name for r in held_out.records]
    assert all(np.isfinite(row["loss"]) for row in json.loads(last.read_text()))

    train(run_of(tmp_path / "resumed", folder, data=data, training={"steps": 2}))
    assert train(run_of(tmp_path / "resumed", folder, data=data)).resumed_from == 2
    assert tensors(tmp_path / "resumed") == tensors(tmp_path / "straight")
    assert losses(tmp_path / "resumed") == losses(tmp_path / "straight")
    train(run_of(tmp_path / "off", folder, data={**data, "cache": "off"}))
    assert tensors(tmp_path / "off") == tensors(tmp_path / "straight")


@pytest.mark.parametrize("kept", ["all", "off"])
def test_masks_and_weights_reach_the_loss(tmp_path, kept: str) -> None:
    """Against the loss computed by hand: the same noise, the UNet called as diffusers calls it, squares, mask and weight in numpy."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for number in range(3):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(pictures / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": f"noise {number}", "weight": 0.5 + number, "mask": ""})
    mask = rng.integers(0, 64, (32, 32), dtype=np.uint8)
    mask[:, 12:20] = 255
    Image.fromarray(mask).save(tmp_path / "pictures" / "mask.png")
    rows[1]["mask"] = "mask.png"
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"mask_column": "mask", "weight_column": "weight", "validation_share": 0, "cache": kept}
    run = run_of(
        tmp_path / "run",
        pictures,
        data=data,
        objective={"caption_dropout": 0.0, "snr_gamma": None},
        training={"batch_size": 3},
    )
    training, held_out = load_datasets(run)
    components = load_base(run.model, CPU)
    setup = setup_diffusion(run, components, training, held_out, build_accelerator(run))
    ids = setup.order(0)
    batch = setup.batch(ids, 0)
    noise, timesteps = addressed_noise(run.seed, 0, ids, tuple(batch["latents"].shape[1:]), setup.num_timesteps)
    with torch.no_grad():
        found = setup.objective(setup.model, batch, noise, timesteps)
        text = components.encode_text([rows[i]["text"] for i in ids])
        pixels = torch.stack([torch.tensor(np.array(Image.open(pictures / f"{i}.png"))) for i in ids])
        posterior = components.vae.encode(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist
        latents = posterior.mode() * components.vae.config.scaling_factor
        alphas = components.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        predicted = components.unet(
            alphas.sqrt() * latents + (1 - alphas).sqrt() * noise,
            timesteps,
            encoder_hidden_states=text["encoder_hidden_states"],
            added_cond_kwargs={
                "text_embeds": text["pooled"],
                "time_ids": torch.tensor([[32.0, 32.0, 0.0, 0.0, 32.0, 32.0]] * 3),
            },
        ).sample
        velocity = alphas.sqrt() * noise - (1 - alphas).sqrt() * latents
        target = velocity if components.scheduler.config.prediction_type == "v_prediction" else noise
        errors = (predicted - target).square().mean(1).numpy()
    for place, i in enumerate(ids):
        counts = mask.reshape(4, 8, 4, 8).mean((1, 3)) / 255 if i == 1 else np.ones((4, 4))
        expected = (0.5 + i) * (errors[place] * counts).sum() / counts.sum()
        assert found[place].item() == pytest.approx(expected, rel=2e-3), i
        unmasked = (0.5 + i) * errors[place].mean()
        assert (abs(found[place].item() / unmasked - 1) > 0.005) == (i == 1)
