import copy
import weakref

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from t2ilib.config import ConfigError, ModelConfig
from t2ilib.evaluation.quantization import quantization_errors
from t2ilib.models.files.layouts import build_layout
from t2ilib.models.load import load_base
from t2ilib.models.quantize import Conv2d4bit, foresee, layer_errors, move, quantize, select_layers, weight_bytes

CPU = torch.device("cpu")


class Net(nn.Module):
    """A bias-free layer between two others, as to_q, to_k and to_v are in a UNet."""

    def __init__(self, width=128):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.free = nn.Linear(width, width, bias=False)
        self.last = nn.Linear(width, 64)
        self.norm = nn.LayerNorm(64)

    def forward(self, x):
        return self.norm(self.last(torch.tanh(self.free(torch.tanh(self.first(x))))))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().requires_grad_(False).eval()


def dequantized(layer):
    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def adapted_gradients(net, x):
    """Gradients of every adapter weight; B is not zero, so A has one too."""
    net.zero_grad()
    net.train()
    net(x).square().mul(torch.arange(64.0)).mean().backward()
    net.eval()
    return {name: parameter.grad.clone() for name, parameter in net.named_parameters() if parameter.requires_grad}


def test_every_linear_layer_is_swapped_and_nothing_else(net):
    bias = net.first.bias.clone()
    report = quantize(net, "nf4", torch.float32)
    assert report.quantized == ("first", "free", "last")
    assert report.kept == ()
    assert [type(layer) for layer in (net.first, net.free, net.last)] == [bnb.nn.Linear4bit] * 3
    assert type(net.norm) is nn.LayerNorm
    assert torch.equal(net.first.bias, bias)
    assert net.free.bias is None
    assert net.is_loaded_in_4bit is True
    assert not any(parameter.requires_grad for parameter in net.parameters())
    for layer in (net.first, net.free, net.last):
        assert layer.weight.dtype == torch.uint8
        assert layer.weight.quant_state.quant_type == "nf4"
        assert layer.weight.quant_state.nested  # double quantization


def test_the_error_is_that_of_nf4(net):
    """0.09 relative on Gaussian weights (measured; arXiv 2305.14314 gives the code's design, not the number)."""
    layer = nn.Linear(512, 512, bias=False).requires_grad_(False)
    nn.init.normal_(layer.weight, std=0.02)
    truth = layer.weight.clone()
    model = nn.Sequential(layer)
    quantize(model, "nf4", torch.float32)
    restored = dequantized(model[0])
    assert restored.shape == truth.shape
    assert float((restored - truth).norm() / truth.norm()) == pytest.approx(0.092, abs=0.01)
    x = torch.randn(4, 512)
    assert torch.allclose(model(x), x @ restored.T, atol=1e-4)


def test_values_lie_on_the_sixteen_levels():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    quantize(model, "nf4", torch.float32)
    rows = dequantized(model[0])  # one block of 64 values a row
    assert max(len(row.unique()) for row in rows) <= 16


def test_a_sampling_pass_changes_neither_gradients_nor_weights(net):
    """On CPUs with AVX512_BF16 bitsandbytes repacks a weight in place at the first no-grad pass in eval mode; then gradients
    stop at bias-free layers and dequantizing gives garbage."""
    quantize(net, "nf4", torch.float32)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["first", "free", "last"], init_lora_weights=False), net)
    x = torch.randn(8, 128)
    layers = [net.first.base_layer, net.free.base_layer, net.last.base_layer]
    before, weights, codes = (
        adapted_gradients(net, x),
        [dequantized(layer) for layer in layers],
        [layer.weight.clone() for layer in layers],
    )
    assert all(bool(gradient.any()) for gradient in before.values())
    net.eval()
    with torch.no_grad():
        first, second = net(x), net(x)
    after = adapted_gradients(net, x)
    assert torch.equal(first, second)
    assert len(after) == 6
    assert all(torch.equal(gradient, after[name]) for name, gradient in before.items())
    for layer, weight, code in zip(layers, weights, codes, strict=True):
        assert torch.equal(dequantized(layer), weight)
        assert torch.equal(layer.weight, code)
        assert layer.weight.shape == code.shape


def test_gradients_are_those_of_the_dequantized_weights(net):
    """The same net in float32 with the restored weights is the independent answer, also to the input."""
    quantize(net, "nf4", torch.float32)
    plain = Net().requires_grad_(False).eval()
    plain.load_state_dict(
        {k: v for k, v in net.state_dict().items() if k in plain.state_dict() and "weight" not in k}, strict=False
    )
    plain.norm.weight.copy_(net.norm.weight)
    for name in ("first", "free", "last"):
        getattr(plain, name).weight.data.copy_(dequantized(getattr(net, name)))
    gradients = []
    for model in (net, plain):
        x = torch.linspace(-1, 1, 8 * 128).view(8, 128).requires_grad_()
        output = model(x)
        (output * torch.arange(64.0)).mean().backward()
        gradients.append((output.detach(), x.grad))
    assert float(gradients[1][1].norm()) > 1e-3
    for mine, theirs in zip(*gradients, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4 * float(theirs.abs().max()))


def test_the_repacking_is_off_on_every_layer(net):
    quantize(net, "nf4", torch.float32)
    layers = [module for module in net.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(layers) == 3
    with torch.no_grad():
        net(torch.randn(2, 128))
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_merging_gives_base_plus_adapter(net):
    """peft merges into a 4-bit base only if the model says that it is one; the result is quantized again."""
    quantize(net, "nf4", torch.float32)
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules=["free"], init_lora_weights=False), net)
    layer = net.free
    base = dequantized(layer.base_layer)
    delta = 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    with torch.no_grad():
        net(torch.randn(2, 128))
        layer.merge()
    merged = dequantized(layer.base_layer)
    expected = (base + delta).detach()
    assert float((merged - expected).norm() / expected.norm()) < 0.12
    assert float((merged - base).norm() / delta.norm()) > 0.5


def test_layers_whose_width_is_no_multiple_of_the_block_are_kept_and_listed():
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 64), nn.Conv2d(64, 64, 1))
    weight = model[2].weight.clone()
    report = quantize(model, "nf4", torch.float32)
    assert report.quantized == ("0",)
    assert report.kept == ("2",)
    assert type(model[2]) is nn.Linear
    assert torch.equal(model[2].weight, weight)
    assert type(model[3]) is nn.Conv2d


def test_sizes():
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False), nn.Linear(1024, 512, bias=False))
    assert weight_bytes(model) == 4 * (1024 * 1024 + 512 * 1024)
    report = quantize(model, "nf4", torch.float32)
    assert report.bytes_before == 4 * 1536 * 1024
    assert report.bytes_after == weight_bytes(model)
    # 4 bits a weight, and with double quantization 8/64 + 32/(64 * 256) bits for the scales (arXiv 2305.14314, section 3)
    assert report.bytes_after == pytest.approx((4 + 8 / 64 + 32 / (64 * 256)) / 8 * 1536 * 1024, rel=0.01)
    assert report.bytes_after < report.bytes_before / 5


def test_buffers_count():
    model = nn.BatchNorm1d(10)
    assert weight_bytes(model) == 4 * 10 * 4 + 8  # weight, bias, mean, variance, and an int64 counter


@pytest.mark.parametrize("model", [nn.Sequential(nn.Conv2d(3, 64, 3)), nn.Sequential(nn.Linear(100, 64))])
def test_nothing_to_quantize_is_an_error(model):
    with pytest.raises(
        ConfigError, match=r"Sequential has no layer that nf4 can hold: set model\.quantization to none"
    ):
        quantize(model, "nf4", torch.float32)
    assert not getattr(model, "is_loaded_in_4bit", False)


def test_half_precision_compute(net):
    x = torch.randn(4, 128)
    expected = net(x)
    quantize(net.bfloat16(), "nf4", torch.bfloat16)
    output = net(x.bfloat16())
    assert output.dtype == torch.bfloat16
    assert float((output.float() - expected).norm() / expected.norm()) < 0.3


CONVOLUTIONS = {
    "3x3": nn.Conv2d(64, 32, 3, padding=1),
    "strided": nn.Conv2d(64, 32, 3, stride=2, padding=1, bias=False),
    "1x1": nn.Conv2d(64, 64, 1),
    "grouped, dilated": nn.Conv2d(64, 32, 3, groups=4, dilation=2, padding=2),
    "circular": nn.Conv2d(64, 32, 3, padding=1, padding_mode="circular"),
}


@pytest.mark.parametrize("layer", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_convolution_is_that_of_its_dequantized_weight(layer):
    """Outputs and input gradients against an ordinary convolution that holds the same restored weight."""
    layer.requires_grad_(False)
    model = nn.Sequential(copy.deepcopy(layer))
    if layer.padding_mode == "circular":
        with pytest.raises(ConfigError, match="no layer"):
            quantize(model, "nf4", torch.float32, convolutions=True)
        return
    report = quantize(model, "nf4", torch.float32, convolutions=True)
    assert report.quantized == ("0",)
    assert type(model[0]) is Conv2d4bit
    plain = copy.deepcopy(layer)
    plain.weight.copy_(model[0].weight)
    assert float((plain.weight - layer.weight).norm() / layer.weight.norm()) < 0.1
    x = torch.randn(2, 64, 9, 9, generator=torch.Generator().manual_seed(0))
    results = []
    for conv in (model, plain):
        leaf = x.clone().requires_grad_()
        output = conv(leaf)
        output.square().sum().backward()
        results.append((output.detach(), leaf.grad))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_training_does_not_keep_the_dequantized_convolutions():
    """What autograd saves between the passes holds no tensor as large as a weight, where an ordinary convolution saves it."""
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)).requires_grad_(False)
    sizes = {}
    for name in ("plain", "nf4"):
        saved = sizes[name] = []
        if name == "nf4":
            quantize(model, "nf4", torch.float32, convolutions=True)
        x = torch.randn(1, 64, 4, 4, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t.numel()) or t, lambda t: t):
            model(x).square().sum().backward()
    assert 64 * 64 * 9 in sizes["plain"]
    assert max(sizes["nf4"], default=0) < 64 * 64


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_train_over_quantized_convolutions(dora):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.SiLU(), nn.Conv2d(64, 64, 1)).requires_grad_(False)
    quantize(model, "nf4", torch.float32, convolutions=True)
    twin = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.SiLU(), nn.Conv2d(64, 64, 1)).requires_grad_(False)
    for index in (0, 2):
        twin[index].weight.copy_(model[index].weight)
        twin[index].bias.copy_(model[index].bias)
    gradients = []
    x = torch.randn(2, 64, 6, 6)
    for net in (model, twin):
        torch.manual_seed(1)
        inject_adapter_in_model(LoraConfig(r=4, target_modules=["0", "2"], use_dora=dora, init_lora_weights=False), net)
        assert type(net[0].lora_A["default"]) is nn.Conv2d
        checkpoint(net, x, use_reentrant=False).square().sum().backward()
        gradients.append({name: p.grad for name, p in net.named_parameters() if p.requires_grad})
    assert len(gradients[0]) == (6 if dora else 4)
    for name, gradient in gradients[0].items():
        assert bool(gradient.any()), name
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-4)


def test_autocast_convolutions_compute_in_half_precision():
    model = nn.Sequential(nn.Conv2d(64, 64, 3)).requires_grad_(False)
    quantize(model, "nf4", torch.float32, convolutions=True)
    x = torch.randn(1, 64, 5, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert x.grad.dtype == torch.float32
    expected = F.conv2d(x, model[0].weight, model[0].bias)
    assert float((output.float() - expected).norm() / expected.norm()) < 0.01


def test_int8_is_close_and_passes_gradients(net):
    x = torch.randn(4, 128)
    full = copy.deepcopy(net)
    report = quantize(net, "int8", torch.float32)
    assert net.is_loaded_in_8bit
    assert len(report.quantized) == 3
    results = []
    for model in (net, full):
        leaf = x.clone().requires_grad_()
        output = model(leaf)
        (output * torch.arange(64.0)).mean().backward()
        results.append((output.detach(), leaf.grad))
    for mine, theirs in zip(*results, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 0.03


@pytest.mark.parametrize("dora", [False, True])
def test_int8_keeps_training_through_drawing(net, dora):
    """peft's DoRA makes a new int8 weight in every pass on a CPU; its scales must not get lost on the way."""
    quantize(net, "int8", torch.float32)
    size = weight_bytes(net)
    config = LoraConfig(r=4, target_modules=["first", "free", "last"], use_dora=dora, init_lora_weights=False)
    inject_adapter_in_model(config, net)
    x = torch.randn(4, 128)
    first = adapted_gradients(net, x)
    with torch.no_grad():
        net(x)
    again = adapted_gradients(net, x)
    assert all(bool(gradient.any()) and torch.equal(gradient, again[name]) for name, gradient in first.items())
    adapter = sum(p.numel() * 4 for p in net.parameters() if p.requires_grad)
    assert weight_bytes(net) == size + adapter


def test_int8_keeps_its_bias_whatever_the_inputs_have(net):
    """A float32 base under half-precision autocast: a bias that is rounded in passing is another base for whoever loads it."""
    quantize(net, "int8", torch.float32)
    exact = net.first.bias.clone()
    assert not torch.equal(exact, exact.bfloat16().float())
    results = [net.first(torch.ones(2, 128, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)]
    assert [result.dtype for result in results] == [torch.bfloat16, torch.float32]
    assert net.first.bias.dtype == torch.float32
    assert torch.equal(net.first.bias, exact)


@pytest.mark.parametrize("passes", [0, 1])
def test_codes_that_move_are_there_once(net, passes, monkeypatch):
    """int8's codes have a second name, beside the weight before the first pass and in the layer's state afterwards; on a GPU what
    is left behind, or copied for each name, is memory that a plan knows nothing of."""
    quantize(net, "int8", torch.float32)
    x = torch.randn(2, 128)
    for _ in range(passes):
        net(x)
    layers = (net.first, net.free, net.last)
    left = [weakref.ref(layer.weight.untyped_storage()) for layer in layers]
    expected = copy.deepcopy(net)(x)

    def elsewhere(model, device):
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()

    monkeypatch.setattr(Net, "to", elsewhere)
    move(net, CPU)
    kept = [(layer.state if passes else layer.weight).CB for layer in layers]
    assert [codes.data_ptr() for codes in kept] == [layer.weight.data_ptr() for layer in layers]
    if not passes:  # afterwards a layer moves its state itself, which to the same device is no move
        assert not any(storage() for storage in left)
    assert torch.equal(net(x), expected)


def test_layers_can_be_left_out(net):
    quantized, kept = select_layers(net, "nf4", skip=["free"])
    assert (quantized, kept) == (["first", "last"], ["free"])
    report = quantize(net, "nf4", torch.float32, skip=["free"])
    assert report.kept == ("free",)
    assert type(net.free) is nn.Linear


def test_a_name_to_leave_out_must_exist():
    with pytest.raises(ConfigError, match=r"quantization_skip middle_block names no layer of unet, text_encoder"):
        load_base(ModelConfig(quantization="nf4", quantization_skip=("conv_in", "middle_block")), CPU)
    with pytest.raises(ValueError, match="quantization is none"):
        ModelConfig(quantization_skip=("conv_in",))
    with pytest.raises(ValueError, match="goes with quantization nf4, not with int8"):
        ModelConfig(quantization="int8", quantize_convolutions=True)


def test_text_encoders_can_stay_in_full():
    components = load_base(
        ModelConfig(quantization="nf4", quantize_convolutions=True, quantize_text_encoders=False), CPU
    )
    assert set(components.quantization) == {"unet"}
    types = {type(layer) for layer in components.unet.modules()}
    assert Conv2d4bit in types
    assert bnb.nn.Linear4bit in types
    assert bnb.nn.Linear4bit not in {type(layer) for layer in components.text_encoders["text_encoder"].modules()}


@pytest.mark.parametrize(("method", "convolutions"), [("nf4", False), ("nf4", True), ("int8", False)])
def test_bytes_are_foreseen_from_shapes(method, convolutions):
    model = load_base(ModelConfig(), CPU).unet
    foreseen = foresee(model, method, torch.float32, convolutions=convolutions)
    assert quantize(model, method, torch.float32, convolutions=convolutions) == foreseen


@pytest.mark.parametrize(("layout", "limit"), [("sd15", 0.52e9), ("sdxl", 1.55e9)])
def test_with_convolutions_the_real_unets_fit(layout, limit):
    unet = build_layout(layout).unet
    linear, all_layers = (
        foresee(unet, "nf4", torch.bfloat16, convolutions=convolutions) for convolutions in (False, True)
    )
    assert all_layers.bytes_after < limit < linear.bytes_after
    assert linear.bytes_before == 2 * sum(p.numel() for p in unet.parameters())


def test_errors_by_layer_are_those_of_the_code():
    """Gaussian weights give each layer the 0.092 of NF4; the input of every layer is that of the full-precision model."""
    torch.manual_seed(0)
    full = nn.Sequential(nn.Conv2d(8, 64, 3), nn.Flatten(), nn.Linear(64 * 4, 64, bias=False)).requires_grad_(False)
    for layer in (full[0], full[2]):
        nn.init.normal_(layer.weight)
    nn.init.zeros_(full[0].bias)
    model = copy.deepcopy(full)
    quantize(model, "nf4", torch.float32, convolutions=True)
    errors = layer_errors(full, model, lambda m: m(torch.randn(64, 8, 4, 4)))
    assert set(errors) == {"0", "2"}
    assert all(error == pytest.approx(0.092, abs=0.015) for error in errors.values())


def test_errors_of_a_whole_base():
    errors = quantization_errors(ModelConfig(quantization="nf4", quantize_convolutions=True))
    assert set(errors) == {"unet", "text_encoder", "text_encoder_2"}
    values = [error for layers in errors.values() for error in layers.values()]
    assert len(values) == sum(
        len(report.quantized)
        for report in load_base(ModelConfig(quantization="nf4", quantize_convolutions=True), CPU).quantization.values()
    )
    assert 0.02 < sorted(values)[len(values) // 2] < 0.12
