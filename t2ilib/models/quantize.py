"""A frozen base in 4 bits: NF4 with double quantization (QLoRA, arXiv 2305.14314), through bitsandbytes.

diffusers' own quantization config refuses machines without a GPU, so the linear layers are swapped here, by one function
for CPU and CUDA. What bitsandbytes has no layer for (convolutions) and what is not frozen weight (norms, embeddings) keeps
its precision; layers whose input width is not a multiple of the block size are kept too and listed.

The trap this module exists for: on CPUs with AVX512_BF16, `Linear4bit` repacks its weight in place at the first no-grad
pass in eval mode; from then on gradients stop at the layer and dequantizing gives garbage. The repacking is turned off
on every layer before its first forward pass.
"""

from dataclasses import dataclass

import torch
from torch import nn

BLOCK_SIZE = 64


@dataclass(frozen=True)
class QuantizationReport:
    """What became of one model. Sizes in bytes of weights, quantization state included."""

    quantized: tuple[str, ...]
    kept: tuple[str, ...]
    bytes_before: int
    bytes_after: int


def quantize_nf4(
    model: nn.Module, compute_dtype: torch.dtype, device: torch.device | str = "cpu"
) -> QuantizationReport:
    """Swaps every `nn.Linear` in `model` for an NF4 `Linear4bit` on `device`, in place, one layer at a time.

    Raises ValueError where no layer could be quantized. Biases stay as they are. peft is told through
    `is_loaded_in_4bit` that it must use its bitsandbytes layers: without it training seems to work and merging fails.
    """
    import bitsandbytes as bnb

    before = weight_bytes(model)
    quantized, kept = [], []
    for name, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear:
            continue
        if layer.in_features % BLOCK_SIZE:
            kept.append(name)
            continue
        swapped = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=compute_dtype,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        swapped.weight = bnb.nn.Params4bit(
            layer.weight.data.to("cpu").contiguous(),
            requires_grad=False,
            compress_statistics=True,
            quant_type="nf4",
            module=swapped,
        )
        if layer.bias is not None:
            swapped.bias = nn.Parameter(layer.bias.data, requires_grad=False)
        swapped.support_avx512bf16_for_cpu = False
        model.set_submodule(name, swapped.to(device))
        quantized.append(name)
    if not quantized:
        raise ValueError(
            f"{type(model).__name__} has no linear layer that NF4 can hold: set model.quantization to none"
        )
    model.is_loaded_in_4bit = True
    return QuantizationReport(tuple(quantized), tuple(kept), before, weight_bytes(model))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, with the quantization state of 4-bit weights."""
    total = 0
    for parameter in (*model.parameters(), *model.buffers()):
        total += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            total += sum(t.numel() * t.element_size() for t in state.as_dict(packed=True).values())
    return total
