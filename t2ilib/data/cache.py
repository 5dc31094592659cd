"""Latents and text, encoded once and kept on disk, or in every step: what a step sees is the same to rounding.

Encoding pictures and text in every step adds 25 to 40% to a LoRA step. Latents are the mode of the VAE's posterior: with the small KL weights of
Stable Diffusion's VAEs its standard deviation is far below the noise that training adds. What is encoded is kept under what it
depends on (the encoder's weights, the picture's bytes, the view), so that runs share it and nothing stale is found, and is read back
in every step: memory does not grow with the number of pictures.

Pictures are encoded one at a time and captions in batches of one size: kernels give other last bits at other batch sizes, and what is
kept must not depend on what happened to be encoded beside it.
"""

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from t2ilib.cachefolder import cache_folder
from t2ilib.data.decoding import Ahead, Waiting, decoded
from t2ilib.data.pictures import Picture
from t2ilib.data.progress import Progress
from t2ilib.data.samples import Samples
from t2ilib.data.store import ALONE, Share, TensorStore, content_key
from t2ilib.data.store.tensorfile import KEY_BYTES
from t2ilib.models.components import Components
from t2ilib.models.families import time_ids
from t2ilib.text import shown

log = logging.getLogger(__name__)

CAPTIONS_AT_ONCE = 16
ORIGIN = {"transformers_version", "architectures", "torch_dtype", "dtype"}
"""Of a config: where it came from. The precision is that of the weights."""

View = tuple[int, int]
"""A sample, and the number of one of its views."""


class Latents(Protocol):
    """`latents` (B, C, h, w), scaled, and where samples have one `mask` (B, 1, h, w), of views of one size; of pairs `rejected`, of the shape
    of `latents`, too."""

    def __call__(self, views: Sequence[View]) -> dict[str, Tensor]: ...


class Text(Protocol):
    """What the UNet is conditioned on, of captions (`families`)."""

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]: ...


class EncodedDataset:
    """Samples as the loop takes them. `text` None: captions stay words, for text encoders that are trained.

    `weights`: of the losses of one's own pictures and of those of the class, beside the weight that each picture has. `order`: which
    samples a step sees, of a stream, which knows it by reading.
    """

    def __init__(
        self,
        samples: Samples,
        latents: Latents,
        text: Text | None,
        weights: tuple[float, float] = (1.0, 1.0),
        order: Callable[[int], list[int]] | None = None,
    ):
        self.samples, self.latents, self.text, self.weights, self.order = samples, latents, text, weights, order

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, ids: Sequence[int], step: int, dropped: Sequence[bool], device: torch.device) -> dict[str, Any]:
        """`latents`, `time_ids`, and either `captions` or their conditioning; a dropped caption becomes "". Where samples have them,
        `mask` and `weights`; of pairs also `rejected`, the latents of what was liked less, and its `rejected_time_ids`."""
        samples, views = self.samples, self.views(ids, step)
        captions = ["" if drop else samples.caption(*view, step) for view, drop in zip(views, dropped, strict=True)]
        batch = dict(self.latents(views))
        batch["time_ids"] = torch.stack([time_ids(*samples.micro_conditioning(*view)) for view in views])
        if "rejected" in batch:
            less = [time_ids(*samples.micro_conditioning(*view, rejected=True)) for view in views]
            batch["rejected_time_ids"] = torch.stack(less)
        weights = samples.weights(ids, self.weights)
        if any(weight != 1.0 for weight in weights):
            batch["weights"] = torch.tensor(weights)
        batch |= {"captions": captions} if self.text is None else self.text(captions)
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}

    def announce(self, ids: Sequence[int], step: int) -> None:
        """Has what can be prepared of a batch begun, in threads."""
        if isinstance(self.latents, Fresh):
            self.latents.announce(self.views(ids, step))

    def waited(self) -> float:
        """Seconds since this was last asked in which a step waited for pictures to be read and decoded, or for what is on disk. Encoding is work
        of the device, and is not counted."""
        parts = (self.latents, self.text, self.order)
        return sum(part.waiting.taken() for part in parts if hasattr(part, "waiting"))

    def views(self, ids: Sequence[int], step: int) -> list[View]:
        return [(i, self.samples.number(i, step)) for i in ids]


class Fresh:
    """Latents that are encoded when they are asked for, each view once, of pictures that are decoded when they are announced."""

    def __init__(self, components: Components, samples: Samples):
        self.components, self.samples = components, samples
        self.pictures = Ahead(lambda view: samples.load(*view), samples.config.workers)
        self.waiting = Waiting()

    def announce(self, views: Sequence[View]) -> None:
        self.pictures.announce(self.jobs(views))

    def jobs(self, views: Sequence[View]) -> list[tuple[int, int, bool]]:
        """What is loaded of views: pictures of pairs stand behind those of which they were liked less."""
        return [(*view, side) for side in ((False, True) if self.samples.has_pairs else (False,)) for view in views]

    def __call__(self, views: Sequence[View]) -> dict[str, Tensor]:
        distinct = list(dict.fromkeys(views))
        with self.waiting:
            pictures = self.pictures.results(self.jobs(distinct))
        found = encode_views(self.components, pictures[: len(distinct)], self.samples.has_masks)
        if self.samples.has_pairs:
            found["rejected"] = encode_views(self.components, pictures[len(distinct) :], False)["latents"]
        rows = [distinct.index(view) for view in views]
        return {name: tensor[rows] for name, tensor in found.items()}


class Kept:
    """Latents on disk, found by their views. `keys`: those of all views, in order."""

    def __init__(self, store: TensorStore, samples: Samples, keys: np.ndarray):
        self.num_views, self.located = samples.config.views, store.locate(keys)
        self.behind = len(keys) // 2 if samples.has_pairs else None
        self.waiting = Waiting()

    def __call__(self, views: Sequence[View]) -> dict[str, Tensor]:
        places = [i * self.num_views + number for i, number in views]
        with self.waiting:
            found = self.located.read(places)
            if self.behind is not None:
                found["rejected"] = self.located.read([place + self.behind for place in places])["latents"]
            return found


class FreshText:
    """Text that is encoded when it is asked for."""

    def __init__(self, components: Components):
        self.components = components

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        with as_it_is(self.components):
            return self.components.encode_text(list(captions))


class KeptText:
    """Text on disk, found by its words' key: 28 bytes a caption. `keys`: those of all captions."""

    def __init__(self, store: TensorStore, keys: np.ndarray):
        self.keys = np.unique(keys)
        self.located = store.locate(self.keys)
        self.waiting = Waiting()

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        asked = caption_keys(captions)
        rows = np.searchsorted(self.keys, asked).clip(max=len(self.keys) - 1)
        unknown = [caption for caption, there in zip(captions, self.keys[rows] == asked, strict=True) if not there]
        if unknown:
            raise KeyError(f"captions that were not encoded: {unknown}")
        with self.waiting:
            return self.located.read(rows)


def as_it_is(components: Components) -> contextlib.AbstractContextManager:
    """Encoders work in the precision in which they were loaded, also where validation has the UNet in another: SDXL's VAE overflows in
    float16, and what is kept on disk is of that precision too."""
    return torch.autocast(components.device.type, enabled=False)


@torch.no_grad()
def encode_views(components: Components, pictures: Sequence[Picture], with_masks: bool) -> dict[str, Tensor]:
    """`latents` (B, C, h, w) of pictures of one size, each encoded alone; `with_masks` also `mask` (B, 1, h, w), the mean over the
    pixels of each latent."""
    with as_it_is(components):
        found = {"latents": torch.cat([components.encode_pictures(as_pixels(picture)) for picture in pictures])}
    if with_masks:
        found["mask"] = torch.cat([latent_mask(picture, found["latents"].shape[-2:]) for picture in pictures])
    return found


def as_pixels(picture: Picture) -> Tensor:
    """(1, 3, H, W), uint8, contiguous: in float32 on a CPU, kernels for pictures that lie pixel by pixel are 3e-4 off, others 1e-6."""
    return torch.from_numpy(np.array(picture.pixels)).permute(2, 0, 1)[None].contiguous()


def latent_mask(picture: Picture, size: tuple[int, int]) -> Tensor:
    if picture.mask is None:
        return torch.ones(1, 1, *size)
    mask = torch.from_numpy(np.array(picture.mask, dtype=np.float32))[None, None] / 255
    return nn.functional.adaptive_avg_pool2d(mask, size)


def keep_latents(components: Components, parts: Sequence[Samples], folder: Path, share: Share = ALONE) -> list[Kept]:
    """Encodes every view of these samples that is not on disk yet, of several processes each its `share`; returns where all of them are, for
    each of `parts`. Raises PictureError, and StoreError and ConfigError as the store does."""
    encoder = weights_of({"vae": components.vae})
    store = TensorStore(folder / f"latents-{encoder[:16]}", {"kind": "latents", "encoder": encoder})
    keys_of = [part.keys() for part in parts]
    keys, ends = np.concatenate(keys_of), np.cumsum([len(keys) for keys in keys_of])

    def view(place: int) -> tuple[Samples, int, int, bool]:
        part = int(np.searchsorted(ends, place, "right"))
        i, number = divmod(place - int(ends[part]) + len(keys_of[part]), parts[part].config.views)
        return parts[part], i % len(parts[part]), number, i >= len(parts[part])

    def load(place: int) -> tuple[Samples, bytes, Picture]:
        part, *side = view(place)
        return part, part.key(*side), part.load(*side)

    if share.count > 1 or store.missing(keys):
        with store.writing(share) as writer, components.awake("vae"), Progress("views") as progress:
            missing, begun = share.of(store.missing(keys)), time.perf_counter()
            for done, (part, key, picture) in enumerate(decoded(missing, load, parts[0].config.workers)):
                found = encode_views(components, [picture], part.has_masks)
                if not done:
                    writer.require(len(missing) * share.count, size_of(found))
                writer.add([key], found)
                progress("encoding pictures", done + 1, len(missing))
            tell("views of pictures", len(missing) * share.count, len(np.unique(keys)), begun, store.folder)
    return [Kept(store, part, own) for part, own in zip(parts, keys_of, strict=True)]


@torch.no_grad()
def keep_text(components: Components, captions: Sequence[str], folder: Path, share: Share = ALONE) -> KeptText:
    """Encodes every caption that is not on disk yet, of several processes each its `share`; returns where all of them are. Raises StoreError
    and ConfigError as the store does."""
    keys, encoder = caption_keys(captions), text_encoder_of(components)
    store = TensorStore(folder / f"text-{encoder[:16]}", {"kind": "text", "encoder": encoder})
    if share.count > 1 or store.missing(keys):
        with (
            store.writing(share) as writer,
            components.awake(*components.text_encoders),
            Progress("captions") as progress,
        ):
            missing, begun = share.of(store.missing(keys)), time.perf_counter()
            for start in range(0, len(missing), CAPTIONS_AT_ONCE):
                part = [captions[place] for place in missing[start : start + CAPTIONS_AT_ONCE]]
                filled = part + [""] * (CAPTIONS_AT_ONCE - len(part))
                with as_it_is(components):
                    encoded = components.encode_text(filled)
                found = {name: tensor[: len(part)].cpu() for name, tensor in encoded.items()}
                if not start:
                    writer.require(len(missing) * share.count, size_of(found) // len(part))
                writer.add([content_key("caption", caption) for caption in part], found)
                progress("encoding captions", start + len(part), len(missing))
            tell("captions", len(missing) * share.count, len(np.unique(keys)), begun, store.folder)
    return KeptText(store, keys)


def caption_keys(captions: Sequence[str]) -> np.ndarray:
    """(N,) S16."""
    return np.fromiter((content_key("caption", caption) for caption in captions), f"S{KEY_BYTES}", len(captions))


def size_of(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def tell(what: str, made: int, needed: int, begun: float, folder: Path) -> None:
    if not made:
        return
    seconds = time.perf_counter() - begun
    log.info("encoded %s of %s %s in %.0f s, kept in %s", f"{made:,}", f"{needed:,}", what, seconds, shown(folder))


def weights_of(modules: Mapping[str, nn.Module], *settings: str) -> str:
    """What encoders are known by: SHA-256 over their names, configs and weights, as they are loaded."""
    digest = hashlib.sha256(repr(settings).encode())
    for part, module in modules.items():
        digest.update(f"{part} {settings_of(module)}".encode())
        for name, tensor in module.state_dict().items():
            if isinstance(tensor, Tensor):
                digest.update(f"{part}.{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def settings_of(module: nn.Module) -> str:
    """The config of a part, which decides beside its weights what it gives (activations, groups of norms, the scaling factor), without
    where it came from."""
    config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
    return repr(sorted((name, value) for name, value in config.items() if name not in ORIGIN and name[0] != "_"))


def text_encoder_of(components: Components) -> str:
    tokenizers = [
        (sorted(tokenizer.get_vocab().items()), tokenizer.model_max_length, str(tokenizer.pad_token))
        for tokenizer in components.tokenizers.values()
    ]
    told = hashlib.sha256(repr(tokenizers).encode()).hexdigest()
    return weights_of(components.text_encoders, components.family.name, str(components.zero_empty), told)


def encoded_folder(path: Path | None) -> Path:
    return path or cache_folder() / "encoded"
