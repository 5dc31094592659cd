"""A measure of one's own, in one page: how sharp are the pictures that a trained model draws?

Name it in a run file, in the `evaluation` cell of a notebook, or in a study, beside those that come with t2ilib:

    evaluation: {measures: [checker, clip, experiments/sharpness.py:sharpness]}

It is asked once for each group of prompts that a run is measured on: in the drawn world `concept` (what was to be learned) and
`base_kept` (what should be kept), otherwise `prompts`. What it returns goes to MLflow and to the run's metrics.json, and what it
declares tells the report how to show it: nothing else has to know of it. A package offers a measure under a name of its own
with an entry point:

    [project.entry-points."t2ilib.measures"]
    sharpness = "my_package.sharpness:sharpness"
"""

import numpy as np

from t2ilib.evaluation.measures import Context, Measure
from t2ilib.evaluation.metrics import Metric


def mean_gradient(pictures, prompts, context: Context) -> dict[str, list[float]]:
    """Of each picture the mean difference between neighbouring pixels, in units of 0 to 255. What is said of all pictures
    together would be a number instead of a list.

    `pictures`: PIL images, one a prompt. `context`: the group of prompts, the run, the model that drew (an embedding model could
    go to its device), the scenes in the drawn world, and `shared`, to keep a model from one group to the next.
    """
    steps = []
    for picture in pictures:
        grey = np.asarray(picture.convert("L"), float)
        steps.append((np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean()) / 2)
    return {f"sharpness/{context.group}": steps}


sharpness = Measure(
    mean_gradient,
    {"sharpness/{group}": Metric("sharpness, {group}", unit="score", better="higher", table="Of our own")},
)
"""`{group}` stands for the group of prompts. With `lacks=` a measure says why it cannot measure a run, before anything starts."""
