"""A study's champion: the best adapter of a finished preset, registered in MLflow under the alias `champion`.

A study registers one version for each new winner under its name, and moves the alias to it: `models:/<study>-<preset>@champion`.
"""

import logging
import statistics
from collections.abc import Sequence

from t2ilib.evaluation.metrics import Metric
from t2ilib.studies.runs import StudyRun
from t2ilib.tracking.models import MODEL_TAG, register_version

log = logging.getLogger(__name__)

ALIAS = "champion"
CRITERIA = ("learned", "kept", "loss")
"""Roles of metrics, what decides a study first: of each the first metric that its runs measured; later ones break ties."""


def criteria(results: Sequence[dict]) -> list[tuple[str, int]]:
    """(metric, sign) in the order of CRITERIA, of those that every run measured; the sign says which way is better."""
    found = []
    for role in CRITERIA:
        known = {key: Metric(**about) for result in results for key, about in result["measures"].items()}
        named = [key for key, metric in known.items() if metric.role == role and metric.better]
        everywhere = [key for key in named if all(key in result["metrics"] for result in results)]
        found += [(key, 1 if known[key].better == "higher" else -1) for key in everywhere[:1]]
    return found


def choose_winner(runs: Sequence[StudyRun]) -> StudyRun | None:
    """The best run of the variant with the best mean over its seeds, by CRITERIA; None where no run measured any of them."""
    results = {run: run.result() for run in runs}
    chosen = criteria(list(results.values()))
    if not chosen:
        return None

    def score(own: Sequence[StudyRun]) -> tuple[float, ...]:
        return tuple(sign * statistics.fmean(results[run]["metrics"][key] for run in own) for key, sign in chosen)

    variants = dict.fromkeys(run.variant for run in runs)
    best = max(variants, key=lambda variant: score([run for run in runs if run.variant == variant]))
    return max((run for run in runs if run.variant == best), key=lambda run: score([run]))


def register_champion(client, name: str, runs: Sequence[StudyRun]) -> tuple[StudyRun, str] | None:
    """Registers the winner's adapter as a version of the model `name` and gives it the alias; returns the run and its URI.

    `runs`: finished runs. Those without a logged adapter, such as the base alone, cannot win. None where none can. A winner that is the
    champion already gets no second version.
    """
    from mlflow.exceptions import MlflowException

    ids = {run: run.result().get("mlflow_run_id") for run in runs}
    try:
        uris = {run: client.get_run(run_id).data.tags.get(MODEL_TAG) for run, run_id in ids.items() if run_id}
    except MlflowException as error:
        log.warning("no champion is named, because the runs were logged to another store: %s", error)
        return None
    winner = choose_winner([run for run, uri in uris.items() if uri])
    if winner is None:
        return None
    tags = {"variant": winner.variant, "seed": str(winner.seed)}
    return winner, register_version(client, name, uris[winner], ids[winner], ALIAS, tags)
