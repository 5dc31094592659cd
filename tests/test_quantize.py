import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from t2ilib.models.quantize import quantize_nf4, weight_bytes

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
    report = quantize_nf4(net, torch.float32)
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
    quantize_nf4(model, torch.float32)
    restored = dequantized(model[0])
    assert restored.shape == truth.shape
    assert float((restored - truth).norm() / truth.norm()) == pytest.approx(0.092, abs=0.01)
    x = torch.randn(4, 512)
    assert torch.allclose(model(x), x @ restored.T, atol=1e-4)


def test_values_lie_on_the_sixteen_levels():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    quantize_nf4(model, torch.float32)
    rows = dequantized(model[0])  # one block of 64 values a row
    assert max(len(row.unique()) for row in rows) <= 16


def test_a_sampling_pass_changes_neither_gradients_nor_weights(net):
    """On CPUs with AVX512_BF16 bitsandbytes repacks a weight in place at the first no-grad pass in eval mode; then gradients
    stop at bias-free layers and dequantizing gives garbage."""
    quantize_nf4(net, torch.float32)
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
    quantize_nf4(net, torch.float32)
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
    quantize_nf4(net, torch.float32)
    layers = [module for module in net.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(layers) == 3
    with torch.no_grad():
        net(torch.randn(2, 128))
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_merging_gives_base_plus_adapter(net):
    """peft merges into a 4-bit base only if the model says that it is one; the result is quantized again."""
    quantize_nf4(net, torch.float32)
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
    report = quantize_nf4(model, torch.float32)
    assert report.quantized == ("0",)
    assert report.kept == ("2",)
    assert type(model[2]) is nn.Linear
    assert torch.equal(model[2].weight, weight)
    assert type(model[3]) is nn.Conv2d


def test_sizes():
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False), nn.Linear(1024, 512, bias=False))
    assert weight_bytes(model) == 4 * (1024 * 1024 + 512 * 1024)
    report = quantize_nf4(model, torch.float32)
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
        ValueError, match=r"Sequential has no linear layer that NF4 can hold: set model\.quantization to none"
    ):
        quantize_nf4(model, torch.float32)
    assert not getattr(model, "is_loaded_in_4bit", False)


def test_half_precision_compute(net):
    x = torch.randn(4, 128)
    expected = net(x)
    quantize_nf4(net.bfloat16(), torch.bfloat16)
    output = net(x.bfloat16())
    assert output.dtype == torch.bfloat16
    assert float((output.float() - expected).norm() / expected.norm()) < 0.3
