"""NF4 layers without weights: what `quantize_nf4` makes of a model, on the meta device, where nothing can be quantized.

For planning alone. What is stored beside the codes, and what a pass allocates, is bitsandbytes' own doing.
"""

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from t2ilib.models.quantize import BLOCK_SIZE


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


def hold_nf4(model: nn.Module, compute_dtype: torch.dtype) -> None:
    """What `quantize_nf4` does, on the meta device: swaps every linear layer that NF4 can hold."""
    with torch.device("cpu"):  # a table that bitsandbytes computes once for the whole process, from real numbers
        bnb.functional.name2qmap.setdefault("dynamic", bnb.functional.create_dynamic_map())
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and layer.in_features % BLOCK_SIZE == 0:
            model.set_submodule(name, FourBitLinear(layer, compute_dtype))
    model.is_loaded_in_4bit = True
