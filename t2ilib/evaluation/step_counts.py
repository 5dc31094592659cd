"""The measure `step_counts`: how good pictures are by how many sampling steps they are drawn in, and how long each takes.

The test prompts are drawn anew at each number of `evaluation.step_counts`, from the noise that all pictures are drawn from, by the sampler that
the model is drawn by and with the run's guidance; nothing else differs. In the drawn world the checker says whether everything is right,
elsewhere the CLIP score. Where a run has several groups of prompts it is about the first, which speaks for the run.
"""

import time
from collections.abc import Sequence

from PIL import Image

from t2ilib.config import RunConfig
from t2ilib.evaluation import clip
from t2ilib.evaluation.context import Context, Measure
from t2ilib.evaluation.metrics import Metric
from t2ilib.evaluation.rows import Value
from t2ilib.evaluation.sampling import draw
from t2ilib.shapes import checker

TABLE = "Sampling steps"
METRICS = {
    "steps/{model}/all": Metric(
        "all right, steps: {model}", "share", "higher", table=TABLE, note="of pictures drawn in so many sampling steps."
    ),
    "steps/{model}/clip_score": Metric("CLIP score, steps: {model}", "score", "higher", table=TABLE),
    "steps/{model}/seconds": Metric(
        "seconds a picture, steps: {model}",
        "seconds",
        "lower",
        table=TABLE,
        note="with its text and its decoding, in batches as the run draws; on this device, whatever else it does.",
    ),
}


def counts(run: RunConfig) -> list[str]:
    return [str(count) for count in run.evaluation.step_counts]


def lacks(run: RunConfig) -> str | None:
    """Why a run's pictures cannot be measured by their number of steps, or None where they can."""
    if not run.evaluation.step_counts:
        return "set evaluation.step_counts, to numbers of sampling steps"
    return clip.lacks(run) if checker.lacks(run) else None


def step_counts(pictures: Sequence[Image.Image], prompts: Sequence[str], context: Context) -> dict[str, Value]:
    """Of the first group: `steps/<count>/all` or `/clip_score` of each picture, and `/seconds`; {} for others."""
    if context.shared.setdefault("group of step counts", context.group) != context.group:
        return {}
    found: dict[str, Value] = {}
    for count in context.run.evaluation.step_counts:
        settings = context.run.evaluation.model_copy(update={"num_inference_steps": count})
        began = time.perf_counter()
        drawn = draw(context.components, prompts, settings, resolution=context.run.data.resolution)
        found[f"steps/{count}/seconds"] = (time.perf_counter() - began) / len(prompts)
        found |= judged(count, drawn, prompts, context)
    return found


def judged(count: int, drawn: Sequence[Image.Image], prompts: Sequence[str], context: Context) -> dict[str, Value]:
    if context.scenes:
        right = checker.checked(context.group, context.scenes, drawn)
        return {f"steps/{count}/all": right[f"{context.group}/all"]}
    return {f"steps/{count}/clip_score": clip.clip_scores(*clip.shared_clip(context), drawn, prompts)}


STEP_COUNTS = Measure(step_counts, METRICS, lacks, counts)
