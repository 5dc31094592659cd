"""The measure `drift`: how far a model has gone from its base on prompts that have nothing to do with the training.

Each picture is held against what the base draws of the same prompt from the same noise, so that the two differ by the weights alone, and
a prompt's difficulty and the noise's luck are in both. What is `kept` is how much nearer to the base's picture of its own prompt a picture
is than the base's pictures of different prompts are to each other. The base itself has drifted by 0 and kept everything.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from t2ilib.config import RunConfig
from t2ilib.evaluation.context import Context, Measure
from t2ilib.evaluation.embeddings import embedders, embedding_models, lacks_models, vectors_of
from t2ilib.evaluation.metrics import Metric
from t2ilib.evaluation.references import base_pictures, lacks_base
from t2ilib.evaluation.rows import Value

GROUP = "unrelated"
METRICS = {
    "kept/{model}": Metric(
        "kept, by {model}", "share", "higher", table="Learned and kept", role="kept", headline="Forgot least",
        note="pictures of prompts that have nothing to do with the training, against the base's from the same noise: 100 % is the base's"
        " picture itself, 0 % no more like it than the base's pictures of different prompts are like each other.",
    ),
    "drift/{model}": Metric("drift, by {model}", "score", "lower", table="Drift on unrelated prompts"),
    "drift/pixels": Metric("drift of pixels", "score", "lower", table="Drift on unrelated prompts"),
}  # fmt: skip


def lacks(run: RunConfig) -> str | None:
    groups = run.evaluation.prompt_groups
    named = None if groups and groups.unrelated else "name evaluation.prompt_groups.unrelated"
    return named or lacks_models(run) or lacks_base(run)


def drift(pictures: Sequence[Image.Image], prompts: Sequence[str], context: Context) -> dict[str, Value]:
    """Of each picture 1 - the cosine to the base's, and the root of the mean square of their difference, pixels from 0 to 1; what is kept of
    each, where there are prompts to compare. {} for other groups."""
    if context.group != GROUP:
        return {}
    of_base = base_pictures(context.run, context.components, prompts, context.shared)
    found: dict[str, Value] = {"drift/pixels": [far(*pair) for pair in zip(pictures, of_base, strict=True)]}
    for embedder in embedders(context.run, context.components.device, context.shared):
        drawn, base = vectors_of(embedder, pictures, context.shared), vectors_of(embedder, of_base, context.shared)
        alike = np.minimum((drawn * base).sum(1), 1)  # or the base would have drifted from itself by a rounding
        found[f"drift/{embedder.name}"] = (1 - alike).tolist()
        if len(set(prompts)) > 1:
            other = np.array([[one != two for two in prompts] for one in prompts])
            chance = float((base @ base.T)[other].mean())
            found[f"kept/{embedder.name}"] = ((alike - chance) / (1 - chance)).tolist()
    return found


def far(one: Image.Image, other: Image.Image) -> float:
    difference = np.asarray(one.convert("RGB"), float) - np.asarray(other.convert("RGB"), float)
    return float(np.sqrt(np.square(difference / 255).mean()))


DRIFT = Measure(drift, METRICS, lacks, embedding_models)
