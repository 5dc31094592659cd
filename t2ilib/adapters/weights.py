"""An adapter as plain data: A, B, alpha and magnitude of every layer, whatever it was trained as. All file formats start here.

Whatever the training used comes out as alpha / rank times B A: rsLoRA's other scale is folded into alpha, and where the
base itself was changed at the start (PiSSA, OLoRA: W - s B0 A0), what was taken out of it becomes part of an adapter of twice
the rank, s (B A - B0 A0), which fits the untouched base.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from t2ilib.models.components import Components


@dataclass(frozen=True)
class AdapterLayer:
    """One adapted layer. `down`: A, (r, in) or (r, in / groups, kh, kw); `up`: B, (out, r) or (out, r, 1, 1); `magnitude` of DoRA:
    (out,) or (1, out, 1, 1). On the host, float32."""

    component: str
    module: str
    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.down)

    def update(self) -> Tensor:
        """alpha / rank times B A, in the shape of the layer's weight; of DoRA the part that is added before it is rescaled."""
        product = self.up.flatten(1) @ self.down.flatten(1)
        return self.alpha / self.rank * product.view(len(self.up), *self.down.shape[1:])


@dataclass(frozen=True)
class WeightDifference:
    """What one layer's weight is changed by, W' - W, computed when it is written: those of all layers are as large as a model."""

    component: str
    module: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    compute: Callable[[], Tensor]


def base_weight(components: Components, component: str, module: str) -> Tensor:
    """W of one layer under whatever is attached to it, in float32, where it lies: that of a quantized layer as it multiplies."""
    from peft.utils.integrations import dequantize_module_weight

    layer = components.modules()[component].get_submodule(module)
    return dequantize_module_weight(getattr(layer, "base_layer", layer)).detach().float()


def read_layers(
    components: Components, start: Mapping[str, Tensor] | None = None, name: str = "default"
) -> list[AdapterLayer]:
    """Every layer of the attached adapter `name`. `start`: A and B as they were attached (`component.parameter` -> tensor), for
    an adapter whose base gave them up."""
    layers = []
    for component, model in components.modules().items():
        for module, layer in model.named_modules():
            if name not in getattr(layer, "lora_A", {}):
                continue
            down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
            if start is not None:
                first = f"{component}.{module}.lora_{{}}.{name}.weight"
                down = torch.cat([down, start[first.format("A")].to(down)])
                up = torch.cat([up, -start[first.format("B")].to(up)], dim=1)
            magnitude = None
            if getattr(layer, "lora_magnitude_vector", None) and name in layer.lora_magnitude_vector:
                magnitude = to_host(layer.lora_magnitude_vector[name].weight)
            alpha = float(layer.scaling[name]) * len(down)
            layers.append(AdapterLayer(component, module, to_host(down), to_host(up), alpha, magnitude))
    return layers


def to_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32).contiguous()


def adapted(model: nn.Module, name: str = "default") -> bool:
    """Whether adapter `name` is attached to `model`."""
    return name in getattr(model, "peft_config", {})
