"""What happens around the steps: which part is on the device when, what is measured, told, kept and logged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from encoding import given
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from t2ilib.cli import app
from t2ilib.config import ConfigError, ModelConfig, ObjectiveConfig
from t2ilib.data.dataset import Dataset
from t2ilib.data.records import Record
from t2ilib.models.components import Components
from t2ilib.models.denoiser import Denoiser
from t2ilib.models.families import cut_captions
from t2ilib.models.load import load_base
from t2ilib.runfile import build_run
from t2ilib.seeds import generator_for
from t2ilib.training import evaluation, validation
from t2ilib.training.checkpoint import list_checkpoints, load_checkpoint
from t2ilib.training.loop import train
from t2ilib.training.objectives import build_objective
from t2ilib.training.setups import measured_part, noise_schedule, some_captions, tell_cut_captions
from t2ilib.training.validation import held_out_loss

CPU = torch.device("cpu")
LONG = "a large red circle " + "beside a small blue square " * 20 + "at the very end"


def run_of(output: Path, **sections):
    values = {
        "output": str(output),
        "adapter": {"rank": 2},
        "data": {"source": "shapes"},
        "shapes": {"scenes": ["heart"], "num_pictures": 8},
        "training": {"steps": 4, "batch_size": 4, "checkpoint_every": 2, "keep_checkpoints": 4},
        "evaluation": {"validate_every": 0, "validation_timesteps": 2, "num_inference_steps": 1, "prompts": [LONG]},
    }
    return build_run(values | {name: {**values.get(name, {}), **section} for name, section in sections.items()})


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run by Prodigy that keeps the adapter of every checkpoint, with every move between device and host, and what was told."""
    moves, told = [], []
    with pytest.MonkeyPatch.context() as patch:
        place = Components.place
        patch.setenv("T2ILIB_CACHE", str(tmp_path_factory.mktemp("cache")))  # where nothing is encoded yet

        def watched(self, module, at_work):
            name = next((n for n, part in self.modules().items() if part is module), "vae")
            moves.append((name, "device" if at_work else "host"))
            place(self, module, at_work)

        patch.setattr(Components, "place", watched)
        patch.setattr("t2ilib.training.setups.log.warning", lambda text, *values: told.append(text % values))
        kept_all = {"keep_adapters": "all"}
        run = run_of(tmp_path_factory.mktemp("kept"), optimizer={"name": "prodigy"}, training=kept_all)
        train(run)
    return run, moves, told


def test_the_unet_waits_elsewhere_while_encoders_work_and_they_while_it_trains(kept) -> None:
    _, moves, _ = kept
    texts = ("text_encoder", "text_encoder_2")
    assert moves[:11] == [
        *((name, "host") for name in ("vae", *texts)),
        *(("unet", "host"), ("vae", "device"), ("vae", "host"), ("unet", "device")),
        ("unet", "host"),
        *((name, "device") for name in texts),
        ("text_encoder", "host"),
    ]
    assert moves[11:13] == [("text_encoder_2", "host"), ("unet", "device")]
    drawing = moves[13:]
    assert [move for move in drawing if move[0] == "unet"] == []
    last = {}
    for name, place in drawing:
        last[name] = place
    assert set(last.values()) == {"host"}, "after drawing everything is back where it was"


def test_the_adapter_of_every_checkpoint_is_a_file_that_draws_as_the_checkpoint_does(kept, tmp_path: Path) -> None:
    run, _, _ = kept
    assert sorted(path.name for path in (run.output / "steps").iterdir()) == ["step-000002", "step-000004"]
    stored = load_checkpoint(list_checkpoints(run.output / "checkpoints")[0]).tensors["weights"]
    written = load_file(run.output / "steps" / "step-000002" / "adapter" / "pytorch_lora_weights.safetensors")
    name = next(name for name in stored if name.endswith("lora_B.default.weight"))
    told = name.replace("base_model.model.", "").replace(".default", "")
    assert torch.equal(stored[name], written[told])

    def generate(*adapter: str) -> np.ndarray:
        words = ["-q", "generate", "--prompt", "a red heart", "--steps", "2", "--out", str(tmp_path), "--adapter"]
        number = len(list(tmp_path.iterdir()))
        done = CliRunner().invoke(app, [*words, *adapter])
        assert done.exit_code == 0, done.output
        return np.asarray(Image.open(tmp_path / f"{number:02d}.png"))

    by_file = generate(str(run.output / "steps" / "step-000002"))
    assert (by_file == generate(str(run.output), "--checkpoint", "2")).all()


def test_what_prodigy_estimates_is_logged(kept) -> None:
    run, _, _ = kept
    rows = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    logged = {row["step"]: row["prodigy_d"] for row in rows if "prodigy_d" in row and "loss" in row}
    packed = load_checkpoint(list_checkpoints(run.output / "checkpoints")[-1]).meta["optimizer"]["groups"][0]
    value = packed["d"]["tensor"] if isinstance(packed["d"], dict) else packed["d"]
    assert sorted(logged) == [1, 2, 3, 4]
    assert logged[4] == pytest.approx(value, rel=1e-6)
    assert logged[4] >= logged[1] > 0


def test_peaks_are_told_by_phase_and_of_all(kept) -> None:
    run, _, _ = kept
    last = json.loads((run.output / "metrics.jsonl").read_text().splitlines()[-1])
    phases = {name.split("/")[1]: v for name, v in last.items() if name.endswith("/peak_process_mib")}
    assert phases.keys() == {"loading", "encoding", "training", "validating", "drawing"}
    assert last["peak_process_mib"] == max(phases.values())
    declared = json.loads((run.output / "metrics.about.json").read_text())
    assert declared["memory/drawing/peak_process_mib"]["table"] == "Peak memory by phase, MiB"


def test_pictures_of_other_prompts_are_not_shown_under_new_ones(kept, monkeypatch) -> None:
    run, _, _ = kept
    rows = []
    monkeypatch.setattr(
        evaluation,
        "make_grid",
        lambda pictures, *rest, **options: rows.append(len(pictures)) or Image.new("RGB", (8, 8)),
    )
    for prompts in (run.evaluation.prompts, ("a blue heart",)):
        asked = run.evaluation.model_copy(update={"prompts": prompts})
        train(run.model_copy(update={"evaluation": asked}))
    assert rows == [2, 1], "the base's pictures stand above those of the same prompts alone"


def test_captions_that_are_cut_are_counted_and_told(kept, caplog) -> None:
    run, _, told = kept
    assert len(told) == 1
    assert told[0].startswith("1 of ")
    assert "32 tokens" in told[0]
    assert "at the very end" in told[0]
    components = load_base(run.model, CPU)
    assert cut_captions(components.tokenizers, ["a red circle", LONG, LONG]) == [LONG]
    tokenizer = components.tokenizers["tokenizer"]
    longest = next(n for n in range(200, 0, -1) if len(tokenizer("red " * n).input_ids) <= tokenizer.model_max_length)
    fits, one_more = "red " * longest, "red " * (longest + 1)
    assert cut_captions(components.tokenizers, [fits, one_more]) == [one_more]
    caplog.clear()
    tell_cut_captions(components, [fits])
    assert not caplog.records


def test_only_adapters_are_kept_by_step() -> None:
    with pytest.raises(ConfigError, match="keep_adapters is about adapters, and this run trains unet"):
        build_run({"training": {"trains": "unet", "keep_adapters": "all"}})


def test_captions_of_the_grids_come_from_all_along_the_pictures() -> None:
    many = [f"h{i}" for i in range(48)]
    assert some_captions(many, ["t"]) == tuple(f"h{i}" for i in range(0, 48, 6))
    assert some_captions(["h0", "h0", "h1"], ["h1", *(f"t{i}" for i in range(13))]) == (
        "h0",
        "h1",
        "t0",
        "t2",
        "t4",
        "t6",
        "t8",
        "t10",
    )
    assert some_captions([], ["a", "b", "a"]) == ("a", "b")
    assert some_captions([], []) == ()


def test_a_cap_measures_the_same_held_out_pictures_in_every_run() -> None:
    held_out = Dataset("x", tuple(Record(Path(f"{i}.png"), str(i)) for i in range(100)), "digest")
    some, again = measured_part(held_out, 10), measured_part(held_out, 10)
    assert some == again
    assert len(some) == 10
    assert [r for r in held_out.records if r in some.records] == list(some.records)
    assert some.records != held_out.records[:10]
    assert set(some.records) < set(measured_part(held_out, 20).records)
    assert measured_part(held_out, 100) is held_out


def test_held_out_loss_does_not_depend_on_how_many_are_measured_at_once(monkeypatch) -> None:
    components = load_base(ModelConfig(), CPU)
    with torch.no_grad():
        text = components.encode_text(["", "a red circle", "a blue square"])
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    of = {"a": 1, "b": 2, "c": 1}
    data = given([*of], latents, {name: {part: x[row] for part, x in text.items()} for name, row in of.items()})
    objective = build_objective(ObjectiveConfig(snr_gamma=None), noise_schedule(components))
    found, passes = {}, {}
    for at_once in (1, 5, 32):
        monkeypatch.setattr(validation, "AT_ONCE", at_once)
        denoiser, calls = Denoiser(components, False), []
        hook = components.unet.register_forward_pre_hook(
            lambda module, inputs, calls=calls: calls.append(len(inputs[0]))
        )
        found[at_once], passes[at_once] = held_out_loss(denoiser, objective, data, 1000, 4, CPU), calls
        hook.remove()
    assert passes == {1: [1] * 12, 5: [5, 5, 2], 32: [12]}
    assert torch.allclose(found[1].losses, found[32].losses, rtol=1e-5)
    assert torch.allclose(found[1].losses, found[5].losses, rtol=1e-5)
    assert found[32].losses.shape == (3, 4)
    assert found[32].metrics()["held_out_pictures"] == 3


def test_held_out_loss_is_of_each_picture_at_each_timestep(monkeypatch) -> None:
    """Against sums that are known: an objective that says which picture, timestep and noise it was given."""
    latents = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1).expand(3, 4, 2, 2)
    data = given(["a", "b", "c"], latents)
    seen: dict[tuple[int, int], torch.Tensor] = {}

    def objective(denoiser, batch, noise, timesteps):
        for latent, own, timestep in zip(batch["latents"], noise, timesteps.tolist(), strict=True):
            seen[int(latent.mean()), timestep] = own
        return batch["latents"].mean((1, 2, 3)) + timesteps / 1000

    monkeypatch.setattr(validation, "AT_ONCE", 5)
    found = held_out_loss(None, objective, data, 1000, 4, CPU)
    middles = [125, 375, 625, 875]
    assert found.timesteps.tolist() == middles
    assert found.losses.tolist() == [[pytest.approx(i + t / 1000) for t in middles] for i in (1, 2, 3)]
    assert found.by_picture() == [pytest.approx(i + 0.5) for i in (1, 2, 3)]
    told = found.metrics()
    assert told["held_out_loss"] == pytest.approx(2.5)
    assert [told[f"held_out_loss/t{t:04d}"] for t in middles] == [pytest.approx(2 + t / 1000) for t in middles]
    for i in (1, 2, 3):
        block = torch.randn((4, 4, 2, 2), generator=generator_for(validation.GRID_SEED, "held-out noise", i - 1))
        assert all(torch.equal(seen[i, t], block[k]) for k, t in enumerate(middles)), "noise by its address"


DETERMINISTIC = """
import os, sys, torch
from t2ilib.runfile import build_run
from t2ilib.seeds import generator_for
from t2ilib.training.loop import choose_kernels
choose_kernels(build_run({"adapter": {}}))
assert not torch.are_deterministic_algorithms_enabled()
choose_kernels(build_run({"adapter": {}, "training": {"deterministic": True}}))
assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
assert not torch.backends.cudnn.benchmark
"""


def test_deterministic_kernels_are_asked_for() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    subprocess.run([sys.executable, "-c", DETERMINISTIC], check=True, env=environment)


def test_how_often_adapters_are_kept_and_kernels_chosen_does_not_make_another_run(tmp_path: Path) -> None:
    plain = run_of(tmp_path)
    for training in ({"keep_adapters": "all"}, {"deterministic": True}):
        values = plain.training.model_dump() | training
        assert plain.training_digest() == run_of(tmp_path, training=values).training_digest()
