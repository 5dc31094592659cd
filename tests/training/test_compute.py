"""How steps are computed changes no result beyond rounding, is really done, and is undone; what cannot be done is told beforehand.

Compiled blocks are shown with dynamo's own backends, which run the captured graphs as they are: what they share with the real compiler
is what can go wrong here (what is captured, how often, and under which names), and they need no minutes.
"""

import contextlib
import json
import logging
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models import attention_processor
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from t2ilib.adapters.attach import attach_adapters
from t2ilib.config import AdapterSpec, ConfigError
from t2ilib.models.denoiser import Denoiser
from t2ilib.runfile import build_run
from t2ilib.training import compute, loop
from t2ilib.training.average import at_hand, rest_on_host
from t2ilib.training.checkpoint import pack_optimizer, unpack_optimizer
from t2ilib.training.compute import activations_elsewhere, computing, require_attention, require_possible
from t2ilib.training.setups import Setup, checkpoint_gradients
from t2ilib.training.state import TrainState

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FUSED, FUSED_BACKWARD = (f"_scaled_dot_product_flash_attention_for_cpu{end}" for end in ("", "_backward"))
ADAPTERS = {"whole": None, "lora": AdapterSpec(rank=2, targets=("to_q", "conv1"), dropout=0.2, dropout_kind="rank")}
ONE_LEVEL = {
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "block_out_channels": (64,),
    "attention_head_dim": 2,
}


def settings(**sections: dict):
    return build_run({"adapter": {}, "training": {"steps": 1}, **sections})


def accelerator(device: torch.device = CPU, precision: str = "no") -> Any:
    return SimpleNamespace(device=device, mixed_precision=precision, scaler=None)


class Learner:
    """A UNet of one level with random weights, and what a step of it needs. `step(setup, number, side)` gives loss and norm of gradients."""

    def __init__(self, parts, adapter: AdapterSpec | None, checkpointing: bool = False):
        torch.manual_seed(0)
        parts.unet = type(parts.unet).from_config({**parts.unet.config, **ONE_LEVEL}).requires_grad_(False).eval()
        self.parts = parts
        modules = attach_adapters(parts, adapter, 0) if adapter else {"unet": parts.unet.requires_grad_(True)}
        if checkpointing:
            checkpoint_gradients(parts, modules)
        self.model = Denoiser(parts, False).train()
        self.setup = Setup(parts, self.model, modules, lambda step: [0], self.batch, self.error)
        self.parameters = [p for p in parts.unet.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-3, fused=True)
        with torch.no_grad():
            self.text = parts.encode_text(["a red circle", "a blue square"]) | {"time_ids": torch.full((2, 6), 64.0)}

    def batch(self, ids: list[int], step: int, side: int = 8) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(step)
        return {"latents": torch.randn(2, 4, side, side, generator=generator), **self.text}

    def error(self, model: nn.Module, batch, noise, timesteps) -> torch.Tensor:
        return (model(batch["latents"], timesteps, batch) - noise).square().mean(dim=(1, 2, 3))

    def step(self, setup: Setup, number: int, side: int = 8) -> tuple[float, float]:
        torch.manual_seed(number)
        batch = self.batch([0], number, side)
        loss = setup.objective(self.model, batch, batch["latents"].flip(0), torch.tensor([10, 500])).mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item(), norm.item()


class Operations(TorchDispatchMode):
    """Counts what is computed."""

    def __init__(self):
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def graphs(monkeypatch):
    """`graphs()`: how many have been captured; blocks run as they were captured."""
    monkeypatch.setattr(compute, "COMPILER", "eager")
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["math", "flash"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_attention_is_computed_as_asked_in_steps_alone(make, name: str, checkpointing: bool) -> None:
    found = {}
    for attention in ("sdpa", name):
        learner = Learner(make(), AdapterSpec(rank=2), checkpointing)
        usual = [layer.processor for layer in compute.attention_layers(learner.parts.unet)]
        with computing(settings(compute={"attention": attention}), learner.setup, accelerator()) as setup:
            with Operations() as operations:
                steps = [learner.step(setup, number) for number in range(2)]
            learner.model.eval()
            with torch.no_grad(), Operations() as drawing:
                drawn = learner.model(learner.batch([0], 0)["latents"], torch.tensor([10, 500]), learner.text)
        found[attention] = steps, drawn, operations.count, drawing.count
        assert [layer.processor for layer in compute.attention_layers(learner.parts.unet)] == usual
    assert found[name][0] == [pytest.approx(step, rel=1e-5) for step in found["sdpa"][0]]
    assert torch.allclose(found[name][1], found["sdpa"][1], atol=1e-4)
    times = 2 * len(usual) * (1 + checkpointing)
    assert found["sdpa"][2][FUSED] == times
    assert found[name][2][FUSED] == (0 if name == "math" else times)
    assert found[name][2][FUSED_BACKWARD] == (0 if name == "math" else 2 * len(usual))
    assert found[name][3][FUSED] == len(usual)  # drawn by torch's own choice


def test_xformers_is_asked_for_by_name(make, monkeypatch) -> None:
    """With a stand-in for the package, which is not installed; without it the package and what to do are named."""
    with pytest.raises(ConfigError, match=r"pip install xformers .* or set compute.attention to sdpa"):
        require_possible(settings(compute={"attention": "xformers"}), accelerator())
    calls = []

    def attend(query, key, value, attn_bias=None, op=None, scale=None):
        calls.append(query.shape)
        return F.scaled_dot_product_attention(query, key, value, scale=scale)

    monkeypatch.setattr("diffusers.utils.is_xformers_available", lambda: True)
    ops = SimpleNamespace(ops=SimpleNamespace(memory_efficient_attention=attend))
    monkeypatch.setattr(attention_processor, "xformers", ops)
    losses = []
    for attention in ("sdpa", "xformers"):
        learner = Learner(make("sd15"), AdapterSpec(rank=2))
        with computing(settings(compute={"attention": attention}), learner.setup, accelerator()) as setup:
            calls.clear()
            losses.append(learner.step(setup, 0))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(calls) == len(compute.attention_layers(learner.parts.unet))


def test_a_kernel_that_is_not_there_is_told_before_anything_is_loaded(tmp_path: Path, monkeypatch) -> None:
    require_attention("flash", CPU, torch.float32, [40, 160])
    monkeypatch.setitem(
        compute.ATTENTIONS, "flash", lambda usual: compute.OneKernel(compute.SDPBackend.CUDNN_ATTENTION, usual)
    )
    monkeypatch.setattr(loop, "load_base", lambda *_: pytest.fail("loaded"))
    run = settings(output=str(tmp_path / "run"), data={"source": "shapes"}, shapes={"num_pictures": 4},
                   training={"steps": 1, "batch_size": 2}, compute={"attention": "flash"})  # fmt: skip
    with pytest.raises(
        ConfigError,
        match=r"attention flash does not work on cpu in float32 with heads of 64: RuntimeError: No viable backend.* to sdpa",
    ):
        loop.train(run)
    assert not run.output.exists()
    with pytest.raises(ConfigError, match="in bfloat16"):
        require_possible(run, accelerator(precision="bf16"))
    require_possible(settings(training={"steps": 0}, compute={"attention": "flash"}), accelerator())


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_compiled_steps_are_the_same_and_are_compiled_once(make, graphs, monkeypatch, family, kind) -> None:
    """Dropout included; nothing is captured after the first step, and names are as they were. (50 steps with the real compiler:
    experiments/benchmarks/levers.py.)"""
    if (family, kind) == ("sd15", "lora"):
        monkeypatch.setattr(compute, "COMPILER", "aot_eager")  # the backward pass captured too
    losses, names = {}, None
    for compiled in (False, True):
        learner = Learner(make(family), ADAPTERS[kind])
        names = names or list(learner.parts.unet.state_dict())
        with computing(settings(compute={"compile": compiled}), learner.setup, accelerator()) as setup:
            losses[compiled] = [learner.step(setup, 0)]
            assert bool(graphs()) == compiled
            with torch._dynamo.config.patch(error_on_recompile=True):
                losses[compiled] += [learner.step(setup, number) for number in range(1, 20)]
                assert list(learner.parts.unet.state_dict()) == names
                captured = graphs()
                learner.model.eval()  # other batches are drawn and measured, with nothing compiled for them
                batch = {name: value[:1] for name, value in learner.batch([0], 0, side=16).items()}
                with torch.no_grad():
                    learner.model(batch["latents"], torch.tensor([10]), batch)
                assert graphs() == captured
    assert losses[True] == [pytest.approx(step, rel=1e-5) for step in losses[False]]
    assert all("forward" not in vars(module) for module in learner.parts.unet.modules())
    assert 2 < captured < sum(type(m).__name__ in compute.BLOCKS for m in learner.parts.unet.modules())


def test_each_size_of_pictures_is_compiled_once(make, graphs) -> None:
    """Also where activations are computed again, which must not capture anything anew."""
    learner = Learner(make(), AdapterSpec(rank=2), checkpointing=True)
    with computing(settings(compute={"compile": True, "attention": "math"}), learner.setup, accelerator()) as setup:
        captured = [(learner.step(setup, number, side), graphs())[1] for number, side in enumerate((8, 8, 16, 8, 16))]
    assert captured[0] == captured[1] < captured[2] == captured[3] == captured[4] == 2 * captured[0]


def test_more_graphs_than_allowed_are_an_error(make, graphs, monkeypatch) -> None:
    """Where torch would go on without compiling."""
    monkeypatch.setattr(compute, "MOST_GRAPHS", 1)
    learner = Learner(make(), AdapterSpec(rank=2))
    with (
        computing(settings(compute={"compile": True}), learner.setup, accelerator()) as setup,
        pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit),
    ):
        learner.step(setup, 0)


def test_no_compiler_is_told_beforehand(monkeypatch) -> None:
    with (
        torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",)}),
        pytest.raises(ConfigError, match=r"compute.compile needs a C\+\+ compiler .* failed here: .*Set|Install"),
    ):
        require_possible(settings(compute={"compile": True}), accelerator())
    monkeypatch.setattr(compute, "COMPILER", "eager")
    require_possible(settings(compute={"compile": True}), accelerator())


def run_of(output: Path, steps: int = 3, adapter: dict | None = None, **sections: dict):
    values = {
        "output": str(output),
        "adapter": adapter,
        "data": {"source": "shapes"},
        "shapes": {"scenes": ["heart"], "num_pictures": 4, "checked_prompts": 0},
        "training": {"steps": steps, "batch_size": 2, "checkpoint_every": 1},
        "evaluation": {"validation_timesteps": 1, "prompts": ["a red heart"], "num_inference_steps": 1},
    }
    if adapter is None:
        values["training"] |= {"trains": "unet", "ema_horizon": 4}
    return build_run(values | sections)


def steps_of(output: Path) -> list[tuple[float, float]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(row["loss"], row["grad_norm"]) for row in rows if "grad_norm" in row]


def state_of(output: Path, step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {path.stem: load_file(path) for path in (output / "checkpoints" / f"step-{step:06d}").glob("*.safetensors")}


def same(ours: dict, theirs: dict, **tolerance: float) -> bool:
    assert ours.keys() == theirs.keys()
    compare = torch.allclose if tolerance else torch.equal
    return all(compare(tensor, theirs[file][name], **tolerance) for file in ours for name, tensor in ours[file].items())


def test_a_compiled_run_leaves_what_others_leave(tmp_path: Path, monkeypatch, graphs) -> None:
    """Through `train`, transformer blocks alone to be quick; what it leaves is the same, and goes on uncompiled."""
    monkeypatch.setattr(compute, "BLOCKS", ("BasicTransformerBlock",))
    for compiled in (False, True):
        loop.train(run_of(tmp_path / str(compiled), 2, {"rank": 2}, compute={"compile": compiled}))
    assert graphs() > 1
    ours, theirs = (tmp_path / str(compiled) for compiled in (True, False))
    assert steps_of(ours) == [pytest.approx(step, rel=1e-5) for step in steps_of(theirs)]
    assert same(state_of(ours, 2), state_of(theirs, 2), rtol=1e-3, atol=1e-5)
    files = [load_file(folder / "adapter" / "pytorch_lora_weights.safetensors").keys() for folder in (ours, theirs)]
    assert files[0] == files[1]
    assert loop.train(run_of(ours, 3, {"rank": 2})).resumed_from == 2


def test_channels_last_reaches_convolutions_and_survives_a_resume(tmp_path: Path, monkeypatch) -> None:
    """What is saved and resumed is what is trained straight, to the bit, and what would be trained without, to rounding."""
    seen, take = [], loop.take_gradients

    def taking(run, setup, *rest) -> Any:
        convolutions = [m.weight for m in setup.components.unet.modules() if isinstance(m, nn.Conv2d)]
        wide = [weight for weight in convolutions if weight.shape[1] > 1 and weight.shape[-1] > 1]
        seen.append({weight.is_contiguous(memory_format=torch.channels_last) for weight in wide})
        return take(run, setup, *rest)

    monkeypatch.setattr(loop, "take_gradients", taking)
    last = {"compute": {"channels_last": True}}
    result = loop.train(run_of(tmp_path / "straight", **last))
    assert seen == [{True}] * 3
    assert all(parameter.is_contiguous() for parameter in result.components.unet.parameters())
    straight = state_of(tmp_path / "straight", 3)
    saved = load_file(tmp_path / "straight" / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(saved["conv_in.weight"], straight["ema"]["unet.conv_in.weight"])

    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-000003")
    assert loop.train(run_of(tmp_path / "resumed", **last)).resumed_from == 2
    assert same(state_of(tmp_path / "resumed", 3), straight)
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-000003")
    assert loop.train(run_of(tmp_path / "resumed")).resumed_from == 2
    assert seen[-1] == {False}
    assert same(state_of(tmp_path / "resumed", 3), straight, rtol=1e-3, atol=1e-5)


def test_moments_come_back_where_their_weights_lie() -> None:
    """Fused AdamW pairs elements by where they lie: moments in another order would be those of other weights."""
    ends = []
    for interrupted in (False, True):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(8, 6, 3, 3).to(memory_format=torch.channels_last))
        optimizer = torch.optim.AdamW([weight], lr=1e-2, fused=True)
        for _ in range(4):
            (weight * torch.randn(8, 6, 3, 3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if interrupted:
                tensors, packed = pack_optimizer(optimizer)
                stored = {name: tensor.contiguous() for name, tensor in tensors.items()}  # as files hold them
                optimizer = torch.optim.AdamW([weight], lr=1e-2, fused=True)
                unpack_optimizer(optimizer, stored, packed)
        ends.append(weight.detach())
    assert torch.equal(*ends)


def test_an_adapter_stays_as_it_is_over_convolutions_that_are_laid_out(make) -> None:
    """Without dropout, which draws in the order in which elements lie."""
    losses = []
    for last in (False, True):
        learner = Learner(make(), AdapterSpec(rank=2, targets=("to_q", "conv1")))
        with computing(settings(compute={"channels_last": last}), learner.setup, accelerator()) as setup:
            unet = learner.parts.unet
            wide = [p for p in unet.parameters() if p.ndim == 4 and min(p.shape[1:3]) > 1]
            for parameter in wide:
                laid = last and not parameter.requires_grad
                assert parameter.is_contiguous(memory_format=torch.channels_last) == laid
            losses.append([learner.step(setup, number) for number in range(3)])
        assert all(parameter.is_contiguous() for parameter in unet.parameters())
    assert losses[1] == [pytest.approx(step, rel=1e-4) for step in losses[0]]


@pytest.mark.parametrize("name", ["tf32", "cudnn_benchmark"])
def test_switches_are_on_while_a_run_trains_on_a_gpu(make, name: str, caplog) -> None:
    place, attribute = {
        "tf32": (torch.backends.cuda.matmul, "allow_tf32"),
        "cudnn_benchmark": (torch.backends.cudnn, "benchmark"),
    }[name]
    run, setup = settings(compute={name: True}), Learner(make(), AdapterSpec(rank=2)).setup
    assert not getattr(place, attribute)
    with contextlib.suppress(KeyError), computing(run, setup, accelerator(CUDA)):
        assert getattr(place, attribute)
        raise KeyError
    assert not getattr(place, attribute)
    with computing(settings(), setup, accelerator(CUDA)):
        assert not getattr(place, attribute)
    with caplog.at_level(logging.INFO), computing(run, setup, accelerator()):
        assert not getattr(place, attribute)  # a CPU's float32 is none of its business
        require_possible(run, accelerator())
    assert f"compute.{name}: nothing on cpu" in caplog.text


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_come_back_as_they_were(make, checkpointing: bool) -> None:
    """Gradients are those without, to rounding, as copies of views lie otherwise; no weight is carried along, and nothing small."""
    losses, kept = [], {}
    for away in (False, True):
        learner = Learner(make(), ADAPTERS["whole"], checkpointing)
        weights = {p.untyped_storage()._cdata for p in learner.model.parameters()}

        def put(tensor: torch.Tensor, weights=weights) -> torch.Tensor:
            assert tensor.untyped_storage()._cdata not in weights
            assert tensor.nbytes >= compute.SMALLEST_AWAY
            kept[len(kept)] = tensor.nbytes
            return tensor.clone()

        setup = activations_elsewhere(learner.setup, put, torch.clone) if away else learner.setup
        losses.append([learner.step(setup, number) for number in range(2)])
    assert losses[1] == [pytest.approx(step, rel=1e-5) for step in losses[0]]
    assert len(kept) > (2 if checkpointing else 40)


def test_the_average_is_on_the_device_only_while_it_is_taken() -> None:
    """With copies in the place of another device: what was learned there comes back to where it rests."""
    moves: list[str] = []

    def to(device, dtype=None, non_blocking=False) -> None:
        moves.append(torch.device(device).type)
        average.shadow_params = [tensor.clone() for tensor in average.shadow_params]

    average = EMAModel([nn.Parameter(torch.ones(3))], decay=0.5)
    average.to = to
    average.pin_memory = lambda: moves.append("pinned")
    rest_on_host(average, CUDA)
    (resting,) = average.shadow_params
    with at_hand(average, CUDA):
        (working,) = average.shadow_params
        working.fill_(7.0)
        assert resting.tolist() == [1.0] * 3
    assert average.shadow_params[0] is resting
    assert resting.tolist() == [7.0] * 3
    assert moves == ["cpu", "pinned", "cuda"]


def test_an_average_that_waits_is_the_average(tmp_path: Path, make, monkeypatch) -> None:
    rested: list[Any] = []
    monkeypatch.setattr("t2ilib.training.state.rest_on_host", lambda average, device: rested.append(average))
    averages = []
    for offload in ((), ("average",)):
        setup = Learner(make(), ADAPTERS["whole"]).setup
        prepared = SimpleNamespace(device=CPU, scaler=None, prepare=lambda *given: given)
        state = TrainState(run_of(tmp_path / "run", compute={"offload": offload}), setup, prepared, "")
        for number in range(2):
            for parameter in state.parameters:
                parameter.grad = torch.full_like(parameter, number + 1.0)
            state.step()
        averages.append(state.ema.shadow_params)
        assert rested == [state.ema] * len(offload)
    assert all(torch.equal(*pair) for pair in zip(*averages, strict=True))


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"compute": {"compile": True}, "data": {"source": "shapes"}, "shapes": {"trains": "vae"}, "adapter": None}, "compile is about the UNet.* trains vae"),
        ({"compute": {"attention": "math"}, "data": {"source": "shapes"}, "shapes": {"trains": "clip"}, "adapter": None}, "attention is about the UNet"),
        ({"compute": {"cudnn_benchmark": True}, "training": {"deterministic": True}}, "leave one of them out"),
        ({"compute": {"channels_last": True}, "optimizer": {"name": "adamw8bit"}, "training": {"trains": "unet"}, "adapter": None}, "lays the weights"),
        ({"compute": {"offload": ["average"]}}, "set training.ema_horizon"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(sections: dict, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        settings(**sections)


def test_a_run_may_go_on_computed_otherwise() -> None:
    other = {"attention": "math", "compile": True, "channels_last": True, "tf32": True, "offload": ["activations"]}
    assert settings(compute=other).training_digest() == settings().training_digest()
