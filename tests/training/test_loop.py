"""The loop: equal results however a batch is split, loud failures, signals."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from t2ilib.config import ConfigError, RunConfig
from t2ilib.runfile import build_run, load_run
from t2ilib.training.checkpoint import CheckpointError, list_checkpoints, owned
from t2ilib.training.loop import NonFiniteLoss, train
from t2ilib.training.stopping import Interrupted


def settings(output: Path, **changes) -> dict:
    values = {
        "output": str(output),
        "adapter": {"rank": 2, "alpha": 2.0, "text_encoder_targets": "attention", "dropout": 0.3},
        "data": {"source": "shapes"},
        "shapes": {"scenes": ["heart"], "num_pictures": 12},
        "objective": {"caption_dropout": 0.2},
        "training": {"steps": 6, "batch_size": 4, "checkpoint_every": 2},
        "evaluation": {
            "validate_every": 3,
            "validation_timesteps": 2,
            "sample_every": 0,
            "prompts": ["a red heart"],
            "num_inference_steps": 1,
        },
    }
    for address, value in changes.items():
        section, _, field = address.partition("__")
        values.setdefault(section, {})[field] = value
    return values


def spawn(values: dict, folder: Path) -> subprocess.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "t2ilib.cli", "train", str(folder / "config.yaml")]
    return subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(condition, process: subprocess.Popen, seconds: float = 1200) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < until
        time.sleep(0.02)


def losses_of(output: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row and "grad_norm" in row}


def test_sigterm_commits_a_checkpoint_and_ends_the_mlflow_run(tmp_path: Path) -> None:
    values = settings(
        tmp_path / "run", training__steps=2000, training__checkpoint_every=2000, tracking__experiment="signals"
    )
    process = spawn(values, tmp_path)
    wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists() and len(losses_of(tmp_path / "run")) >= 2, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 143, output
    assert len(list_checkpoints(tmp_path / "run" / "checkpoints")) == 1

    from mlflow import MlflowClient

    note = json.loads((tmp_path / "run" / "tracking.json").read_text())
    assert MlflowClient(note["uri"]).get_run(note["run_id"]).info.status == "KILLED"


def test_ctrl_c_commits_a_checkpoint_of_the_step_that_it_came_in(tmp_path: Path, monkeypatch) -> None:
    from t2ilib.training import loop

    class Presses(loop.Progress):
        def __call__(self, step: int, loss: float, seconds: float) -> None:
            if step == 2:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop, "Progress", Presses)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted) as error:
        train(build_run(settings(tmp_path / "run", training__checkpoint_every=100)))
    assert error.value.code == 130
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-000002"]
    assert signal.getsignal(signal.SIGINT) is handler


def test_accumulated_micro_batches_equal_one_batch(tmp_path: Path) -> None:
    weights = []
    for accumulation in (1, 2):
        values = settings(
            tmp_path / str(accumulation), training__steps=3, training__accumulation=accumulation, adapter__dropout=0.0
        )
        run = build_run(values)
        train(run)
        weights.append(load_file(list_checkpoints(run.output / "checkpoints")[-1] / "weights.safetensors"))
    for name, whole in weights[0].items():
        torch.testing.assert_close(whole, weights[1][name], rtol=0, atol=2e-5, msg=name)


def test_resolved_config_is_written_before_training_and_reads_back(tmp_path: Path) -> None:
    run = build_run(settings(tmp_path / "run", training__steps=1))
    with pytest.raises(RuntimeError, match="stop here"):
        train(run, tracker=Stop())
    assert load_run(tmp_path / "run" / "run.yaml") == run


class Stop:
    """A tracker that fails at the first thing it is asked to log."""

    def log_datasets(self, training, held_out) -> None:
        raise RuntimeError("stop here")


def test_non_finite_loss_names_step_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from t2ilib.training import step as module

    def poisoned(*args, **kwargs):
        noise, timesteps = original(*args, **kwargs)
        if args[1] == 2:
            noise[1] = float("nan")
        return noise, timesteps

    original = module.addressed_noise
    monkeypatch.setattr(module, "addressed_noise", poisoned)
    run = build_run(settings(tmp_path / "run"))
    with pytest.raises(NonFiniteLoss, match=r"1 sample\(s\) is not finite at step 2:\n  0000\d\d?\.png: .*heart"):
        train(run)
    assert [path.name for path in list_checkpoints(run.output / "checkpoints")] == ["step-000002"]


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_other_settings_are_refused_with_the_fields_and_harm_nothing(tmp_path: Path, monkeypatch) -> None:
    from t2ilib.training import loop

    train(build_run(settings(tmp_path / "run", training__steps=2)))
    before = folder_bytes(tmp_path / "run")
    monkeypatch.setattr(loop, "load_base", lambda *_: pytest.fail("the base was loaded"))
    with pytest.raises(
        CheckpointError, match=r"other settings \(optimizer.learning_rate 0.001 -> 0.5\): choose another"
    ):
        train(build_run(settings(tmp_path / "run", training__steps=2, optimizer__learning_rate=0.5)))
    with pytest.raises(CheckpointError, match=r"has taken 2 steps, and training.steps is 1: raise it"):
        train(build_run(settings(tmp_path / "run", training__steps=1)))
    assert folder_bytes(tmp_path / "run") == before


def test_a_finished_run_can_be_made_longer(tmp_path: Path) -> None:
    """4 steps, then 6 asked for: the weights and losses of 6 straight ones. A cosine says why it cannot."""
    common = {"training__checkpoint_every": 2, "evaluation__validate_every": 2}
    train(build_run(settings(tmp_path / "longer", training__steps=4, **common)))
    assert train(build_run(settings(tmp_path / "longer", training__steps=6, **common))).resumed_from == 4
    train(build_run(settings(tmp_path / "straight", training__steps=6, **common)))
    last = [
        load_file(tmp_path / name / "checkpoints/step-000006/weights.safetensors") for name in ("longer", "straight")
    ]
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[1])
    assert losses_of(tmp_path / "longer") == losses_of(tmp_path / "straight")
    cosine = {"optimizer__schedule": "cosine"}
    train(build_run(settings(tmp_path / "cosine", training__steps=2, **cosine)))
    with pytest.raises(CheckpointError, match=r"training.steps 2 -> 3; a cosine schedule is laid out over all steps"):
        train(build_run(settings(tmp_path / "cosine", training__steps=3, **cosine)))


def test_two_processes_never_write_into_one_folder(tmp_path: Path) -> None:
    """The lock is the system's: it goes with a process that is killed, and a cell that is run again meets its own."""
    code = (
        "import sys, time; from pathlib import Path; from t2ilib.training.checkpoint import owned\n"
        "with owned(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(3000)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    run = build_run(settings(tmp_path / "run", training__steps=1))
    with pytest.raises(ConfigError, match=r"another process is training into .*run: wait for it"):
        train(run)
    assert not (tmp_path / "run" / "run.yaml").exists()
    other.kill()
    other.wait()
    with owned(run.output):
        train(run)


def test_checkpoints_that_do_not_fit_the_disk_are_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    run = build_run(settings(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"checkpoints, and training.least_free_disk_mib 256 .* need .* MiB under"):
        train(run)
    assert not (run.output / "checkpoints").exists()


def test_full_disk_while_saving_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from t2ilib.training import checkpoint

    calls = []

    def full(tensors, path):
        calls.append(path)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    run = build_run(settings(tmp_path / "run"))
    with pytest.raises(OSError, match="No space left"):
        train(run)
    assert [path.name for path in (run.output / "checkpoints").iterdir()] == ["step-000002"]


def test_run_without_training_measures_the_base(tmp_path: Path) -> None:
    values = settings(tmp_path / "run", training__steps=0, training__trains="nothing") | {"adapter": None}
    result = train(build_run(values))
    assert result.metrics["held_out_loss"] > 0
    assert "loss" not in result.metrics
    assert result.metrics["trainable_parameters"] == 0
    assert (tmp_path / "run" / "samples" / "grid-000000.png").exists()


def test_held_out_loss_is_the_same_ruler_for_every_seed(tmp_path: Path) -> None:
    """Before training, the measured loss depends on the base alone."""
    first, second = (
        train(
            build_run(
                settings(tmp_path / str(seed), training__steps=0, training__trains="nothing")
                | {"adapter": None, "seed": seed}
            )
        )
        for seed in (0, 1)
    )
    assert first.metrics["held_out_loss"] == second.metrics["held_out_loss"]


@pytest.mark.parametrize(
    "changes", [{"optimizer__name": "prodigy", "optimizer__learning_rate": 1.0}, {"optimizer__name": "adamw8bit"}]
)
def test_quantized_dora_trains_with_every_optimizer(tmp_path: Path, changes: dict) -> None:
    """The proof inside the loop is what is tested: every adapter, DoRA's magnitudes included, got a gradient and moved."""
    values = settings(
        tmp_path / "run",
        model__quantization="nf4",
        adapter__kind="dora",
        adapter__targets="many",
        training__steps=3,
        **changes,
    )
    metrics = train(build_run(values)).metrics
    assert metrics["adapter/magnitude_change_norm"] > 0


def test_whole_unet_with_ema_saves_and_keeps_the_average(tmp_path: Path) -> None:
    """What is saved, what stays in memory to be measured, and the checkpoint's average are the same weights; and the average is the one
    that the weights of every step give by hand."""
    from diffusers import UNet2DConditionModel

    training = {
        "steps": 4,
        "batch_size": 4,
        "trains": "unet",
        "ema_horizon": 2,
        "checkpoint_every": 1,
        "keep_checkpoints": 4,
    }
    values = settings(tmp_path / "run") | {"adapter": None, "training": training}
    result = train(build_run(values))
    steps = [load_file(path / "weights.safetensors") for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    by_hand = {name: weight.double() for name, weight in steps[0].items()}  # what was there before has no share in it
    for number, weights in enumerate(steps[1:], 2):
        decay = min(1 - 1 / 2, 1 - number**-0.75)
        assert number == 2 or decay == 0.5
        by_hand = {name: decay * kept + (1 - decay) * weights[name].double() for name, kept in by_hand.items()}
    saved = UNet2DConditionModel.from_pretrained(tmp_path / "run" / "model" / "unet").state_dict()
    kept = result.components.unet.state_dict()
    folder = tmp_path / "run" / "checkpoints" / "step-000004"
    average, raw = load_file(folder / "ema.safetensors"), load_file(folder / "weights.safetensors")
    for name in saved:
        torch.testing.assert_close(saved[name], kept[name])
        torch.testing.assert_close(saved[name], average[f"unet.{name}"])
        torch.testing.assert_close(average[f"unet.{name}"], by_hand[f"unet.{name}"].float(), rtol=1e-6, atol=1e-7)
    assert any(not torch.equal(saved[name], raw[f"unet.{name}"]) for name in saved)
    assert train(build_run(values)).resumed_from == 4


@pytest.mark.parametrize(
    ("base", "adapter"),
    [
        ("none", {"kind": "dora", "rank": 2, "alpha": 2.0, "text_encoder_targets": "attention", "dropout": 0.3}),
        ("none", {"rank": 2, "alpha": 2.0, "init": "pissa"}),
        ("nf4", {"rank": 2, "alpha": 2.0}),
    ],
)
def test_adapter_with_ema_keeps_the_average_and_resumes_to_the_bit(tmp_path: Path, base: str, adapter: dict) -> None:
    """The files of steps and of the end, what a checkpoint is loaded as, and what stays in memory are the average of the parameters, which the
    weights of every step give by hand."""
    from t2ilib.drawing.checkpoints import write_step
    from t2ilib.models.load import load_base

    def run_of(folder: Path) -> RunConfig:
        training = {"steps": 4, "batch_size": 4, "ema_horizon": 3, "checkpoint_every": 1, "keep_checkpoints": 4}
        values = settings(folder) | {"model": {"quantization": base}, "adapter": adapter}
        return build_run(values | {"training": training | {"keep_adapters": "all"}})

    run = run_of(tmp_path / "straight")
    result = train(run)
    folders = list_checkpoints(run.output / "checkpoints")
    steps = [load_file(path / "weights.safetensors") for path in folders]
    by_hand = {name: weight.double() for name, weight in steps[0].items()}
    for number, weights in enumerate(steps[1:], 2):
        decay = min(1 - 1 / 3, 1 - number**-0.75)
        by_hand = {name: decay * kept + (1 - decay) * weights[name].double() for name, kept in by_hand.items()}
    average = load_file(folders[-1] / "ema.safetensors")
    assert average.keys() == by_hand.keys()
    for name, value in by_hand.items():
        torch.testing.assert_close(average[name], value.float(), rtol=1e-6, atol=1e-7)
    assert any(not torch.equal(average[name], steps[-1][name]) for name in average)
    kept = {
        f"{part}.{name}": parameter.detach().cpu()
        for part, model in result.components.modules().items()
        for name, parameter in model.named_parameters()
    }
    assert all(torch.equal(kept[name], average[name]) for name in average)

    for step, name in ((2, "steps/step-000002/adapter"), (4, "steps/step-000004/adapter"), (4, "adapter")):
        written = load_file(write_step(load_base(run.model), run.output, step, tmp_path / "written"))
        kept = load_file(run.output / name / "pytorch_lora_weights.safetensors")
        assert written.keys() == kept.keys()
        assert all(torch.equal(written[key], kept[key]) for key in kept)

    shutil.copytree(run.output, tmp_path / "resumed")
    for path in list_checkpoints(tmp_path / "resumed" / "checkpoints")[2:]:
        shutil.rmtree(path)
    assert train(run_of(tmp_path / "resumed")).resumed_from == 2
    again = load_file(tmp_path / "resumed" / "checkpoints" / "step-000004" / "ema.safetensors")
    assert all(torch.equal(again[name], average[name]) for name in average)


def test_gradient_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda self, parameters, limit: torch.tensor(float("inf")))
    with pytest.raises(NonFiniteLoss, match="at step 0"):
        train(build_run(settings(tmp_path / "run")))
    assert not list_checkpoints(tmp_path / "run" / "checkpoints")


def test_changed_pictures_do_not_resume(tmp_path: Path) -> None:
    from t2ilib.shapes import world

    pictures = world.write_folder(tmp_path / "pictures", world.sample_scenes(10, "train", 0, "heart"), 0)
    values = settings(tmp_path / "run", training__steps=2) | {"data": {"path": str(pictures)}, "shapes": None}
    train(build_run(values))
    lines = (pictures / "metadata.jsonl").read_text()
    (pictures / "metadata.jsonl").write_text(lines.replace("heart", "hart"))
    with pytest.raises(CheckpointError, match="pictures or captions have changed"):
        train(build_run(values))


def test_batch_that_cannot_be_filled_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size 64 is more than the 12 training pictures"):
        train(build_run(settings(tmp_path / "run", training__batch_size=64)))
    assert not (tmp_path / "run").exists()


def test_a_failed_proof_loses_nothing(tmp_path: Path, monkeypatch, caplog) -> None:
    """What was trained is saved and marked before the error comes; whoever loads it is told; a run that is proven takes the mark away."""
    from t2ilib.adapters.attach import AdapterError, AdapterProof
    from t2ilib.adapters.load import UNPROVEN, load_adapter
    from t2ilib.models.load import load_base

    def fail(self) -> dict[str, float]:
        raise AdapterError("a frozen base weight changed")

    run = build_run(settings(tmp_path / "run", training__steps=2))
    with monkeypatch.context() as patch:
        patch.setattr(AdapterProof, "finish", fail)
        with pytest.raises(AdapterError, match=r"weight changed. What was trained is in .*adapter, marked as unproven"):
            train(run)
    trained = load_file(run.output / "adapter" / "pytorch_lora_weights.safetensors")
    weights = load_file(list_checkpoints(run.output / "checkpoints")[-1] / "weights.safetensors")
    assert len(trained) == len(weights)
    components = load_base(run.model)
    load_adapter(components, run.output)
    assert "is marked as unproven: a frozen base weight changed" in caplog.text
    train(run)
    assert not (run.output / "adapter" / UNPROVEN).exists()


def test_what_is_trained_to_predict_is_what_is_drawn_saved_and_loaded(tmp_path: Path) -> None:
    """An objective that differs from what the base says reaches the sampler, the file, and whoever draws with the file."""
    from t2ilib.adapters.load import load_adapter, read_metadata
    from t2ilib.evaluation.sampling import draw
    from t2ilib.models.load import load_base

    run = build_run(settings(tmp_path / "run", training__steps=2, objective__name="epsilon"))
    result = train(run)
    assert result.components.scheduler.config.prediction_type == "epsilon"
    file = tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors"
    assert read_metadata(file)["modelspec.prediction_type"] == "epsilon"
    fresh = load_base(run.model)
    assert fresh.scheduler.config.prediction_type == "v_prediction"
    load_adapter(fresh, file)
    assert fresh.scheduler.config.prediction_type == "epsilon"
    ours, theirs = (draw(components, ["a red heart"], run.evaluation)[0] for components in (result.components, fresh))
    assert abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1
    as_v = load_base(run.model)
    as_v.noise_as("v_prediction")
    assert abs(np.asarray(ours, int) - np.asarray(draw(as_v, ["a red heart"], run.evaluation)[0], int)).max() > 8

    whole = settings(tmp_path / "whole", training__steps=1, training__trains="unet", objective__name="epsilon")
    train(build_run(whole | {"adapter": None}))
    saved = json.loads((tmp_path / "whole" / "model" / "scheduler" / "scheduler_config.json").read_text())
    assert saved["prediction_type"] == "epsilon"


def test_the_noise_that_is_trained_by_is_what_is_drawn_saved_and_loaded_by(tmp_path: Path) -> None:
    """Zero terminal SNR and other betas, of an adapter by what its file says, and by its checkpoint; of a UNet by its folder. What is
    measured by is plain whatever else the objective is."""
    from t2ilib.adapters.load import load_adapter, read_metadata
    from t2ilib.models.load import load_base
    from t2ilib.training.state import load_checkpoint_adapter

    noise = {"zero_terminal_snr": True, "beta_schedule": "squaredcos_cap_v2"}
    others = {"loss": "huber", "noise_offset": 0.1, "timesteps": "logit_normal", "snr_gamma": None}
    run = build_run(settings(tmp_path / "run", training__steps=1) | {"objective": noise | others})
    result = train(run)
    metadata = read_metadata(tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors")
    told = {"ss_zero_terminal_snr": "True", "t2ilib.beta_schedule": "squaredcos_cap_v2", "ss_noise_offset": "0.1"}
    assert told.items() <= metadata.items()
    by_file, by_checkpoint = load_base(run.model), load_base(run.model)
    load_adapter(by_file, run.output)
    load_checkpoint_adapter(by_checkpoint, run.output, 1)
    for components in (result.components, by_file, by_checkpoint):
        assert float(components.scheduler.alphas_cumprod[-1]) == 0
        assert torch.equal(components.scheduler.betas, result.components.scheduler.betas)
        assert components.scheduler.config.timestep_spacing == "trailing"

    whole = settings(tmp_path / "whole", training__steps=1, training__trains="unet") | {"objective": noise}
    plain = train(build_run(whole | {"adapter": None}))
    saved = json.loads((tmp_path / "whole" / "model" / "scheduler" / "scheduler_config.json").read_text())
    assert (saved["rescale_betas_zero_snr"], saved["beta_schedule"]) == (True, "squaredcos_cap_v2")

    def before(output: Path) -> float:
        return json.loads((output / "metrics.jsonl").read_text().splitlines()[0])["held_out_loss"]

    assert before(run.output) == before(tmp_path / "whole")
    assert plain.components.scheduler.config.prediction_type == "v_prediction"


def test_noise_is_not_predicted_with_zero_terminal_snr_whatever_says_so(tmp_path: Path) -> None:
    """Where only the base says that it predicts noise, it is told when it is loaded, before anything is written."""
    from t2ilib.models.load import load_base
    from t2ilib.models.pipeline import save_pipeline

    components = load_base(build_run(settings(tmp_path)).model)
    components.noise_as("epsilon")
    save_pipeline(components, tmp_path / "base")
    values = settings(tmp_path / "run", model__base=str(tmp_path / "base"), objective__zero_terminal_snr=True)
    with pytest.raises(ConfigError, match="the base predicts noise"):
        train(build_run(values))
    assert not (tmp_path / "run").exists()


def test_rates_follow_the_steps_whatever_is_accumulated_or_resumed(tmp_path: Path) -> None:
    """Warm-up, then half a cosine, by the number of optimizer steps: with two micro-batches a step, and after a kill in the middle."""
    training = {"steps": 6, "batch_size": 4, "accumulation": 2, "checkpoint_every": 3}
    values = settings(tmp_path / "run", optimizer__schedule="cosine", optimizer__warmup_steps=2) | {
        "training": training
    }
    values["optimizer"]["learning_rate"] = 1e-3
    rates = [0.5, 1.0, *((1 + math.cos(math.pi * (step - 2) / 4)) / 2 for step in range(3, 7))]
    train(build_run(values))
    straight = load_file(tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors")
    last = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert last.name == "step-000006"
    shutil.rmtree(last)
    assert train(build_run(values)).resumed_from == 3
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [row["learning_rate/unet"] for row in rows if "grad_norm" in row]
    assert found == pytest.approx([1e-3 * rate for rate in rates], abs=1e-9)  # of the step that comes next
    resumed = load_file(tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in straight.items())


@pytest.mark.parametrize("precision", ["no", "bf16", "auto"])
def test_a_float16_base_without_a_loss_scale_is_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch, precision
) -> None:
    from t2ilib.training import loop

    monkeypatch.setattr(loop, "load_base", lambda *_: pytest.fail("the base was loaded"))
    values = settings(tmp_path / "run", model__dtype="float16", training__mixed_precision=precision)
    with pytest.raises(
        ConfigError,
        match=r"model.dtype is float16 and training.mixed_precision .* set training.mixed_precision to fp16",
    ):
        train(build_run(values))
    assert not (tmp_path / "run").exists()
