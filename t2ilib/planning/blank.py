"""Data of no pictures and words in particular, which a trace encodes and trains on as a run does its own; and what that costs.

What is kept of it on disk, and how many operations it takes, is counted on the way.
"""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from t2ilib.config import RunConfig
from t2ilib.data.cache import CAPTIONS_AT_ONCE, EncodedDataset, FreshText, View
from t2ilib.models.components import Components
from t2ilib.training.methods import METHODS
from t2ilib.training.setups import trains_text


class BlankTokenizer:
    """Token ids (B, T) of the length that a CLIP text encoder takes, and of no words."""

    def __init__(self, encoder: nn.Module):
        self.model_max_length, self.eos_token_id = encoder.config.max_position_embeddings, encoder.config.eos_token_id
        self.size = encoder.config.vocab_size

    def __call__(self, captions: list[str], **options) -> SimpleNamespace:
        return SimpleNamespace(input_ids=torch.zeros(len(captions), self.model_max_length, dtype=torch.long))

    def get_vocab(self) -> dict[str, int]:
        return {}

    def encode(self, text: str, **options) -> list[int]:
        return [0]

    def add_tokens(self, tokens: Sequence[str]) -> None:
        pass

    def convert_tokens_to_ids(self, token: str) -> int:
        """Of the first of new words."""
        return self.size


def counting_flops() -> FlopCounterMode:
    """torch's counter, which knows attention on a GPU and not the kernel that stands for it here."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(
        display=False, custom_mapping={attention: lambda q, k, v, *rest, **named: sdpa_flop_count(q, k, v)}
    )


class BlankSamples:
    """Samples of no pictures in particular, as many as any batch needs."""

    buckets, dataset = None, SimpleNamespace(num_class=0)
    count = 4096

    def __init__(self, run: RunConfig):
        self.run, self.has_pairs = run, METHODS[run.objective.method].of_pairs

    def __len__(self) -> int:
        return self.count

    def number(self, i: int, step: int) -> int:
        return 0

    def caption(self, i: int, number: int, step: int) -> str:
        return "a caption"

    def micro_conditioning(
        self, i: int, number: int, rejected: bool = False
    ) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        side = (self.run.data.resolution,) * 2
        return side, (0, 0), side

    def weights(self, ids: Sequence[int], of_parts: tuple[float, float]) -> list[float]:
        return [1.0] * len(ids)


class BlankLatents:
    """Of a black picture; kept, or encoded for every view as `cache.Fresh` does."""

    def __init__(self, run: RunConfig, components: Components):
        self.components, side = components, run.data.resolution
        self.sides = ("latents", "rejected") if METHODS[run.objective.method].of_pairs else ("latents",)
        self.pixels = torch.zeros(1, 3, side, side, dtype=torch.uint8)
        self.held, self.flops = dict[str, Tensor](), 0.0
        if run.data.cache != "off":
            with components.awake("vae"), counting_flops() as counter:
                self.held = {name: components.encode_pictures(self.pixels) for name in self.sides}
            self.flops = counter.get_total_flops()

    def __call__(self, views: Sequence[View]) -> dict[str, Tensor]:
        if self.held:
            return {name: torch.cat([tensor] * len(views)) for name, tensor in self.held.items()}
        with torch.no_grad():
            return {
                name: torch.cat([self.components.encode_pictures(self.pixels) for _ in views]) for name in self.sides
            }


class BlankText:
    """Of one caption, which is kept."""

    def __init__(self, components: Components):
        with components.awake(*components.text_encoders), counting_flops() as counter:
            encoded = components.encode_text(["a caption"] * CAPTIONS_AT_ONCE)
        self.flops = counter.get_total_flops() / CAPTIONS_AT_ONCE
        self.held = {name: tensor[:1].clone() for name, tensor in encoded.items()}

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        return {name: torch.cat([tensor] * len(captions)) for name, tensor in self.held.items()}


def encode_blank(run: RunConfig, components: Components) -> EncodedDataset:
    """What `setups.encode` does, on no pictures in particular."""
    latents = BlankLatents(run, components)
    text = None
    if not trains_text(run):
        text = BlankText(components) if run.data.cache == "all" else FreshText(components)
    return EncodedDataset(BlankSamples(run), latents, text)


def kept_on_disk(run: RunConfig, encoded: EncodedDataset) -> dict[str, int]:
    """Bytes of a picture's view, at all resolutions of the run together, and of a caption."""
    sizes = {
        name: sum(tensor.numel() * tensor.element_size() for tensor in getattr(part, "held", {}).values())
        for name, part in (("picture", encoded.latents), ("caption", encoded.text))
    }
    sides = (*run.data.stages, run.data.resolution)
    return sizes | {"picture": round(sizes["picture"] * sum(side**2 for side in sides) / run.data.resolution**2)}
