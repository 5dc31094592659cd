"""Fused adapters against peft's own modules: values and gradients, over every base, kind, dropout and precision."""

import json
from contextlib import nullcontext

import pytest
import torch
from adapting import fit, output_of
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from t2ilib.adapters.attach import attach_adapters, measure_magnitudes
from t2ilib.adapters.dropout import DROPOUTS
from t2ilib.adapters.export import save_adapter
from t2ilib.adapters.fused import Fused, fuse_adapters, row_norms
from t2ilib.adapters.load import load_adapter, weigh_adapters
from t2ilib.config import AdapterSpec
from t2ilib.models.quantize import quantize
from t2ilib.runfile import build_run
from t2ilib.training.loop import train

SHARE = 0.3
BASES = {
    "linear": (lambda: nn.Linear(64, 48), "none"),
    "linear without bias": (lambda: nn.Linear(64, 48, bias=False), "none"),
    "convolution": (lambda: nn.Conv2d(16, 12, 3, stride=2, padding=1), "none"),
    "1x1 convolution without bias": (lambda: nn.Conv2d(16, 12, 1, bias=False), "none"),
    "nf4": (lambda: nn.Linear(64, 48), "nf4"),
    "nf4 convolution": (lambda: nn.Conv2d(16, 12, 3, padding=1), "nf4"),
    "int8": (lambda: nn.Linear(64, 48), "int8"),
}
DTYPES = {"float32": 2e-6, "bfloat16": 2e-2, "float16": 3e-3}
"""How far two ways of computing may be apart, relative in norm: their order of rounding."""


def adapted(base, kind="lora", dropout="input", share=0.0, fused=False, dtype=torch.float32, rank=4):
    """A network of one adapted layer in training mode, the same in every call but for who computes it."""
    build, method = BASES[base]
    torch.manual_seed(0)
    net = nn.Sequential(build()).requires_grad_(False).to(dtype)
    if method != "none":
        quantize(net, method, dtype, convolutions="convolution" in base)
    spec = {"r": rank, "lora_alpha": 1.5 * rank, "target_modules": ["0"], "use_dora": kind == "dora"}
    inject_adapter_in_model(LoraConfig(**spec, lora_dropout=share if dropout == "input" else 0.0), net)
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if kind == "dora":
        measure_magnitudes(net)
        net[0].lora_magnitude_vector["default"].weight.data.mul_(1.2)
    nn.init.normal_(net[0].lora_B["default"].weight, std=0.2)
    if share and dropout != "input":
        DROPOUTS[dropout](net, "default", share)
    if fused:
        assert not fuse_adapters(net, dropout, share)
        assert isinstance(net[0], Fused)
    return net.train()


def input_of(base, dtype=torch.float32):
    shape = (2, 16, 6, 6) if "convolution" in base else (2, 5, 64)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def passes(net, x, around=nullcontext):
    """The output, and the gradients of the input and of every adapter weight, of a loss that weighs every element differently."""
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    with around():
        out = net(x)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    (out.float() * weights).sum().backward()
    gradients = {n: p.grad for n, p in net.named_parameters() if p.requires_grad}
    return {"out": out.detach(), "input": x.grad, **gradients}


def require_equal(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        off = (found[name].double() - value.double()).norm() / value.double().norm()
        assert float(off) < tolerance, (name, float(off))


KINDS = [("lora", None), ("lora", "input"), ("lora", "rank"), ("lora", "rows_columns"), ("dora", None), ("dora", "input")]  # fmt: skip


@pytest.mark.parametrize(("kind", "dropout"), KINDS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("precision", ["float32", "autocast bfloat16", "autocast float16", "bfloat16 base"])
def test_values_and_gradients_are_those_of_peft(base, kind, dropout, precision):
    """Dropout is given the same masks: both draw as many numbers, in one order, from one seed."""
    name = precision.split()[-1] if "autocast" in precision else precision.split()[0]
    dtype = torch.bfloat16 if precision == "bfloat16 base" else torch.float32
    if dtype == torch.bfloat16 and "convolution" in base and (kind, dropout) == ("dora", "input"):
        pytest.skip("peft multiplies a float32 input with a bfloat16 weight there, and raises")
    around = nullcontext
    if "autocast" in precision:
        around = lambda: torch.autocast("cpu", dtype=getattr(torch, name))  # noqa: E731
    both = [
        passes(
            adapted(base, kind, dropout or "input", SHARE if dropout else 0.0, fused, dtype),
            input_of(base, dtype),
            around,
        )
        for fused in (True, False)
    ]
    if "autocast" in precision:
        both = [{key: value.float() for key, value in found.items()} for found in both]
    require_equal(*both, DTYPES[name])


@pytest.mark.parametrize("base", [b for b in BASES if BASES[b][1] == "none"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_gradients_are_those_of_finite_differences(base, kind):
    """In float64. peft's norm is without a gradient, so DoRA's is held for A and B, and its magnitude is checked alone."""
    net = adapted(base, kind, fused=False).double()
    fuse_adapters(net)
    layer = net[0]
    if kind == "dora":
        names = ["lora_magnitude_vector.default.weight"]
    else:
        names = ["lora_A.default.weight", "lora_B.default.weight"]
    weights = [layer.get_parameter(name) for name in names]
    x = input_of(base).double()[:1].requires_grad_()

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *weights), fast_mode=True)


@pytest.mark.parametrize("base", ["linear", "convolution"])
def test_the_norm_of_dora_is_that_of_the_whole_weight(base):
    net = adapted(base, "dora", fused=True)
    layer = net[0]
    a, b = (getattr(layer, name)["default"].weight.detach() for name in ("lora_A", "lora_B"))
    whole = layer.base_layer.weight.flatten(1) + layer.scaling["default"] * b.flatten(1) @ a.flatten(1)
    for weight in (layer.base_layer.weight, layer.base_layer.weight.clone(memory_format=torch.preserve_format)):
        norms = row_norms(layer.row_squares, weight, a, b, layer.scaling["default"], torch.float32)
        assert torch.allclose(norms, whole.norm(dim=1), rtol=1e-6)
    if base == "convolution":
        weight = layer.base_layer.weight.detach().to(memory_format=torch.channels_last)
        norms = row_norms(layer.row_squares, weight, a, b, layer.scaling["default"], torch.float32)
        assert torch.allclose(norms, whole.norm(dim=1), rtol=1e-6)


def test_convolutions_that_lie_pixel_by_pixel():
    net, x = adapted("convolution", "dora", fused=True), input_of("convolution")
    expected = passes(net, x)
    for parameter in net.parameters():
        parameter.grad = None
    net.to(memory_format=torch.channels_last)
    require_equal(passes(net, x.to(memory_format=torch.channels_last)), expected, 2e-6)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_recomputed_activations_give_the_same_gradients(kind):
    """Also where dropout draws: the recomputation draws the same numbers."""
    net, x = adapted("linear", kind, "input", SHARE, fused=True), input_of("linear")
    expected = passes(net, x)
    for parameter in net.parameters():
        parameter.grad = None

    class Recomputed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return checkpoint(self.net, x, use_reentrant=False)

    found = {name.removeprefix("net."): value for name, value in passes(Recomputed(), x).items()}
    require_equal(found, expected, 1e-12)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("base", ["linear", "nf4"])
def test_the_forward_pass_keeps_less_than_that_of_peft(base, kind):
    """Of what grows with the batch: the input and what is as wide as the rank; and DoRA's output, which whoever reads it keeps anyway."""

    def kept(fused):
        sizes, net = {}, adapted(base, kind, fused=fused)

        def note(tensor):
            if tensor.shape[0] == 2 or tensor.shape[0] == 10:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            net(input_of(base).requires_grad_())
        return sum(sizes.values())

    ours, theirs = kept(True), kept(False)
    tokens = 2 * 5 * 4
    assert ours == tokens * (64 + 4 + (48 if kind == "dora" else 0))
    assert ours <= theirs


def test_what_it_is_not_for_is_computed_by_peft_and_counted():
    """Several adapters, none, merged, a choice by sample: as peft has it, to the bit."""
    nets = [adapted("linear", fused=fused).eval() for fused in (False, True)]
    x, layer = input_of("linear"), nets[1][0]
    with torch.no_grad():
        assert layer.passes_by_peft == 0
        assert torch.allclose(nets[1](x), nets[0](x), atol=1e-6)
        assert layer.passes_by_peft == 0
        for net in nets:
            torch.manual_seed(5)
            inject_adapter_in_model(
                LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), net, adapter_name="other"
            )

        def agree(change, passes):
            for net in nets:
                change(net[0])
            assert torch.equal(nets[1](x), nets[0](x))
            assert layer.passes_by_peft == passes

        agree(lambda each: each.set_adapter(["default", "other"]), 1)
        agree(lambda each: each.set_adapter("other"), 2)
        agree(lambda each: each.enable_adapters(False), 3)
        for net in nets:
            net[0].enable_adapters(True)
            net[0].set_adapter("default")
        agree(lambda each: each.merge(), 4)
        agree(lambda each: each.unmerge() or each.merge(), 5)
        names = ["default", "other"]
        for net in nets:
            net[0].unmerge()
        assert torch.equal(layer(x, adapter_names=names), nets[0][0](x, adapter_names=names))
        assert layer.passes_by_peft == 6
        for net in nets:  # what an adapter is multiplied with is looked up in every pass
            net[0].set_scale("default", 0.3)
        assert torch.allclose(nets[1](x), nets[0](x), atol=1e-6)
        assert layer.passes_by_peft == 6


def test_layers_it_cannot_compute_are_left_alone_and_told(caplog):
    net = nn.Sequential(
        nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 3, dilation=2), nn.Conv2d(8, 8, 3), nn.Embedding(4, 8)
    )
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0", "1", "2"]), net)
    with caplog.at_level("INFO"):
        left = fuse_adapters(net)
    assert list(left.values()) == [2]
    assert "2 adapted layers are computed by peft's modules: it is a convolution with groups" in caplog.text
    assert [isinstance(layer, Fused) for layer in net] == [False, False, True, False]
    assert [isinstance(layer, LoraLayer) for layer in net] == [True, True, True, False]


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_it_compiles_without_a_break(kind):
    net, x = adapted("linear", kind, fused=True), input_of("linear")
    expected = passes(net, x)
    for parameter in net.parameters():
        parameter.grad = None
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    found = {name.removeprefix("_orig_mod."): value for name, value in passes(compiled, x).items()}
    require_equal(found, expected, 1e-6)


@pytest.mark.parametrize("spec", [{}, {"kind": "dora", "dropout": 0.2}, {"dropout": 0.2, "dropout_kind": "rows_columns"}], ids=str)  # fmt: skip
def test_a_training_through_it_is_that_through_peft(make, spec, tmp_path):
    """The whole UNet and text encoders: losses, weights, pictures drawn after it, and files, which load into a base without it."""
    spec, found = AdapterSpec(rank=2, targets="many", text_encoder_targets="attention", **spec), []
    for fused in (True, False):
        components = make()
        for module in attach_adapters(components, spec, 0).values():
            if fused:
                assert not fuse_adapters(module, spec.dropout_kind, spec.dropout)
        losses = fit(components, None, 3, trains_text=True, rate=1e-3, before_step=torch.manual_seed)
        folder = tmp_path / str(fused)
        save_adapter(components, folder)
        found.append(
            (torch.tensor(losses), output_of(components), load_file(folder / "pytorch_lora_weights.safetensors"))
        )
        layers = [m for part in components.modules().values() for m in part.modules() if isinstance(m, Fused)]
        assert bool(layers) == fused
        assert not any(layer.passes_by_peft for layer in layers)
    (losses, out, ours), (expected, theirs, other) = found
    assert torch.allclose(losses, expected, rtol=1e-4)
    assert torch.allclose(out, theirs, atol=1e-3)
    assert ours.keys() == other.keys()
    loaded = make()
    load_adapter(loaded, tmp_path / "True")
    assert torch.allclose(output_of(loaded), out, atol=1e-5)
    weigh_adapters(loaded, {"default": 0.0})
    assert torch.equal(output_of(loaded), output_of(make()))


def test_a_run_goes_on_with_the_switch_the_other_way(tmp_path):
    """It changes no checkpoint: the second half of a run through peft begins where the first half through fused layers ended."""
    settings = {
        "adapter": {"rank": 2, "kind": "dora"},
        "data": {"source": "shapes"},
        "shapes": {"scenes": ["heart"], "num_pictures": 4, "checked_prompts": 0},
        "training": {"batch_size": 2, "checkpoint_every": 1},
        "evaluation": {"validate_every": 0, "validation_timesteps": 1, "sample_every": 0, "prompts": ["a heart"], "num_inference_steps": 1},
    }  # fmt: skip

    def trained(folder, *parts):
        for steps, fused in parts:
            run = {**settings, "output": str(tmp_path / folder), "compute": {"fused_adapters": fused}}
            train(build_run({**run, "training": {**settings["training"], "steps": steps}}))
        return load_file(tmp_path / folder / "adapter" / "pytorch_lora_weights.safetensors")

    switched, straight = trained("switched", (1, True), (2, False)), trained("straight", (2, True))
    rows = [json.loads(line) for line in (tmp_path / "switched" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert switched.keys() == straight.keys()
    assert any(
        not torch.equal(switched[name], straight[name]) for name in straight
    )  # or the switch would not have been one
    for name, tensor in straight.items():
        assert torch.allclose(switched[name], tensor, atol=1e-5), name
