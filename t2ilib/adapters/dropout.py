"""Dropout inside an adapter: three kinds, all of which have the undropped update as their expectation and do nothing in eval mode.

With A (r x in) and B (out x r), the update of an input x is B A x, and p the probability of zeroing:

- input: B A (m * x), m one draw an element of x (arXiv 2106.09685). peft has it as `lora_dropout`.
- rank: B (m * A x), m one draw an element of A x. kohya's sd-scripts have it as `network_dropout`.
- rows_columns: diag(n) B A diag(m), m and n one draw a column of A and a row of B, the same for the whole batch: the update
  itself is sparse, with a share of (1 - p)^2 left (LoRA Dropout, arXiv 2404.09610, who do not rescale; here what is left is
  divided by that share, so that training and drawing agree in expectation, as with the others). Leaves out their ensemble
  at test time.

The draws come from torch's generator, which the loop seeds anew in every step.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def channels_mask(x: Tensor, features: int, share: float) -> Tensor:
    """A draw a feature, scaled to mean 1, shaped to multiply `x`: (..., features), or (B, features, h, w) of a convolution."""
    kept = torch.rand(features, device=x.device) >= share
    mask = kept.to(x.dtype) / (1 - share)
    return mask.view(1, -1, 1, 1) if x.ndim == 4 else mask


def drop_rank(model: nn.Module, adapter: str, share: float) -> None:
    """Puts `rank` dropout behind every A of the adapters in `model`."""
    for layer in adapted_layers(model, adapter):
        layer.lora_A[adapter].register_forward_hook(lambda a, inputs, out: F.dropout(out, share, a.training))


def drop_rows_and_columns(model: nn.Module, adapter: str, share: float) -> None:
    """Puts `rows_columns` dropout around every pair of A and B in `model`: on a feature of the input is on a column of A."""

    def drop_columns(a: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        return (inputs[0] * channels_mask(inputs[0], a.weight.shape[1], share),) if a.training else None

    def drop_rows(b: nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor:
        return out * channels_mask(out, b.weight.shape[0], share) if b.training else out

    for layer in adapted_layers(model, adapter):
        layer.lora_A[adapter].register_forward_pre_hook(drop_columns)
        layer.lora_B[adapter].register_forward_hook(drop_rows)


def adapted_layers(model: nn.Module, adapter: str) -> list[nn.Module]:
    return [module for module in model.modules() if adapter in getattr(module, "lora_A", {})]


DROPOUTS = {"rank": drop_rank, "rows_columns": drop_rows_and_columns}
"""Kind -> what installs it; `input` is peft's own."""
