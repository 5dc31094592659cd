"""What drawing costs: counted in closed form whatever is attached or packed, and timed on the clock."""

import json

import pytest
import torch
from adapting import build_parts

from t2ilib.adapters.attach import attach_adapters
from t2ilib.config import AdapterSpec, ModelConfig
from t2ilib.evaluation import speed
from t2ilib.evaluation.measures import measure
from t2ilib.evaluation.metrics import DECLARATIONS
from t2ilib.evaluation.speed import METRICS, TIMED, WARM, count_parameters, seconds_per_step
from t2ilib.models.load import quantize_parts
from t2ilib.models.students import build_student
from t2ilib.report.tables import write_number
from t2ilib.runfile import build_run


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_parameters_are_those_of_the_network(family):
    components = build_parts(family)
    count = sum(p.numel() for p in components.unet.parameters())
    assert count_parameters(components.unet) == count
    assert count_parameters(build_student(components.unet, ("mid_block",))) < count
    quantize_parts(components, ModelConfig(quantization="nf4"), torch.float32, torch.device("cpu"))
    attach_adapters(components, AdapterSpec(rank=4, kind="dora"), 0)
    assert count_parameters(components.unet) == count


@pytest.mark.parametrize("guided", [True, False])
def test_a_step_is_one_pass_of_the_unet_and_the_median_is_told(guided, monkeypatch):
    """Of a clock that goes on by the number of the pass."""
    components, calls, now = build_parts("sdxl"), [], [0.0]

    def passed(module, inputs, output) -> None:
        calls.append(inputs[0].shape)
        now[0] += len(calls)

    components.unet.register_forward_hook(passed)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    components.unet.train()
    assert seconds_per_step(components, 64, guided) == WARM + (TIMED + 1) / 2
    assert set(calls) == {(1 + guided, 4, 8, 8)}
    assert components.unet.training


def test_a_run_that_draws_says_what_it_costs(tmp_path):
    settings = {"num_inference_steps": 1, "guidance_scale": 1.0, "measures": ()}
    drawn = {"adapter": {}, "evaluation": settings | {"prompts": ["a heart"]}, "output": str(tmp_path / "run")}
    run = build_run(drawn)
    run.output.mkdir()
    components = build_parts()
    found = measure(run, components)
    assert found["drawing/unet_parameters"] == count_parameters(components.unet)
    assert found["drawing/seconds_per_step"] > 0
    about = json.loads((run.output / DECLARATIONS).read_text())
    assert METRICS.keys() <= about.keys()
    assert write_number(0.01234, METRICS["drawing/seconds_per_step"]) == "0.0123"
    still = build_run(drawn | {"evaluation": settings, "data": {"source": "shapes"}, "shapes": {"checked_prompts": 0}})
    assert "drawing/unet_parameters" not in measure(still, components)
