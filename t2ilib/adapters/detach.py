"""Taking adapters and words off a base again, so that it is, bit for bit, what was loaded.

What attaching changes beside the layers that peft wraps is remembered before it (`remember`) and put back (`restore`): tokenizers and token
embeddings, to which words are added, what the pooled output is taken from, and the scheduler, which an adapter may say. Leaves out
initialisations that change the base's own weights (PiSSA, OLoRA, as they are attached to be trained): such a base must be loaded anew.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from t2ilib.adapters.tokens import embedding_of
from t2ilib.config import DrawnBy
from t2ilib.models.components import Components
from t2ilib.models.pipeline import build_pipeline, quiet_libraries


@dataclass(frozen=True)
class Remembered:
    """What words and adapters change of a model beside its layers, as it was."""

    scheduler: Any
    drawn_by: DrawnBy | None
    tokenizers: dict[str, Any]
    words: dict[str, tuple[str, ...]]
    embeddings: dict[str, nn.Module]
    ends: tuple[tuple[nn.Module, int], ...]
    """Modules that look for the end of a text, and by which id."""


def remember(components: Components) -> Remembered:
    encoders = components.text_encoders
    return Remembered(
        components.scheduler,
        components.drawn_by,
        components.tokenizers,
        dict(components.words),
        {name: embedding_of(encoder) for name, encoder in encoders.items()},
        tuple(
            (module, module.eos_token_id)
            for encoder in encoders.values()
            for module in encoder.modules()
            if hasattr(module, "eos_token_id")
        ),
    )


def restore(components: Components, remembered: Remembered) -> None:
    """Puts back what was remembered of these components; layers of adapters stay as they are."""
    components.scheduler, components.drawn_by = remembered.scheduler, remembered.drawn_by
    components.tokenizers, components.words = remembered.tokenizers, dict(remembered.words)
    for name, embedding in remembered.embeddings.items():
        components.text_encoders[name].set_input_embeddings(embedding)
    for module, end in remembered.ends:
        module.eos_token_id = end


def detach_adapters(components: Components, remembered: Remembered) -> None:
    """Takes all adapters and what came with them off; `remembered`: of the time before."""
    with quiet_libraries():
        build_pipeline(components).unload_lora_weights()
    restore(components, remembered)
