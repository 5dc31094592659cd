"""Latents and text encoded once, before training, so that the encoders need not stay in memory nor run every step.

Encoding pictures and text every step adds 25 to 40% to a LoRA step. Latents are the mode of the VAE's posterior: with the
small KL weights of Stable Diffusion's VAEs its standard deviation is far below the noise that training adds.
Leaves out: random crops and flips, which would need the VAE in every step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from t2ilib.data.manifest import Dataset
from t2ilib.data.pictures import load_picture
from t2ilib.memory import pictures_at_once
from t2ilib.models.components import Components
from t2ilib.models.families import time_ids

PICTURES_AT_ONCE = 16
CAPTIONS_AT_ONCE = 64


@dataclass
class EncodedDataset:
    """`latents`: (N, C, H/8, W/8), scaled. `time_ids`: (N, 6). `text`: conditioning of each distinct caption, "" included,
    with `caption_index` (N,) into it; None while text encoders are trained."""

    captions: list[str]
    latents: Tensor
    time_ids: Tensor
    caption_index: list[int]
    text: dict[str, Tensor] | None

    def __len__(self) -> int:
        return len(self.captions)

    def batch(self, ids: Sequence[int], dropped: Sequence[bool], device: torch.device) -> dict[str, Tensor | list[str]]:
        """`latents`, `time_ids` and either `captions` or their conditioning; a dropped caption becomes ""."""
        ids = list(ids)
        batch = {"latents": self.latents[ids].to(device), "time_ids": self.time_ids[ids].to(device)}
        if self.text is None:
            batch["captions"] = ["" if drop else self.captions[i] for i, drop in zip(ids, dropped, strict=True)]
        else:
            rows = [0 if drop else self.caption_index[i] for i, drop in zip(ids, dropped, strict=True)]
            batch |= {name: values[rows].to(device) for name, values in self.text.items()}
        return batch


def load_pixels(dataset: Dataset, resolution: int) -> Tensor:
    """All pictures as (N, 3, H, W) uint8."""
    pixels = [load_picture(record.path, resolution, dataset.ground).pixels for record in dataset.records]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def encode_dataset(
    components: Components, dataset: Dataset, resolution: int, with_text: bool, batch_size: int = PICTURES_AT_ONCE
) -> EncodedDataset:
    """Encodes every picture, and, `with_text`, every distinct caption, on the components' device; results stay on the CPU."""
    batch_size = pictures_at_once(resolution, batch_size)
    latents, ids = [], []
    for start in range(0, len(dataset), batch_size):
        some = dataset.records[start : start + batch_size]
        pictures = [load_picture(record.path, resolution, dataset.ground) for record in some]
        latents.append(
            components.encode_pictures(torch.from_numpy(np.stack([p.pixels for p in pictures])).permute(0, 3, 1, 2))
        )
        ids += [time_ids(p.original, p.crop, (resolution, resolution)) for p in pictures]
    captions = dataset.captions()
    distinct = list(dict.fromkeys(["", *captions]))
    text = encode_captions(components, distinct, CAPTIONS_AT_ONCE) if with_text else None
    where = {caption: index for index, caption in enumerate(distinct)}
    return EncodedDataset(captions, torch.cat(latents), torch.stack(ids), [where[c] for c in captions], text)


@torch.no_grad()
def encode_captions(components: Components, captions: list[str], batch_size: int) -> dict[str, Tensor]:
    parts = [
        components.encode_text(captions[start : start + batch_size]) for start in range(0, len(captions), batch_size)
    ]
    return {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}
