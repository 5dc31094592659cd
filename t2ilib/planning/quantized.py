"""Quantized layers without weights: what `quantize` makes of a model, on the meta device, where nothing can be quantized.

For planning alone. What is stored beside the codes, and what a pass allocates, is bitsandbytes' own doing for NF4; its int8
kernels have no shape-only form, so `EightBitLinear` allocates what they do.
"""

from collections.abc import Sequence

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from t2ilib.models.quantize import BLOCK_SIZE, Conv2d4bit, QuantizationReport, foresee


class FourBitLinear(bnb.nn.Linear4bit):
    """bitsandbytes' layer around a weight that is a plain parameter, because its `Params4bit` cannot be a fake tensor.

    The forward and the backward pass are bitsandbytes' own: the weight is dequantized in both, and saved in none.
    """

    def __init__(self, layer: nn.Linear, compute_dtype: torch.dtype):
        nn.Module.__init__(self)
        codes, state = bnb.functional.quantize_4bit(layer.weight.data, compress_statistics=True, quant_type="nf4")
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = nn.Parameter(codes, requires_grad=False), layer.bias
        self.weight.compress_statistics, self.weight.quant_type = True, "nf4"
        self.compute_dtype, self.compute_type_is_set, self.support_avx512bf16_for_cpu = compute_dtype, True, False
        self.quant_state = self.weight.quant_state = state

    @property
    def W_q(self) -> nn.Parameter:
        """peft asks a layer that has this (HQQ's do) to dequantize itself, instead of asking for the class of its weight."""
        return self.weight

    def dequantize(self) -> Tensor:
        return bnb.functional.dequantize_4bit(self.weight.data, self.quant_state)


class EightBitLinear(bnb.nn.Linear8bitLt):
    """An int8 weight with a float32 scale a row, under the class that peft looks for."""

    def __init__(self, layer: nn.Linear, compute_dtype: torch.dtype):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.index = layer.in_features, layer.out_features, None
        self.weight = nn.Parameter(torch.empty_like(layer.weight, dtype=torch.int8), requires_grad=False)
        self.register_buffer("scales", torch.empty(layer.out_features, device=layer.weight.device))
        self.bias, self.state = layer.bias, bnb.MatmulLtState()
        self.state.has_fp16_weights, self.state.threshold = False, 6.0

    @property
    def W_q(self) -> nn.Parameter:
        return self.weight

    def dequantize(self) -> Tensor:
        return self.weight * self.scales[:, None]

    def forward(self, x: Tensor) -> Tensor:
        return EightBitProduct.apply(x, self)


class EightBitProduct(torch.autograd.Function):
    """The input is rounded to int8 and kept, though nothing but outliers would need it; products are int32 and then rescaled;
    the backward pass dequantizes the weight."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: EightBitLinear) -> Tensor:
        ctx.layer, ctx.kept = layer, x
        rounded = x.to(torch.float16).to(torch.int8)
        products = rounded.new_empty(*x.shape[:-1], layer.out_features, dtype=torch.int32)
        out = products.to(x.dtype)
        return out if layer.bias is None else out + layer.bias.to(out.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return F.linear(gradient, ctx.layer.dequantize().to(gradient.dtype).T), None


def four_bit_convolution(layer: nn.Conv2d, compute_dtype: torch.dtype) -> Conv2d4bit:
    blocks = layer.weight.data.view(-1, BLOCK_SIZE)
    codes, state = bnb.functional.quantize_4bit(blocks, compress_statistics=True, quant_type="nf4")
    parameter = nn.Parameter(codes, requires_grad=False)
    parameter.quant_state = state
    return Conv2d4bit.of(layer, compute_dtype, parameter)


STAND_INS = {
    ("nf4", nn.Linear): FourBitLinear,
    ("nf4", nn.Conv2d): four_bit_convolution,
    ("int8", nn.Linear): EightBitLinear,
}


def hold_quantized(
    model: nn.Module,
    method: str,
    compute_dtype: torch.dtype,
    device: torch.device | str = "meta",
    convolutions: bool = False,
    skip: Sequence[str] = (),
) -> QuantizationReport:
    """What `quantize` does, on the meta device, to the same layers."""
    with torch.device("cpu"):  # a table that bitsandbytes computes once for the whole process, from real numbers
        bnb.functional.name2qmap.setdefault("dynamic", bnb.functional.create_dynamic_map())
    report = foresee(model, method, compute_dtype, device, convolutions, skip)
    for name in report.quantized:
        layer = model.get_submodule(name)
        model.set_submodule(name, STAND_INS[method, type(layer)](layer, compute_dtype))
    setattr(model, {"nf4": "is_loaded_in_4bit", "int8": "is_loaded_in_8bit"}[method], True)
    return report
