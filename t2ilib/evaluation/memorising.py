"""The measures `memorising` and `copies`: were training pictures learned by heart?

A picture of a prompt that no training picture answers should have a held-out picture next to it as often as a training one, of equally
many of both: which were trained on should make no difference. Captions of training pictures do ask for what these show, so there the question
is another: how much nearer drawn pictures come to what they were asked for where it was trained on than where it was held out (the gap of
generalisation, seen in pictures). Both are flagged above what they are by chance once in a hundred times, if labels are given at
random, which holds for few pictures, and for drawn ones that are all alike.

`copies` asks SSCD (arXiv 2202.10261), a network made to find copied pictures, where the config names its file: it is published as
TorchScript, which transformers has no class for.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from t2ilib.config import ConfigError, RunConfig
from t2ilib.evaluation.closeness import most_by_chance, nearer_than_real, nearest_is_training
from t2ilib.evaluation.context import Context, Measure
from t2ilib.evaluation.embeddings import Preparation, Thumbnails, embedders, embedding_models, vectors_of
from t2ilib.evaluation.likeness import DIGITS, OWN, lacks_groups
from t2ilib.evaluation.likeness import lacks as lacks_likeness
from t2ilib.evaluation.metrics import Metric
from t2ilib.evaluation.references import Real, base_pictures, lacks_base, lacks_held_out, real_pictures
from t2ilib.evaluation.rows import Value
from t2ilib.seeds import numpy_generator_for

TABLE = "Learned by heart"
SSCD_COPY = 0.75
"""The cosine above which 90 of 100 pairs of DISC are copies, by the authors' `sscd_disc_mixup` (its repository's README)."""
SSCD = Preparation(None, 288, Image.Resampling.BILINEAR, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

METRICS = {
    "nearest_training/{group}/{model}": Metric(
        "{group}, next to a training picture, by {model}", "share", "lower", table=TABLE, ceiling="nearest_training/{group}/{model}/most",
        flag="nearer to training pictures than to as many that were held out: learned by heart",
        note="how often the real picture nearest to a drawn one is a training picture, of as many training as held-out pictures. 50 % is what"
        " pictures have that favour neither, copies have 100 %.",
    ),
    "nearest_training/{group}/{model}/base": Metric("{group}, next to a training picture, the base's, by {model}", "share", table=None),
    "nearest_training/{group}/{model}/most": Metric("{group}, next to a training picture, most by chance, by {model}", "share", table=None),
    "nearer_training/{group}/{model}": Metric(
        "{group}, nearer to training pictures than real ones are, by {model}", "share", "lower", table=None,
    ),
    "nearer_training/{group}/{model}/base": Metric("{group}, the base's, by {model}", "share", table=None),
    "gap/{model}": Metric(
        "nearer to what was trained on than to what was held out, by {model}", "share", "lower", table=TABLE,
        ceiling="gap/{model}/most", flag="what was trained on is drawn far better than what was held out: over-trained",
        note="how much farther pictures of training captions have gone from the base's to the real ones than pictures of held-out captions.",
    ),
    "gap/{model}/most": Metric("gap, most by chance, by {model}", "share", table=None),
}  # fmt: skip
COPIES = {
    "copies/{group}": Metric(
        "{group}, copies of training pictures by SSCD", "share", "lower", table=TABLE, ceiling="copies/{group}/real",
        flag="more copies of training pictures than among held-out ones",
    ),
    "copies/{group}/base": Metric("{group}, the base's copies by SSCD", "share", table=None),
    "copies/{group}/real": Metric("{group}, copies among held-out pictures by SSCD", "share", table=None),
    "copy_similarity/{group}": Metric("{group}, nearest training picture by SSCD", "score", "lower", table=None),
}  # fmt: skip


def memorising(pictures: Sequence[Image.Image], prompts: Sequence[str], context: Context) -> dict[str, Value]:
    """See METRICS; {} for groups of which nothing can be said."""
    if context.group not in OWN:
        return {}
    training, held_out = real_pictures(context.run, context.shared)
    found: dict[str, Value] = {}
    of_base = base_pictures(context.run, context.components, prompts, context.shared)
    judges = [Thumbnails(), *embedders(context.run, context.components.device, context.shared)]
    for embedder in judges:
        name, reals = f"{context.group}/{embedder.name}", (training.by(embedder), held_out.by(embedder))
        drawn, base = vectors_of(embedder, pictures, context.shared), vectors_of(embedder, of_base, context.shared)
        if context.group == "captions":
            found |= gap(embedder.name, prompts, (training, held_out), reals, drawn, base)
        else:
            found |= nearest(name, reals, drawn, base)
            for suffix, vectors in {"": drawn, "/base": base}.items():
                found[f"nearer_training/{name}{suffix}"] = float(nearer_than_real(vectors, *reals).mean())
    return found


def nearest(name: str, reals: tuple[np.ndarray, np.ndarray], drawn: np.ndarray, base: np.ndarray) -> dict[str, Value]:
    """Of each drawn picture, and of all of the base's, with what the mean is by chance at most."""
    known, number = np.concatenate(reals), len(reals[0])
    to_real, of_base = drawn @ known.T, base @ known.T

    def mean(training: np.ndarray, held_out: np.ndarray) -> float:
        return float(nearest_is_training(to_real[:, training], to_real[:, held_out]).mean())

    return {
        f"nearest_training/{name}": nearest_is_training(to_real[:, :number], to_real[:, number:]).tolist(),
        f"nearest_training/{name}/base": float(nearest_is_training(of_base[:, :number], of_base[:, number:]).mean()),
        f"nearest_training/{name}/most": most_by_chance(mean, number, len(reals[1]), labels(name)),
    }


def labels(name: str) -> np.random.Generator:
    return numpy_generator_for(0, "labels of real pictures", name)


def gap(
    name: str,
    prompts: Sequence[str],
    kinds: tuple[Real, Real],
    reals: tuple[np.ndarray, np.ndarray],
    drawn: np.ndarray,
    base: np.ndarray,
) -> dict[str, Value]:
    """{} where prompts are not captions of both kinds. Of each picture it is the share of the way from the base's picture to the real one:
    captions that the base draws well leave less to learn, of either kind."""
    gains = []
    for real, vectors in zip(kinds, reals, strict=True):
        belong = zip(drawn, base, real.asked_by(prompts), strict=True)
        gains.append([way(d, b, vectors[own].mean(0)) for d, b, own in belong if own])
    if not all(gains):
        return {}
    gained, number = np.concatenate(gains), len(gains[0])

    def difference(trained: np.ndarray, held_out: np.ndarray) -> float:
        return float(gained[trained].mean() - gained[held_out].mean())

    found = difference(np.arange(number), np.arange(number, len(gained)))
    return {
        f"gap/{name}": round(found, DIGITS) + 0.0,
        f"gap/{name}/most": most_by_chance(difference, number, len(gained) - number, labels(name)),
    }


def way(drawn: np.ndarray, base: np.ndarray, real: np.ndarray) -> float:
    """Of the way from the base's picture to the real one the share that a drawn one has gone, by cosines."""
    return float((drawn - base) @ real / (1 - base @ real))


def lacks_detector(run: RunConfig) -> str | None:
    if run.evaluation.copy_detector is None:
        return "set evaluation.copy_detector, a TorchScript file of SSCD"
    return lacks_groups(run) or lacks_held_out(run) or lacks_base(run)


def load_detector(run: RunConfig, device: torch.device) -> torch.jit.ScriptModule:
    """Raises ConfigError for a file that is none, or gives no vectors."""
    path = run.evaluation.copy_detector
    if not path.is_file():
        raise ConfigError(f"evaluation.copy_detector {path}: there is no such file")
    try:
        model = torch.jit.load(path, map_location=device).eval()
        with torch.no_grad():
            shape = model(torch.zeros(1, 3, SSCD.side, SSCD.side, device=device)).shape
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        raise ConfigError(f"evaluation.copy_detector {path} is no TorchScript of SSCD: {said}") from None
    if len(shape) != 2:
        raise ConfigError(f"evaluation.copy_detector {path} gives {tuple(shape)} for a picture, not a vector")
    return model


@torch.no_grad()
def described(model: Any, pictures: Sequence[Image.Image], device: torch.device) -> np.ndarray:
    """(N, D), of length 1."""
    rows = [model(torch.from_numpy(SSCD(picture))[None].to(device)).double().cpu().numpy()[0] for picture in pictures]
    found = np.stack(rows)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def copies(pictures: Sequence[Image.Image], prompts: Sequence[str], context: Context) -> dict[str, Value]:
    """Of each picture whether a training picture is a copy of it, and the cosine of the nearest."""
    if context.group not in OWN:
        return {}
    training, held_out = real_pictures(context.run, context.shared)
    device, shared = context.components.device, context.shared
    if "detector" not in shared:
        shared["detector"] = model = load_detector(context.run, device)
        shared["described"] = [described(model, real.pictures, device) for real in (training, held_out)]
    known, others = shared["described"]
    of_base = base_pictures(context.run, context.components, prompts, shared)
    nearest, base = ((described(shared["detector"], p, device) @ known.T).max(1) for p in (pictures, of_base))
    return {
        f"copies/{context.group}": (nearest >= SSCD_COPY).astype(float).tolist(),
        f"copies/{context.group}/base": float((base >= SSCD_COPY).mean()),
        f"copies/{context.group}/real": float(((others @ known.T).max(1) >= SSCD_COPY).mean()),
        f"copy_similarity/{context.group}": nearest.tolist(),
    }


def judges_of(run: RunConfig) -> list[str]:
    """Thumbnails, by which copies are told best, and the run's embedding models."""
    return [Thumbnails.name, *embedding_models(run)]


MEMORISING = Measure(memorising, METRICS, lacks_likeness, judges_of)
COPIED = Measure(copies, COPIES, lacks_detector)
