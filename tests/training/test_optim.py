import math

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from t2ilib.config import ConfigError, OptimizerConfig
from t2ilib.runfile import build_run
from t2ilib.training.optim import (
    OPTIMIZERS,
    build_optimizer,
    build_schedule,
    parameter_groups,
    share_of_8bit_moments,
)


def modules():
    torch.manual_seed(0)
    return {"unet": nn.Linear(8, 8), "text_encoder": nn.Linear(8, 8), "text_encoder_2": nn.Linear(8, 4)}


def test_text_encoders_have_a_learning_rate_of_their_own():
    config = OptimizerConfig(learning_rate=1e-3, text_encoder_learning_rate=1e-5)
    groups = parameter_groups(modules(), config)
    assert [(group["name"], group["lr"]) for group in groups] == [
        ("unet", 1e-3),
        ("text_encoder", 1e-5),
        ("text_encoder_2", 1e-5),
    ]
    assert [group["lr"] for group in parameter_groups(modules(), OptimizerConfig(learning_rate=0.5))] == [0.5] * 3
    optimizer = build_optimizer(groups, config)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-5, 1e-5]


def test_only_what_trains_is_optimized():
    parts = modules()
    parts["text_encoder"].requires_grad_(False)
    parts["unet"].bias.requires_grad_(False)
    groups = parameter_groups(parts, OptimizerConfig())
    assert [group["name"] for group in groups] == ["unet", "text_encoder_2"]
    assert groups[0]["params"] == [parts["unet"].weight]


def test_the_first_adamw_step_is_the_closed_form():
    """With bias correction Adam's first step is lr times the gradient's sign, after decoupled decay (arXiv 1711.05101)."""
    parts = modules()
    config = OptimizerConfig(learning_rate=1e-2, text_encoder_learning_rate=1e-3, weight_decay=0.1)
    optimizer = build_optimizer(parameter_groups(parts, config), config)
    before = {name: part.weight.detach().clone() for name, part in parts.items()}
    for part in parts.values():
        part.weight.grad = torch.where(torch.rand_like(part.weight) > 0.5, 3.0, -0.2)
        part.bias.grad = torch.ones_like(part.bias)
    optimizer.step()
    for name, part in parts.items():
        rate = 1e-2 if name == "unet" else 1e-3
        expected = before[name] * (1 - rate * 0.1) - rate * part.weight.grad.sign()
        assert torch.allclose(part.weight, expected, atol=1e-7), name


def rates(schedule, warmup, steps, rate=2.0):
    config = OptimizerConfig(
        learning_rate=rate, text_encoder_learning_rate=rate / 4, schedule=schedule, warmup_steps=warmup
    )
    optimizer = build_optimizer(parameter_groups(modules(), config), config)
    scheduler = build_schedule(optimizer, config, steps)
    used = []
    for _ in range(steps):
        used.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert all(row[1] == pytest.approx(row[0] / 4) for row in used)
    return [row[0] for row in used], optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_warm_up_rises_linearly(schedule):
    used, _ = rates(schedule, 5, 50)
    assert used[:6] == pytest.approx([2.0 * step / 5 for step in range(6)])
    assert max(used) == 2.0


def test_constant_stays():
    used, end = rates("constant", 0, 20)
    assert used == [2.0] * 20
    assert end == 2.0


@pytest.mark.parametrize("warmup", [0, 10])
def test_cosine_and_linear_end_at_zero(warmup):
    steps = 60
    shares = [(step - warmup) / (steps - warmup) for step in range(warmup, steps)]
    used, end = rates("cosine", warmup, steps)
    assert used[warmup:] == pytest.approx([1 + math.cos(math.pi * share) for share in shares])
    assert end == pytest.approx(0, abs=1e-9)
    assert 0 < used[-1] < 0.01
    used, end = rates("linear", warmup, steps)
    assert used[warmup:] == pytest.approx([2 * (1 - share) for share in shares])
    assert end == pytest.approx(0, abs=1e-9)


def test_a_wrong_name_answers_with_the_right_ones():
    with pytest.raises(ConfigError, match=r"'adamw8' does not exist; choose 'adamw', .* Did you mean 'adamw"):
        build_run({"adapter": {}, "optimizer": {"name": "adamw8"}})


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_every_optimizer_learns(name):
    """A linear regression with a known answer; prodigy at learning rate 1 finds its own step size."""
    part = nn.Linear(8, 1, bias=False)
    nn.init.constant_(part.weight, 0.5)
    config = OptimizerConfig(name=name, learning_rate=1.0 if name == "prodigy" else 2e-2, weight_decay=0.0)
    optimizer = build_optimizer(parameter_groups({"unet": part}, config), config)
    truth = torch.arange(8.0) / 8
    losses = []
    for number in range(150):
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(number))
        loss = (part(x)[:, 0] - x @ truth).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.05 * sum(losses[:10])
    if name == "prodigy":
        assert optimizer.param_groups[0]["d"] > 100 * optimizer.param_groups[0]["d0"]


def test_lora_plus_gives_b_a_rate_of_its_own():
    parts = modules()
    parts = {name: nn.Sequential(part).requires_grad_(False) for name, part in parts.items()}
    for part in parts.values():
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), part)
    config = OptimizerConfig(learning_rate=1e-3, text_encoder_learning_rate=1e-5, lora_plus_ratio=16.0)
    groups = {group["name"]: group for group in parameter_groups(parts, config)}
    rates = {name: group["lr"] for name, group in groups.items()}
    assert rates == {
        "unet": 1e-3, "unet.lora_B": pytest.approx(16e-3), "text_encoder": 1e-5, "text_encoder.lora_B": pytest.approx(16e-5),
        "text_encoder_2": 1e-5, "text_encoder_2.lora_B": pytest.approx(16e-5),
    }  # fmt: skip
    b = parts["unet"][0].lora_B["default"].weight
    assert [p is b for p in groups["unet.lora_B"]["params"]] == [True]
    trained = sum(p.requires_grad for part in parts.values() for p in part.parameters())
    assert sum(len(group["params"]) for group in groups.values()) == trained
    with pytest.raises(ValueError, match="one step size for A and B together"):
        OptimizerConfig(name="prodigy", lora_plus_ratio=2.0)
    with pytest.raises(ConfigError, match="this run trains none"):
        build_run({"training": {"trains": "unet"}, "optimizer": {"lora_plus_ratio": 2.0}})


@pytest.mark.parametrize(("rate", "warned"), [(1.0, False), (0.5, False), (1e-3, True), (100.0, True)])
def test_a_rate_that_prodigy_cannot_use_is_warned_about(caplog, rate, warned):
    layer = torch.nn.Linear(2, 2)
    config = OptimizerConfig(name="prodigy", learning_rate=rate)
    build_optimizer(parameter_groups({"unet": layer}, config), config)
    assert ("multiplies its own estimate" in caplog.text) is warned


def test_moments_of_8_bits_are_counted() -> None:
    """All of a small adapter's matrices too, which bitsandbytes would keep in 32 bits by itself; not what is less than a block."""
    shapes = {"A": (32, 64), "B": (128, 32), "magnitude": (64,)}
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes.values()]
    optimizer = build_optimizer([{"params": parameters, "lr": 1e-3}], OptimizerConfig(name="adamw8bit"))
    assert share_of_8bit_moments(optimizer) is None
    sum(parameter.square().sum() for parameter in parameters).backward()
    optimizer.step()
    quantized = 32 * 64 + 128 * 32
    assert share_of_8bit_moments(optimizer) == pytest.approx(quantized / (quantized + 64))
    plain = build_optimizer([{"params": parameters, "lr": 1e-3}], OptimizerConfig())
    plain.step()
    assert share_of_8bit_moments(plain) is None


def test_a_run_as_short_as_its_warm_up_is_told(caplog):
    for warmup, steps in ((5, 5), (4, 5), (0, 0)):
        config = OptimizerConfig(warmup_steps=warmup)
        build_schedule(build_optimizer(parameter_groups(modules(), config), config), config, steps)
    assert [record.getMessage() for record in caplog.records if "warmup_steps" in record.getMessage()] == [
        "optimizer.warmup_steps is 5 and the run has 5 steps: its learning rate only rises; make it smaller"
    ]
