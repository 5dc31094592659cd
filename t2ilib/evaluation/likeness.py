"""The measure `likeness`: how like the held-out pictures the drawn ones are, and how much of that the base lacked.

A picture of a held-out caption is held against the picture that has it: what is `learned` is the share of the way from the base's
picture to the real one. Where all pictures have one caption, that is each against all. What needs no captions stands beside it: mean
cosine and centroid distance of all drawn to all held-out pictures, with the base's value as the floor and that of the training pictures as
the ceiling. More like the held-out pictures than other real ones are is no merit: such pictures are too typical, all near the mean.

Diversity, by group, is here too, against as many real pictures.
"""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from t2ilib.config import RunConfig
from t2ilib.evaluation.closeness import centroid_distance, mean_similarities, squared_mmd, vendi_score
from t2ilib.evaluation.context import Context, Measure
from t2ilib.evaluation.embeddings import embedders, embedding_models, lacks_models, vectors_of
from t2ilib.evaluation.metrics import Metric
from t2ilib.evaluation.references import Real, base_pictures, lacks_base, lacks_held_out, real_pictures
from t2ilib.evaluation.rows import Value
from t2ilib.seeds import numpy_generator_for

OWN = ("captions", "trigger", "contexts", "styles")
"""Groups of prompts that ask for what was taught."""
SUBSETS = 16
"""Of pictures, over which diversity is a mean where there are more of one kind than of the other."""
DIGITS = 9
"""Of what must come out as zero for the base itself, where sums of rounded numbers do not: `+ 0.0` makes a zero of minus zero."""
LEAST_FOR_MMD = 100
"""Drawn and held-out pictures from which the distance of their distributions is told. Hearts and stripes of the drawn world are 2.9 apart by the
tiny CLIP; two draws of hearts differ by 0.95 (SD) at 10 pictures, by 0.16 at 50, by 0.08 at 100."""
TABLE, DIVERSITY = "Likeness to held-out pictures", "Diversity"

METRICS = {
    "learned/{model}": Metric(
        "learned, by {model}", "share", "higher", table="Learned and kept", role="learned", headline="Learned most",
        note="pictures drawn of held-out captions: how much of the way from the base's picture to the real one, by cosine. 100 % would be"
        " the real picture itself, which no drawn one is.",
    ),
    "likeness/{group}/{model}": Metric(
        "likeness in {group}, by {model}", "score", "higher", table=TABLE, ceiling="likeness/{group}/{model}/most",
        flag="more like the held-out pictures than other real ones are: too typical, a sign of over-training",
        note="mean cosine to all held-out pictures.",
    ),
    "likeness/{group}/{model}/base": Metric("likeness in {group}, the base's, by {model}", "score", table=None),
    "likeness/{group}/{model}/real": Metric("likeness of real pictures, by {model}", "score", table=None),
    "likeness/{group}/{model}/most": Metric("likeness in {group}, most by chance, by {model}", "score", table=None),
    "centroid_distance/{group}/{model}": Metric(
        "{group}, squared distance of centroids, by {model}", "score", "lower", table=TABLE,
        note="of the mean of the drawn pictures' vectors to that of the held-out ones'.",
    ),
    "centroid_distance/{group}/{model}/base": Metric("{group}, the base's distance, by {model}", "score", table=None),
    "centroid_distance/{group}/{model}/real": Metric("real pictures' distance, by {model}", "score", table=None),
    "mmd/{group}/{model}": Metric("{group}, distance of distributions (MMD) by {model}", "score", "lower", table=TABLE),
}  # fmt: skip
DIVERSITIES = {
    "diversity/{group}/{model}": Metric(
        "diversity of {group}, by {model}", "score", "higher", table=DIVERSITY,
        note="how many different pictures there are in effect (Vendi score), of as many as there are prompts of the kind.",
    ),
    "diversity/{group}/{model}/base": Metric("diversity of {group}, the base's, by {model}", "score", table=None),
    "diversity/{group}/{model}/real": Metric("diversity of real pictures, by {model}", "score", table=None),
}  # fmt: skip


def lacks(run: RunConfig) -> str | None:
    return lacks_groups(run) or lacks_models(run) or lacks_held_out(run) or lacks_base(run)


def lacks_groups(run: RunConfig) -> str | None:
    """Why nothing is drawn that this is about, or None where it is."""
    groups = run.evaluation.prompt_groups
    return None if groups and set(groups.named()) & set(OWN) else "name evaluation.prompt_groups"


def likeness(pictures: Sequence[Image.Image], prompts: Sequence[str], context: Context) -> dict[str, Value]:
    """See METRICS; {} for groups that do not ask for what was taught."""
    if context.group not in OWN:
        return {}
    training, held_out = real_pictures(context.run, context.shared)
    found: dict[str, Value] = {}
    of_base = base_pictures(context.run, context.components, prompts, context.shared)
    for embedder in embedders(context.run, context.components.device, context.shared):
        name = f"{context.group}/{embedder.name}"
        drawn, base, real, others = (
            vectors_of(embedder, pictures, context.shared),
            vectors_of(embedder, of_base, context.shared),
            held_out.by(embedder),
            training.by(embedder),
        )
        own, floor, ceiling = (mean_similarities(vectors, real) for vectors in (drawn, base, others))
        found[f"likeness/{name}"] = own.tolist()
        found[f"likeness/{name}/base"] = float(floor.mean())
        found[f"likeness/{name}/real"] = float(ceiling.mean())
        spread = by_chance(ceiling, len(drawn))
        if (
            context.group == "contexts" and spread is not None
        ):  # captions ask for the very pictures, the trigger alone for the typical one
            found[f"likeness/{name}/most"] = float(ceiling.mean() + spread)
        for suffix, vectors in {"": drawn, "/base": base, "/real": others}.items():
            found[f"centroid_distance/{name}{suffix}"] = centroid_distance(vectors, real)
        if min(len(drawn), len(real)) >= LEAST_FOR_MMD:
            found[f"mmd/{name}"] = squared_mmd(drawn, real)
        if context.group == "captions":
            found |= learned(embedder.name, prompts, held_out, real, drawn, base)
    return found


def by_chance(ceiling: np.ndarray, count: int) -> float | None:
    """How far the mean of `count` more values like those of the training pictures lies above theirs once in a hundred, by the normal limit; None
    where one picture tells nothing of it."""
    if len(ceiling) < 2:
        return None
    return float(2.33 * ceiling.std(ddof=1) * np.sqrt(1 / count + 1 / len(ceiling)))


def learned(
    name: str, prompts: Sequence[str], held_out: Real, real: np.ndarray, drawn: np.ndarray, base: np.ndarray
) -> dict[str, Value]:
    """Of each picture of a held-out caption (s - b) / (1 - b): s its mean cosine to the held-out pictures of this caption, b the mean of that of
    the base's pictures; None for other prompts. {} where no prompt is a held-out caption."""
    belong = held_out.asked_by(prompts)
    asked = [number for number, pictures in enumerate(belong) if pictures]
    if not asked:
        return {}

    def to_their_own(vectors: np.ndarray) -> np.ndarray:
        return np.array([float(vectors[number] @ real[belong[number]].mean(0)) for number in asked])

    floor = float(to_their_own(base).mean())
    shares: list[float | None] = [None] * len(prompts)
    for number, similarity in zip(asked, to_their_own(drawn), strict=True):
        shares[number] = round((similarity - floor) / (1 - floor), DIGITS) + 0.0
    return {f"learned/{name}": shares}


def diversity(pictures: Sequence[Image.Image], prompts: Sequence[str], context: Context) -> dict[str, Value]:
    """The Vendi score of a group's pictures, of the base's, and of real ones, of equally many of each; {} where fewer than two can be
    compared."""
    if context.group not in OWN:
        return {}
    found: dict[str, Value] = {}
    training, _ = real_pictures(context.run, context.shared)
    of_base = base_pictures(context.run, context.components, prompts, context.shared)
    count = min(len(pictures), len(training))
    for embedder in embedders(context.run, context.components.device, context.shared) if count > 1 else []:
        sets = {
            "": vectors_of(embedder, pictures, context.shared),
            "/base": vectors_of(embedder, of_base, context.shared),
            "/real": training.by(embedder),
        }
        for suffix, vectors in sets.items():
            found[f"diversity/{context.group}/{embedder.name}{suffix}"] = over_subsets(vendi_score, vectors, count)
    return found


def over_subsets(function: Callable[[np.ndarray], float], vectors: np.ndarray, count: int) -> float:
    """The mean of a function over subsets of `count` of the vectors, always the same ones; of all of them where that is all there are."""
    if len(vectors) == count:
        return function(vectors)
    orders = [numpy_generator_for(0, "subsets", i).permutation(len(vectors))[:count] for i in range(SUBSETS)]
    return float(np.mean([function(vectors[order]) for order in orders]))


LIKENESS = Measure(likeness, METRICS, lacks, embedding_models)
DIVERSITY_OF_GROUPS = Measure(diversity, DIVERSITIES, lacks, embedding_models)
