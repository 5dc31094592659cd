"""The base of a model that has adapters, alone: its adapters switched off, and nothing copied."""

import contextlib
from collections.abc import Iterator

from t2ilib.models.components import Components


@contextlib.contextmanager
def adapters_off(components: Components) -> Iterator[None]:
    """No adapter acts for as long as the scope lasts; then all is as it was, down to what is trained."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [
        layer
        for module in components.modules().values()
        for layer in module.modules()
        if isinstance(layer, BaseTunerLayer) and not layer.disable_adapters
    ]
    trained = [parameter for layer in layers for parameter in layer.parameters() if parameter.requires_grad]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
            layer.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
