"""A frozen base in few bits, through bitsandbytes: NF4 with double quantization (QLoRA, arXiv 2305.14314) and int8 (arXiv 2208.07339).

diffusers' own quantization config refuses machines without a GPU, so layers are swapped here, by one function for CPU and
CUDA. Linear layers become bitsandbytes'. It has none for convolutions, which are 69% of the weights of SD1.5's UNet and 13%
of SDXL's, so where they are asked for, `Conv2d4bit` keeps them in NF4. What is not a matrix (norms, embeddings), what does
not divide into blocks and what the skip list names keep their precision and are listed.

The trap this module exists for: on CPUs with AVX512_BF16, `Linear4bit` repacks its weight in place at the first no-grad
pass in eval mode; from then on gradients stop at the layer and dequantizing gives garbage. The repacking is turned off
on every layer before its first forward pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from t2ilib.config import ConfigError, check_choice

BLOCK_SIZE = 64
"""Weights that share one scale in NF4."""
NESTED_BLOCK_SIZE = 256
"""Scales that share one scale of their own: double quantization (arXiv 2305.14314, section 3)."""


@dataclass(frozen=True)
class QuantizationReport:
    """What became of one model. Sizes in bytes of weights, quantization state included."""

    quantized: tuple[str, ...]
    kept: tuple[str, ...]
    bytes_before: int
    bytes_after: int


class Conv2d4bit(nn.Conv2d):
    """A frozen convolution whose weight is kept in NF4 and dequantized where it is used.

    `weight` gives it dequantized, (out, in / groups, kh, kw) in the compute dtype, so peft's convolution adapters attach, DoRA
    included. Nothing can be merged into it: the tensor is a copy. The backward pass dequantizes again instead of keeping the
    forward's copy, or training would hold every convolution of the model in full.
    """

    def __new__(cls, *args, **kwargs) -> nn.Conv2d:
        """peft makes an adapter's own convolutions by calling the class of the base layer: those must be plain ones."""
        return nn.Conv2d(*args, **kwargs) if args else super().__new__(cls)

    def __init__(self):
        nn.Module.__init__(self)  # not nn.Conv2d's, which would draw a weight

    @classmethod
    def of(cls, layer: nn.Conv2d, compute_dtype: torch.dtype, codes: nn.Parameter | None = None) -> "Conv2d4bit":
        """The quantized twin of `layer`, which must have whole blocks of weights. `codes`: where they are there already."""
        twin = cls()
        for name in (*nn.Conv2d.__constants__, "_reversed_padding_repeated_twice"):
            setattr(twin, name, getattr(layer, name))
        twin.shape, twin.compute_dtype = layer.weight.shape, compute_dtype
        if codes is None:
            codes = params_4bit(layer.weight.data.view(-1, BLOCK_SIZE))  # bitsandbytes' fast CPU kernel wants even rows
        twin.codes = codes
        bias = None if layer.bias is None else nn.Parameter(layer.bias.data, requires_grad=False)
        twin.register_parameter("bias", bias)
        return twin

    @property
    def weight(self) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.codes.data, self.codes.quant_state).view(self.shape).to(self.compute_dtype)

    def forward(self, input: Tensor) -> Tensor:
        return FrozenConvolution.apply(input, self)


class FrozenConvolution(torch.autograd.Function):
    """A convolution without gradients for its weight, which is asked of the layer in both passes."""

    @staticmethod
    def forward(ctx, input: Tensor, layer: Conv2d4bit) -> Tensor:
        ctx.layer, ctx.shape, ctx.dtype = layer, input.shape, input.dtype
        weight = layer.weight if torch.is_autocast_enabled(input.device.type) else layer.weight.to(input.dtype)
        bias = None if layer.bias is None else layer.bias.to(weight.dtype)
        return layer._conv_forward(input, weight, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        layer = ctx.layer
        weight = layer.weight.to(gradient.dtype)
        conv = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return torch.nn.grad.conv2d_input(ctx.shape, weight, gradient, *conv).to(ctx.dtype), None


def params_4bit(weight: Tensor, module: nn.Module | None = None):
    import bitsandbytes as bnb

    return bnb.nn.Params4bit(
        weight.to("cpu").contiguous(), requires_grad=False, compress_statistics=True, quant_type="nf4", module=module
    )


def linear_nf4(layer: nn.Linear, compute_dtype: torch.dtype) -> nn.Module:
    import bitsandbytes as bnb

    swapped = bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=compute_dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    swapped.weight = params_4bit(layer.weight.data, swapped)
    if layer.bias is not None:
        swapped.bias = nn.Parameter(layer.bias.data, requires_grad=False)
    swapped.support_avx512bf16_for_cpu = False
    return swapped


def linear_int8(layer: nn.Linear, compute_dtype: torch.dtype) -> nn.Module:
    """Rows scaled to int8; input features beyond 6 are multiplied in full precision (LLM.int8(), arXiv 2208.07339)."""
    import bitsandbytes as bnb

    swapped = bnb.nn.Linear8bitLt(
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        has_fp16_weights=False,
        threshold=6.0,
        device="meta",
    )
    swapped.weight = bnb.nn.Int8Params(
        layer.weight.data.to("cpu").contiguous(), requires_grad=False, has_fp16_weights=False
    )
    if layer.bias is not None:
        swapped.bias = nn.Parameter(layer.bias.data, requires_grad=False)
    swapped.register_forward_pre_hook(keep_scales)
    swapped.register_forward_pre_hook(keep_bias)
    swapped.register_forward_hook(restore_bias)
    return swapped


def keep_scales(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """bitsandbytes moves the scales from the weight to the layer's state at the first pass; peft's DoRA then makes a new weight
    in every pass on a CPU, which has none, and the layer would take that for its state."""
    if layer.weight.SCB is None:
        layer.weight.SCB = layer.state.SCB


def keep_bias(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """bitsandbytes rounds the bias in place to the precision of every input: a float32 one for good where autocast is in half."""
    layer.exact_bias = None if layer.bias is None else layer.bias.data


def restore_bias(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    if layer.exact_bias is not None:
        layer.bias.data, layer.exact_bias = layer.exact_bias, None


METHODS: dict[str, dict[type[nn.Module], Callable[[nn.Module, torch.dtype], nn.Module]]] = {
    "nf4": {nn.Linear: linear_nf4, nn.Conv2d: Conv2d4bit.of},
    "int8": {nn.Linear: linear_int8},
}
"""Method -> layer type -> what takes its place."""


def select_layers(
    model: nn.Module, method: str, convolutions: bool = False, skip: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """Names of the layers that would be quantized, and of those of the same types that would be kept.

    `skip`: module names or endings of them. Needs shapes only, so the meta device will do. Raises ConfigError for a method
    that does not exist.
    """
    types = METHODS[check_choice(method, METHODS, "model.quantization")]
    wanted = tuple(kind for kind in types if kind is nn.Linear or convolutions)
    layers = {name: layer for name, layer in model.named_modules() if type(layer) in wanted}
    quantized, kept = [], []
    for name, layer in layers.items():
        # bitsandbytes' matrix kernels want whole blocks in a row, a convolution is only ever dequantized
        blocked = layer.in_features if type(layer) is nn.Linear else layer.weight.numel()
        named = any(name == ending or name.endswith("." + ending) for ending in skip)
        padded = getattr(layer, "padding_mode", "zeros") != "zeros"  # its gradient is not conv2d_input's
        (kept if named or padded or blocked % BLOCK_SIZE else quantized).append(name)
    return quantized, kept


def move(model: nn.Module, device: torch.device | str) -> None:
    """`model.to(device)`, with the codes and scales of int8 layers, which have a second name: beside the weight until the first pass,
    afterwards in the layer's state. What has that name is not moved along with the weight, or is moved as a copy of its own."""
    model.to(device)
    for layer in model.modules():
        weight = layer._parameters.get("weight")
        if type(weight).__name__ == "Int8Params":
            layer.to(device)
            if layer.state.CB is not None:
                weight.data, weight.SCB = layer.state.CB, layer.state.SCB
            elif weight.CB is not None:
                weight.CB, weight.SCB = weight.data, weight.SCB.to(device)


def has_layer(model: nn.Module, ending: str) -> bool:
    """Whether a linear or convolution layer has this name, or one that ends so."""
    layers = (name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d))
    return any(name == ending or name.endswith("." + ending) for name in layers)


def quantize(
    model: nn.Module,
    method: str,
    compute_dtype: torch.dtype,
    device: torch.device | str = "cpu",
    convolutions: bool = False,
    skip: Sequence[str] = (),
) -> QuantizationReport:
    """Swaps layers of `model` for quantized ones on `device`, in place, one at a time, so nothing is held twice.

    Raises ConfigError where no layer could be quantized. Biases stay as they are. peft is told through `is_loaded_in_4bit` or
    `is_loaded_in_8bit` that it must use its bitsandbytes layers: without it training seems to work and merging fails.
    """
    before = weight_bytes(model)
    quantized, kept = select_layers(model, method, convolutions, skip)
    if not quantized:
        raise ConfigError(f"{type(model).__name__} has no layer that {method} can hold: set model.quantization to none")
    for name in quantized:
        layer = model.get_submodule(name)
        swapped = METHODS[method][type(layer)](layer, compute_dtype)
        model.set_submodule(name, swapped.requires_grad_(False).train(layer.training).to(device))
    setattr(model, {"nf4": "is_loaded_in_4bit", "int8": "is_loaded_in_8bit"}[method], True)
    return QuantizationReport(tuple(quantized), tuple(kept), before, weight_bytes(model))


def foresee(
    model: nn.Module,
    method: str,
    compute_dtype: torch.dtype,
    device: torch.device | str = "meta",
    convolutions: bool = False,
    skip: Sequence[str] = (),
) -> QuantizationReport:
    """What `quantize` would report of a model kept in `compute_dtype`, from shapes alone: for layouts on the meta device.

    `device` is there to be called as `quantize` is.
    """
    quantized, kept = select_layers(model, method, convolutions, skip)
    values = [*model.parameters(), *model.buffers()]
    before = sum(v.numel() * (compute_dtype.itemsize if v.is_floating_point() else v.element_size()) for v in values)
    weights = [model.get_submodule(name).weight for name in quantized]
    saved = sum(weight.numel() * compute_dtype.itemsize - quantized_bytes(method, weight.shape) for weight in weights)
    return QuantizationReport(tuple(quantized), tuple(kept), before, before - saved)


def quantized_bytes(method: str, shape: torch.Size) -> int:
    """Bytes of one weight as bitsandbytes stores it: codes and scales, and for NF4 the two code tables that it keeps a layer.

    NF4: 4 bits a weight, 8 bits a block, 32 bits a block of blocks (arXiv 2305.14314, section 3).
    """
    count = shape.numel()
    if method == "int8":
        return count + 4 * shape[0]
    blocks = -(-count // BLOCK_SIZE)
    tables = 4 * (16 + 256)
    return -(-count // 2) + blocks + 4 * -(-blocks // NESTED_BLOCK_SIZE) + tables


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, with the quantization state of 4-bit and 8-bit weights."""
    total = 0
    for parameter in (*model.parameters(), *model.buffers()):
        total += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            nested = (state.state2.absmax, state.state2.code) if state.nested else ()
            total += sum(t.numel() * t.element_size() for t in (state.absmax, state.code, *nested))
    for module in model.modules():
        if type(module._parameters.get("weight")).__name__ == "Int8Params":
            scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
            total += scales.numel() * scales.element_size()
    return total


@torch.no_grad()
def layer_errors(full: nn.Module, quantized: nn.Module, call: Callable[[nn.Module], object]) -> dict[str, float]:
    """Relative error of every quantized layer's output, ||q(x) - f(x)|| / ||f(x)||, on the inputs x that it has in `full`.

    `full`: the same model in full precision; `call(full)` runs it once. A layer that is never run is missing.
    """
    pairs = {
        name: (layer, quantized.get_submodule(name))
        for name, layer in full.named_modules()
        if type(layer) in (nn.Linear, nn.Conv2d) and type(quantized.get_submodule(name)) is not type(layer)
    }
    sums = {name: [0.0, 0.0] for name in pairs}

    def compare(name: str):
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            difference = pairs[name][1](inputs[0]) - output
            sums[name][0] += float(difference.float().square().sum())
            sums[name][1] += float(output.float().square().sum())

        return hook

    handles = [layer.register_forward_hook(compare(name)) for name, (layer, _) in pairs.items()]
    try:
        call(full)
    finally:
        for handle in handles:
            handle.remove()
    return {name: (error / total) ** 0.5 for name, (error, total) in sums.items() if total}
