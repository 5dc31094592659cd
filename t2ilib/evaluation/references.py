"""What drawn pictures are held against: the run's training and held-out pictures, and what the untouched base draws of the same prompts.

The base's pictures are drawn once for all runs of the same base, settings and prompts, from the same noise as the run's, and kept in the
cache folder. They are drawn with the adapter switched off where that leaves the base as it was loaded; otherwise the base is loaded
again while what was trained waits in host memory.
"""

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import try_to_load_from_cache
from PIL import Image

from t2ilib.cachefolder import cache_folder
from t2ilib.config import RunConfig
from t2ilib.data.dataset import divide
from t2ilib.data.pictures import load_picture
from t2ilib.data.records import Record
from t2ilib.evaluation.embeddings import Embedder, Thumbnails
from t2ilib.evaluation.sampling import DRAW_SEED, draw, load_pictures, save_pictures
from t2ilib.models.alone import adapters_off
from t2ilib.models.components import Components
from t2ilib.models.load import load_base
from t2ilib.models.quantize import move
from t2ilib.seeds import numpy_generator_for

MOST = 256
"""Real pictures of each kind that are looked at; of more always the same ones are taken."""
DECIDING = ("num_inference_steps", "guidance_scale", "negative_prompt", "vae_tiling")
"""Fields of `evaluation` that decide what the base draws."""


@dataclass(frozen=True)
class Real:
    """Real pictures as training sees them, and of each its captions as they stand in the data. `vectors`: name of an embedding model -> (N, D)."""

    pictures: Sequence[Image.Image]
    captions: Sequence[tuple[str, ...]]
    vectors: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.pictures)

    def by(self, embedder: Embedder | Thumbnails) -> np.ndarray:
        """(N, D), made once."""
        if embedder.name not in self.vectors:
            self.vectors[embedder.name] = embedder(self.pictures)
        return self.vectors[embedder.name]

    def asked_by(self, prompts: Sequence[str]) -> list[list[int]]:
        """Of each prompt the numbers of the pictures whose caption it is, whatever the white space."""
        own = [{" ".join(caption.split()) for caption in captions} for captions in self.captions]
        return [[i for i, known in enumerate(own) if " ".join(prompt.split()) in known] for prompt in prompts]


def lacks_held_out(run: RunConfig) -> str | None:
    """Why a run has no real pictures to hold drawn ones against, or None where it has."""
    data = run.data
    if data.streaming:
        return "a stream is not kept, and its pictures are what the drawn ones are held against"
    if data.source != "shapes" and not (data.validation_share or data.validation_path or data.validation_split):
        return "no pictures are held out: set data.validation_share, or data.validation_path"
    return None


def real_pictures(run: RunConfig, shared: dict[str, Any]) -> tuple[Real, Real]:
    """Training and held-out pictures of a run, each once, at most MOST, the middle of each as training cuts it."""
    if "real" not in shared:
        _, _, (training, held_out) = divide(run)
        shared["real"] = looked_at(run, training, "training"), looked_at(run, held_out, "held out")
    return shared["real"]


def looked_at(run: RunConfig, records: Sequence[Record], kind: str) -> Real:
    if len(records) > MOST:
        chosen = numpy_generator_for(0, "real pictures", kind).permutation(len(records))[:MOST]
        records = [records[i] for i in sorted(chosen)]
    pictures = [load_picture(r.path, run.data.resolution, run.data.ground).pixels for r in records]
    return Real([Image.fromarray(pixels) for pixels in pictures], [record.captions for record in records])


def lacks_base(run: RunConfig) -> str | None:
    """Why there is no base to hold pictures against, or None where there is one."""
    if run.scratch is not None:
        return "a network that begins with fresh weights has no base"
    return f"it draws nothing while it trains {run.trains}" if run.trains in ("vae", "clip") else None


def base_pictures(
    run: RunConfig, components: Components, prompts: Sequence[str], shared: dict[str, Any]
) -> list[Image.Image]:
    """What the untouched base draws of these prompts, from the noise that the run's pictures begin with."""
    known = shared.setdefault("base pictures", {})
    prompts = tuple(prompts)
    if prompts not in known:
        folder, told = kept_in(run, components, prompts)
        if not folder.is_dir():
            with untouched(run, components) as base:
                put(draw(base, prompts, run.evaluation_of_base, resolution=run.data.resolution), told, folder)
        known[prompts] = load_pictures(folder)
    return known[prompts]


def keep_base_pictures(
    run: RunConfig, components: Components, prompts: Sequence[str], pictures: Sequence[Image.Image]
) -> None:
    """Keeps what a run of the untouched base drew, so that no other run draws it again; of other runs nothing."""
    if run.trains == "nothing" and stands_still(run):
        folder, told = kept_in(run, components, prompts)
        if not folder.is_dir():
            put(pictures, told, folder)


def kept_in(run: RunConfig, components: Components, prompts: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    """The folder of the base's pictures of these prompts, and what it is known by."""
    told = identity(run, components, prompts)
    name = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:24]
    return cache_folder() / "base_pictures" / name, told


def put(pictures: Sequence[Image.Image], told: dict[str, Any], folder: Path) -> None:
    """Complete or absent, also where several processes draw at once."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".drawing-"))
    save_pictures(pictures, draft)
    (draft / "about.json").write_text(json.dumps(told, indent=1))
    try:
        draft.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(draft)


def identity(run: RunConfig, components: Components, prompts: Sequence[str]) -> dict[str, Any]:
    """All that decides what the base draws, as JSON has it."""
    model = run.model
    return {
        "model": model.model_dump(mode="json"),
        "files": {
            name: stamps(place, model.revision)
            for name in ("base", "vae")
            if (place := getattr(model, name)) is not None
        },
        "settings": {name: getattr(run.evaluation_of_base, name) for name in DECIDING},
        "resolution": run.data.resolution,
        "device": components.device.type,
        "versions": {name: metadata.version(name) for name in ("torch", "diffusers")},
        "noise": DRAW_SEED,
        "prompts": list(prompts),
    }


def stamps(place: str, revision: str | None) -> list[tuple[str, int, int]]:
    """Name, bytes and time of the weights in a folder or file; of what comes from the Hub the commit."""
    path = Path(place).expanduser()
    if place.count("/") == 1 and not path.exists():
        found = try_to_load_from_cache(place, "model_index.json", revision=revision)
        return [(Path(found).parent.name, 0, 0)] if isinstance(found, str) else []
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
    return [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]


def stands_still(run: RunConfig) -> bool:
    """Whether the base is as it was loaded once the adapter is off: its weights, its vocabulary, its noise and how it is drawn."""
    adapter, objective = run.adapter, run.objective
    changed = adapter is not None and (adapter.init in ("pissa", "olora") or bool(adapter.tokens))
    other_noise = (objective.name, objective.beta_schedule, objective.zero_terminal_snr) != ("auto", "auto", None)
    changed = changed or bool(run.evaluation.adapters)  # which may bring words and noise of their own
    return run.trains in ("adapter", "nothing") and not changed and not other_noise and run.drawn_by is None


@contextlib.contextmanager
def untouched(run: RunConfig, components: Components) -> Iterator[Components]:
    """The base as it was loaded, for as long as the scope lasts."""
    if stands_still(run):
        with adapters_off(components):
            yield components
        return
    device = components.device
    working = [part for part in components.networks() if part not in components.parked]
    for part in working:
        move(part, "cpu")
    try:
        yield load_base(run.model, device)
    finally:
        for part in working:
            move(part, device)
