"""Adapted layers as one function: the forward and backward pass of base, LoRA and DoRA in the fewest products, beside peft's modules.

peft computes an adapter by calling modules, and autograd the gradients of each: with a LoRA ten operations a layer on top of the
base's own, with a DoRA some thirty, and at small batches an operation costs what its launch costs. Here y = W x + s B A x is two
products on top, and its gradients, with h = A x and g that of y, are four (none is for W):

    dB = s g h^T    dh = s B^T g    dA = dh x^T    dx = W^T g + A^T dh

DoRA scales the rows by c = m / |W + s B A|; the norm is without a gradient (arXiv 2402.09353, equation 5 and section 4.3). peft makes
W + s B A for it in every pass. Row by row its square is |W|^2 + 2 s <W, B A> + s^2 |B A|^2 = |W|^2 + <B, 2 s W A^T + s^2 B A A^T>: the
first term never changes, and the rest is as wide as the rank.

peft attaches, and its layers stay the owners of the parameters and their names: `forward` alone is replaced, and only where one
adapter acts. With several, switched off, merged or with arguments, a layer computes as peft has it (`passes_by_peft` counts).
"""

import contextlib
import functools
import logging
from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from t2ilib.adapters.dropout import adapted_layers, channels_mask
from t2ilib.models.quantize import Conv2d4bit

log = logging.getLogger(__name__)


class Whole:
    """A base whose weight is there as it is."""

    @staticmethod
    def weight(base: nn.Module, like: Tensor) -> Tensor:
        """The weight (out, in), or of a convolution (out, in, kh, kw), as `like` is multiplied with it."""
        weight = base.weight.detach()
        return weight if weight.dtype == like.dtype else weight.to(like.dtype)

    @staticmethod
    def product(base: nn.Module, rows: Tensor, weight: Tensor | None) -> Tensor:
        """W x + bias (N, out) of `rows` (N, in), by `weight` where that is at hand."""
        return F.linear(rows, base.weight if weight is None else weight, base.bias)


class Quantized(Whole):
    """A base that multiplies itself: a convolution in NF4, whose weight is dequantized when it is asked for."""

    @staticmethod
    def product(base: nn.Module, rows: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return base(rows)
        bias = base.bias if base.bias is None else base.bias.to(weight.dtype)
        return F.linear(rows.to(weight.dtype), weight, bias).to(rows.dtype)


class FourBit(Quantized):
    """bitsandbytes' linear layer, which has a dtype of its own to multiply in."""

    @staticmethod
    def weight(base: nn.Module, like: Tensor) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(base.weight.data, base.weight.quant_state).to(base.compute_dtype or like.dtype)


class EightBit(Quantized):
    """bitsandbytes' int8 layer, which on a GPU rounds its input too: it always multiplies itself."""

    @staticmethod
    def weight(base: nn.Module, like: Tensor) -> Tensor:
        scales = base.state.SCB if base.weight.SCB is None else base.weight.SCB
        return base.weight.data.to(like.dtype) * (scales / 127).to(like.dtype)[:, None]

    @staticmethod
    def product(base: nn.Module, rows: Tensor, weight: Tensor | None) -> Tensor:
        return base(rows)


class EightBitForeseen(EightBit):
    """What stands for it where there are no weights (`planning.quantized`)."""

    @staticmethod
    def weight(base: nn.Module, like: Tensor) -> Tensor:
        return base.dequantize().to(like.dtype)


def kept_as(base: nn.Module) -> type[Whole]:
    """How a base keeps its weight."""
    if isinstance(base, Conv2d4bit):
        return Quantized
    eight = EightBitForeseen if hasattr(base, "W_q") else EightBit
    return {torch.uint8: FourBit, torch.int8: eight}.get(base.weight.dtype, Whole)


class FusedLora(torch.autograd.Function):
    """W x + s B A x, x (..., in). `dropped`: x after input dropout, where there is one; `rank_share`: what rank dropout takes of A x;
    `dtype`: that of the adapter's products, autocast's where it is on."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        dropped: Tensor | None,
        a: Tensor,
        b: Tensor,
        layer: "Fused",
        dtype: torch.dtype,
        rank_share: float,
    ) -> Tensor:
        base, scale, shape = layer._modules["base_layer"], layer.scaling[layer.fused], x.shape
        if dtype != a.dtype:  # autocast: once for both
            x, a, b = x.to(dtype), a.to(dtype), b.to(dtype)
        rows = x.reshape(-1, shape[-1])
        inner = rows if dropped is None else dropped.reshape(-1, shape[-1])
        inner = inner if inner.dtype == dtype else inner.to(dtype)
        h, kept = torch.mm(inner, a.t()), None
        if rank_share:
            kept = F.dropout(torch.ones_like(h), rank_share)
            h = h * kept
        out = plus_update(layer.base_kept_as.product(base, rows, None), h, b, scale)
        ctx.save_for_backward(inner, h, kept, a, b)
        ctx.layer, ctx.scale, ctx.shape, ctx.dropped = layer, scale, shape, dropped is not None
        return out.view(*shape[:-1], -1)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        inner, h, kept, a, b = ctx.saved_tensors
        of_x, of_dropped = ctx.needs_input_grad[:2]
        g = g.reshape(-1, g.shape[-1])
        gx = gdropped = None
        if of_x:
            gx = back_base(ctx.layer, g, a.dtype)
        gh, gb = back_up(g, h, b, ctx.scale)
        if kept is not None:
            gh = gh * kept
        if of_dropped:
            gdropped = torch.mm(gh, a).view(ctx.shape)
        elif of_x and not ctx.dropped:
            gx.addmm_(gh, a)
        return gx if gx is None else gx.view(ctx.shape), gdropped, torch.mm(gh.t(), inner), gb, None, None, None


class FusedDora(torch.autograd.Function):
    """c * (W x + s B A x) + bias, c = magnitude / |W + s B A| by row, x (..., in)."""

    @staticmethod
    def forward(ctx, x: Tensor, a: Tensor, b: Tensor, magnitude: Tensor, layer: "Fused", dtype: torch.dtype) -> Tensor:
        base, scale, shape = layer._modules["base_layer"], layer.scaling[layer.fused], x.shape
        if dtype != a.dtype:
            x = x.to(dtype)
        weight = layer.base_kept_as.weight(base, x)
        c = magnitude / row_norms(layer.row_squares, weight, a, b, scale, dtype)
        rows = x.reshape(-1, shape[-1])
        inner, a, b = (t if t.dtype == dtype else t.to(dtype) for t in (rows, a, b))
        h = torch.mm(inner, a.t())
        out = plus_update(layer.base_kept_as.product(base, rows, weight), h, b, scale).mul_(c)
        if base.bias is not None:
            out.add_(base.bias * (1 - c))
        ctx.save_for_backward(inner, h, a, b, magnitude, c, out)
        ctx.layer, ctx.scale, ctx.shape = layer, scale, shape
        return out.view(*shape[:-1], -1)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        """From the output, which whoever reads it keeps anyway: (out - bias) / c is what was scaled."""
        inner, h, a, b, magnitude, c, out = ctx.saved_tensors
        bias, gx = ctx.layer._modules["base_layer"].bias, None
        g = g.reshape(-1, g.shape[-1]) * c  # in the magnitude's precision, in which it is summed up
        gm = ((out if bias is None else out - bias) * g).sum(0).div_(magnitude * c)
        g = g if g.dtype == out.dtype else g.to(out.dtype)
        gh, gb = back_up(g, h, b, ctx.scale)
        if ctx.needs_input_grad[0]:
            gx = back_base(ctx.layer, g, a.dtype).addmm_(gh, a).view(ctx.shape)
        return gx, torch.mm(gh.t(), inner), gb, gm, None, None


def plus_update(out: Tensor, h: Tensor, b: Tensor, scale: float) -> Tensor:
    """`out` + s B h, in place where both have one precision; in the higher one and back to that of `out` where they have not."""
    if out.dtype == h.dtype:
        return out.addmm_(h, b.t(), alpha=scale)
    wide = torch.promote_types(out.dtype, h.dtype)
    return torch.addmm(out.to(wide), h.to(wide), b.to(wide).t(), alpha=scale).to(out.dtype)


def back_up(g: Tensor, h: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Gradients of h and B. With a beta of 0 the first argument gives nothing but its shape."""
    g = g if g.dtype == b.dtype else g.to(b.dtype)
    return torch.addmm(h, g, b, beta=0, alpha=scale), torch.addmm(b, g.t(), h, beta=0, alpha=scale)


def back_base(layer: "Fused", g: Tensor, dtype: torch.dtype) -> Tensor:
    """W^T g, in `dtype`; a quantized weight is dequantized again, not kept from the forward pass."""
    weight = layer.base_kept_as.weight(layer._modules["base_layer"], g)
    gx = torch.mm(g if g.dtype == weight.dtype else g.to(weight.dtype), weight)
    return gx if gx.dtype == dtype else gx.to(dtype)


@torch.no_grad()
def row_norms(squares: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """|W + s B A| by row (out,), from the rows' squares |W|^2 (out, 1, 1) and products as wide as the rank, in the precision of `a` and
    `b`; W A^T alone is taken in `dtype`."""
    if weight.ndim == 4:
        if weight.is_contiguous(memory_format=torch.channels_last):
            weight, a = weight.permute(0, 2, 3, 1), a.permute(0, 2, 3, 1)
        weight, a, b = weight.flatten(1), a.flatten(1), b.flatten(1)
    with torch.autocast(a.device.type, enabled=False) if dtype != a.dtype else contextlib.nullcontext():
        across = torch.mm(weight.to(dtype), a.to(dtype).t()).to(b.dtype)
        across = torch.addmm(across, b, torch.mm(a, a.t()), beta=2 * scale, alpha=scale * scale)
        return torch.baddbmm(squares, b.unsqueeze(1), across.unsqueeze(2)).view(-1).sqrt_()


class Fused(nn.Module):
    """Mixed into a peft layer by `fuse_adapters`. `fused`: the adapter that it computes."""

    fused: str
    base_kept_as: type[Whole]
    rank_share: float
    rows_share: float
    passes_by_peft: int

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        compiling, adapter, modules = torch.compiler.is_compiling(), self.fused, self._modules
        alone = self.active_adapters == [adapter] and not self.disable_adapters and not self.merged_adapters
        if args or kwargs or not alone or (compiling and issubclass(self.base_kept_as, EightBit)):
            if not compiling:  # which int8 layers cannot be inside a function: they note down what they see
                self.passes_by_peft += 1
            return super().forward(x, *args, **kwargs)
        a, b = modules["lora_A"]._modules[adapter].weight, modules["lora_B"]._modules[adapter].weight
        device, drop, dropped = x.device.type, modules["lora_dropout"]._modules[adapter], None
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else a.dtype
        rank_share = 0.0
        if self.training:
            rank_share, dropped = self.rank_share, drop(x) if isinstance(drop, nn.Dropout) else None
            if self.rows_share:  # a feature of the input is on a column of A, one of the output on a row of B
                a = a * channels_mask(a, a.shape[1], self.rows_share)
                b = b * channels_mask(b, b.shape[0], self.rows_share).view(-1, *[1] * (b.ndim - 1))
        magnitude = modules["lora_magnitude_vector"]._modules.get(adapter)
        if magnitude is not None:
            return self.with_magnitude(x, dropped, a, b, magnitude.weight, dtype)
        if a.ndim == 2:
            return FusedLora.apply(x, dropped, a, b, self, dtype, rank_share)
        out = self.base_layer(x)
        return torch.add(out, self.convolved(x if dropped is None else dropped, a, b, dtype, rank_share)).to(out.dtype)

    def with_magnitude(
        self, x: Tensor, dropped: Tensor | None, a: Tensor, b: Tensor, magnitude: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """What dropout takes away from the input of what is scaled, the base sees all the same, as in peft."""
        if dropped is not None:
            rest, bias = self.base_layer(x - dropped), self.base_layer.bias
            rest = rest if bias is None else rest - (bias if a.ndim == 2 else bias.view(-1, 1, 1))
            return rest + self.with_magnitude(dropped, None, a, b, magnitude, dtype)
        if a.ndim == 2:
            return FusedDora.apply(x, a, b, magnitude, self, dtype)
        base, scale = self.base_layer, self.scaling[self.fused]
        weight = self.base_kept_as.weight(base, x)
        c = magnitude.view(-1, 1, 1) / row_norms(self.row_squares, weight, a, b, scale, dtype).view(-1, 1, 1)
        out = base(x)
        scaled = torch.add(out, self.convolved(x, a, b, dtype, 0.0)) * c
        return (scaled if base.bias is None else scaled + base.bias.view(-1, 1, 1) * (1 - c)).to(out.dtype)

    def convolved(self, x: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, rank_share: float) -> Tensor:
        """s B A x of a convolution. Convolutions' gradients are what they are: autograd does as well, with nothing in between."""
        base = self.base_layer
        h = F.conv2d(x.to(dtype), a, None, base.stride, base.padding)
        return F.conv2d(F.dropout(h, rank_share) if rank_share else h, b * self.scaling[self.fused])


@functools.cache
def fused_class(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Fused{kind.__name__}", (Fused, kind), {})


def fuse_adapters(
    model: nn.Module, dropout_kind: str = "input", dropout: float = 0.0, adapter: str = "default"
) -> Counter[str]:
    """Has the layers of `model` with this adapter compute themselves as one function; returns why others were left as they are, and
    how many. `dropout_kind` and `dropout`: what `DROPOUTS` was told; dropout of the input is peft's own, and seen."""
    left = Counter[str]()
    for layer in adapted_layers(model, adapter):
        if reason := unfit(layer, adapter):
            left[reason] += 1
            continue
        if not isinstance(layer, Fused):
            layer.__class__ = fused_class(type(layer))
        layer.fused, layer.passes_by_peft = adapter, 0
        layer.base_kept_as = kept_as(layer.base_layer)
        layer.rank_share = dropout if dropout_kind == "rank" else 0.0
        layer.rows_share = dropout if dropout_kind == "rows_columns" else 0.0
        if adapter in layer.lora_magnitude_vector:
            a = layer.lora_A[adapter].weight
            weight = layer.base_kept_as.weight(layer.base_layer, a).to(a.dtype)
            layer.register_buffer("row_squares", weight.flatten(1).square().sum(1)[:, None, None], persistent=False)
    for reason, count in left.items():
        log.info("%d adapted layers are computed by peft's modules: %s", count, reason)
    return left


def unfit(layer: nn.Module, adapter: str) -> str:
    """Why a layer cannot be computed by the functions here; "" where it can."""
    from peft.tuners import lora

    base, variant = layer.base_layer, layer.lora_variant.get(adapter)
    names = {"Linear", "Conv2d", "Linear4bit", "Linear8bitLt"}
    kinds = tuple(getattr(lora, name) for name in sorted(names) if hasattr(lora, name))
    if not isinstance(layer, kinds):
        return f"{type(layer).__name__} is none of {', '.join(sorted(names))}"
    if variant is not None and not type(variant).__name__.startswith("Dora"):
        return f"{type(variant).__name__} is neither LoRA nor DoRA"
    if layer.lora_bias[adapter]:
        return "its B has a bias"
    if isinstance(base, nn.Conv2d) and (base.groups, base.dilation, base.padding_mode) != (1, (1, 1), "zeros"):
        return "it is a convolution with groups, dilation or another padding than zeros"
    if isinstance(base, nn.Conv2d) and isinstance(base.padding, str):
        return f"its padding is {base.padding!r}"
    return ""
