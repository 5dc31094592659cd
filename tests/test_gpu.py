"""What only a GPU can show: the same run on it and on the CPU. `python -m pytest -m gpu`, where there is one."""

import json
from pathlib import Path

import pytest
import torch

from t2ilib.config import ModelConfig
from t2ilib.models.load import load_base
from t2ilib.runfile import build_run
from t2ilib.training.loop import train

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_run_on_the_gpu_is_the_run_on_the_cpu(quantization: str, tmp_path: Path, monkeypatch) -> None:
    """Noise, order and adapters come from the CPU's generators, so losses agree as far as float32 kernels do."""
    losses = {}
    for device in ("cuda", "cpu"):
        if device == "cpu":
            monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        run = build_run(
            {
                "output": str(tmp_path / device),
                "model": {"dtype": "float32", "quantization": quantization},
                "adapter": {"rank": 4},
                "data": {"source": "shapes"},
                "shapes": {"num_pictures": 8, "checked_prompts": 0},
                "training": {"steps": 3, "batch_size": 4, "mixed_precision": "no"},
                "evaluation": {"prompts": ["a red circle"], "num_inference_steps": 1, "validation_timesteps": 2},
            }
        )
        assert train(run).components.device.type == device
        rows = [json.loads(line) for line in (tmp_path / device / "metrics.jsonl").read_text().splitlines()]
        losses[device] = [row["loss"] for row in rows if "grad_norm" in row]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=2e-2)


def devices_of(model: torch.nn.Module) -> set[str]:
    """Where a model's weights are, with what bitsandbytes keeps beside them."""
    tensors = [*model.parameters(), *model.buffers()]
    for layer in model.modules():
        if (state := getattr(getattr(layer, "weight", None), "quant_state", None)) is not None:
            tensors += [state.absmax, state.code, *([state.state2.absmax, state.state2.code] if state.nested else ())]
        if (state := getattr(layer, "state", None)) is not None:
            tensors += [tensor for tensor in (state.CB, state.SCB) if tensor is not None]
    return {tensor.device.type for tensor in tensors}


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_what_is_parked_leaves_the_gpu_and_comes_back(quantization: str) -> None:
    components = load_base(ModelConfig(dtype="float32", quantization=quantization))
    with torch.no_grad():
        before = components.encode_text(["a red heart"])
        components.park(())
        assert {device for part in components.parked for device in devices_of(part)} == {"cpu"}
        assert devices_of(components.unet) == {"cuda"}
        with components.awake():
            assert {device for part in components.parked for device in devices_of(part)} == {"cuda"}
            after = components.encode_text(["a red heart"])
    assert {device for part in components.parked for device in devices_of(part)} == {"cpu"}
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


@pytest.mark.parametrize(
    "compute",
    [
        {"attention": "math"},
        {"attention": "flash"},
        {"compile": True},
        {"channels_last": True, "cudnn_benchmark": True},
        {"offload": ["activations", "average"]},
    ],
    ids=str,
)
def test_steps_computed_otherwise_are_the_same_steps(compute: dict, tmp_path: Path) -> None:
    """In float32, but for flash, which has none; what waits on the host is copied there and back, and changes nothing."""
    precision = "bf16" if compute.get("attention") == "flash" else "no"
    losses, peaks = [], []
    for number, section in enumerate(({}, compute)):
        run = build_run(
            {
                "output": str(tmp_path / str(number)),
                "data": {"source": "shapes"},
                "shapes": {"num_pictures": 16, "checked_prompts": 0},
                "optimizer": {"learning_rate": 1e-5},
                "training": {"trains": "unet", "steps": 5, "batch_size": 16, "mixed_precision": precision, "ema_horizon": 4},
                "compute": section,
                "evaluation": {"prompts": ["a red circle"], "num_inference_steps": 1, "validation_timesteps": 2},
            }
        )  # fmt: skip
        metrics = train(run).metrics
        rows = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows if "grad_norm" in row])
        peaks.append(metrics["memory/training/peak_device_mib"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2 if precision == "bf16" else 1e-3)
    if "offload" in compute:
        assert peaks[1] < peaks[0]
