"""Mixed precision on a CPU: bfloat16 as it is, and float16 with a loss scale, where the scaler is torch's own for the CPU and autocast
is left out, so that numbers can be compared exactly: a scale is a power of two, which changes no bit of what it scales."""

import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from safetensors.torch import load_file

from t2ilib.runfile import build_run
from t2ilib.training import loop
from t2ilib.training.checkpoint import list_checkpoints

SCALE = 2.0**16


def settings(output: Path, steps: int = 4, **training):
    return build_run(
        {
            "output": str(output),
            "adapter": {"rank": 2, "alpha": 2.0, "text_encoder_targets": "attention", "dropout": 0.2},
            "data": {"source": "shapes"},
            "shapes": {"scenes": ["heart"], "num_pictures": 8},
            "optimizer": {"max_grad_norm": 0.01},  # less than the gradients have, so that they are clipped
            "training": {
                "steps": steps,
                "batch_size": 4,
                "accumulation": 2,
                "checkpoint_every": 1,
                "keep_checkpoints": 9,
            }
            | training,
            "evaluation": {"validation_timesteps": 1, "prompts": ["a red heart"], "num_inference_steps": 1},
        }
    )


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch):
    """`scaled(scale, interval)`: from now on `train` scales its losses as it would in fp16 on a GPU; `interval`: clean steps after
    which the scale doubles."""
    original = loop.build_accelerator

    def prepare(scale: float = SCALE, interval: int = 2000) -> None:
        def build(run) -> Accelerator:
            accelerator = original(run)
            accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
            accelerator.autocast_handler = AutocastKwargs(enabled=False)
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=interval)
            return accelerator

        monkeypatch.setattr(loop, "build_accelerator", build)

    return prepare


def steps_of(output: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(row["loss"], row["grad_norm"]) for row in rows if "grad_norm" in row]


def contents(checkpoint: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.name != "manifest.json"}


def scaler_at(output: Path, step: int) -> tuple[float, int]:
    """The scale, and how many steps since it changed, in a checkpoint."""
    state = json.loads((output / "checkpoints" / f"step-{step:06d}" / "meta.json").read_text())["scaler"]
    return state["scale"], state["_growth_tracker"]


def weights_at(output: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(output / "checkpoints" / f"step-{step:06d}" / "weights.safetensors")


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in ours.items())


def test_gradients_are_unscaled_before_they_are_clipped(tmp_path: Path, scaled) -> None:
    """Losses, norms, weights and moments of the run without a scale, bit for bit, over two micro-batches and clipped."""
    loop.train(settings(tmp_path / "plain"))
    scaled()
    loop.train(settings(tmp_path / "scaled"))
    assert all(norm > 0.01 for _, norm in steps_of(tmp_path / "plain")[2:])  # clipped indeed
    assert steps_of(tmp_path / "scaled") == steps_of(tmp_path / "plain")
    last = [list_checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("plain", "scaled")]
    for file in ("weights.safetensors", "optimizer.safetensors"):
        assert (last[0] / file).read_bytes() == (last[1] / file).read_bytes()
    assert scaler_at(tmp_path / "scaled", 4) == (SCALE, 4)


def test_a_step_that_overflows_is_skipped_and_the_scale_halves(tmp_path: Path, scaled, monkeypatch) -> None:
    original, calls = Accelerator.backward, []

    def overflowing(self, loss: torch.Tensor, **options) -> None:
        original(self, loss, **options)
        calls.append(loss)
        if len(calls) == 3:  # the first micro-batch of the second step
            next(p for p in self._models[0].parameters() if p.grad is not None).grad.view(-1)[0] = math.inf

    monkeypatch.setattr(Accelerator, "backward", overflowing)
    scaled()
    run = settings(tmp_path / "run")
    result = loop.train(run)
    assert [math.isfinite(norm) for _, norm in steps_of(run.output)] == [True, False, True, True]
    assert all(math.isfinite(loss) for loss, _ in steps_of(run.output))
    assert [scaler_at(run.output, step) for step in (1, 2, 3, 4)] == [
        (SCALE, 1),
        (SCALE / 2, 0),
        (SCALE / 2, 1),
        (SCALE / 2, 2),
    ]
    weights = [weights_at(run.output, step) for step in (1, 2, 3)]
    assert same(weights[0], weights[1])
    assert not any(torch.equal(x, weights[1][name]) for name, x in weights[2].items())
    assert result.metrics["adapter/change_norm"] > 0  # the proof at the end took it
    adapter = load_file(run.output / "adapter" / "pytorch_lora_weights.safetensors")
    assert all(bool(torch.isfinite(x).all()) for x in adapter.values())


def test_the_scale_is_kept_and_put_back(tmp_path: Path, scaled) -> None:
    """A scale that grows after three steps, interrupted after two: what follows is what an undisturbed run gives, the scale's own
    growth included, whatever scale the second process would have begun with."""
    scaled(SCALE, interval=3)
    loop.train(settings(tmp_path / "straight"))
    loop.train(settings(tmp_path / "resumed", steps=2))
    scaled(8.0, interval=100)
    assert loop.train(settings(tmp_path / "resumed")).resumed_from == 2
    assert [scaler_at(tmp_path / "straight", step) for step in (2, 3, 4)] == [
        (SCALE, 2),
        (SCALE * 2, 0),
        (SCALE * 2, 1),
    ]
    last = [tmp_path / name / "checkpoints" / "step-000004" for name in ("straight", "resumed")]
    assert contents(last[0]) == contents(last[1])
    assert steps_of(tmp_path / "straight") == steps_of(tmp_path / "resumed")


def test_bfloat16_computes_in_bfloat16_and_keeps_what_it_trains_in_float32(tmp_path: Path) -> None:
    for precision in ("no", "bf16"):
        loop.train(settings(tmp_path / precision, steps=3, mixed_precision=precision))
    full, half = ([loss for loss, _ in steps_of(tmp_path / name)] for name in ("no", "bf16"))
    assert half == pytest.approx(full, rel=0.02)
    assert all(ours != theirs for ours, theirs in zip(half, full, strict=True))
    assert {tensor.dtype for tensor in weights_at(tmp_path / "bf16", 3).values()} == {torch.float32}
