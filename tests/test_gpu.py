"""What only a GPU can show: the same run on it and on the CPU. `python -m pytest -m gpu`, where there is one."""

import json
from pathlib import Path

import pytest
import torch

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
