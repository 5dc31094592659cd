"""A study's champion: the best adapter of a finished preset, registered in MLflow under the alias `champion`.

There is one only where its variant's lead can be told from seed noise against every other trained variant, by the same test as the
report's: whoever loads a champion takes it for better than the rest. A study registers one version for each new winner
under its name, and moves the alias to it: `models:/<study>-<preset>@champion`; where no lead is shown any more, the alias goes.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from t2ilib.evaluation.metrics import Metric
from t2ilib.evaluation.statistics import max_statistic, paired_difference, smallest_p, verdict
from t2ilib.studies.runs import StudyRun
from t2ilib.tracking.models import MODEL_TAG, register_version

ALIAS = "champion"
CRITERIA = ("learned", "kept", "loss", "followed")
"""Roles of metrics, what decides a study first: of each the first metric that its runs measured; later ones break ties."""


@dataclass(frozen=True)
class Lead:
    """The best run of the variant that leads, by the metric that decides. `doubt`: why it is no champion; "" where it is one."""

    run: StudyRun
    metric: Metric
    doubt: str


def criteria(results: Sequence[dict]) -> dict[str, Metric]:
    """Metric -> what it is, in the order of CRITERIA, of those that every run measured."""
    known = {key: Metric(**about) for result in results for key, about in result["measures"].items()}
    found = {}
    for role in CRITERIA:
        named = {key: metric for key, metric in known.items() if metric.role == role and metric.better}
        everywhere = [key for key in named if all(key in result["metrics"] for result in results)]
        found |= {key: known[key] for key in everywhere[:1]}
    return found


def find_lead(runs: Sequence[StudyRun]) -> Lead | None:
    """Who leads among the trained variants: the best mean over seeds, by CRITERIA; None where no run measured any of them.

    `runs`: finished runs, of which the untouched base does not compete.
    """
    trained = [run for run in runs if run.trains]
    results = {run: run.result() for run in trained}
    deciding = criteria(list(results.values()))
    if not deciding:
        return None
    values = {
        variant: {run.seed: results[run]["metrics"] for run in trained if run.variant == variant}
        for variant in dict.fromkeys(run.variant for run in trained)
    }

    def score(measured: Sequence[Mapping[str, float]]) -> tuple[float, ...]:
        return tuple(
            statistics.fmean(metrics[key] for metrics in measured) * (1 if metric.better == "higher" else -1)
            for key, metric in deciding.items()
        )

    best = max(values, key=lambda variant: score(list(values[variant].values())))
    run = max((run for run in trained if run.variant == best), key=lambda run: score([results[run]["metrics"]]))
    key, metric = next(iter(deciding.items()))
    by_seed = {variant: {seed: metrics[key] for seed, metrics in own.items()} for variant, own in values.items()}
    return Lead(run, metric, doubt_of(by_seed, best, metric))


def doubt_of(values: Mapping[str, Mapping[int, float]], leader: str, metric: Metric) -> str:
    """Why the lead on `metric` (`values`: variant -> {seed: value}) is not to be believed; "" where it is shown against all others.

    The leader is tested against every other, and p-values are adjusted for asking about all of them, as in the report's headline.
    """
    others = [name for name in values if name != leader]
    if not others:
        return "it is the only trained variant, so there is nothing that it leads"
    differences = {
        name: {seed: value - values[leader][seed] for seed, value in values[name].items() if seed in values[leader]}
        for name in others
    }
    adjusted = max_statistic(differences)
    higher = metric.better == "higher"
    close = [
        name
        for name in others
        if not differences[name]
        or verdict(paired_difference(values[name], values[leader]), adjusted[name], higher) != "worse"
    ]
    if not close:
        return ""
    seeds = len(values[leader])
    least = smallest_p(seeds)
    if least is None:
        return "with one seed nothing can be told from seed noise"
    few = f" (with {seeds} seeds none can be: six are needed)" if least >= 0.05 else ""
    return f"its lead cannot be told from seed noise against {', '.join(close)}{few}"


def name_champion(client, name: str, lead: Lead | None) -> str:
    """Registers the leader's adapter as a version of the model `name` and gives it the alias, or, where no lead is shown, takes the
    alias away; returns a line that says what came of it.

    A winner that is the champion already gets no second version.
    """
    from mlflow.exceptions import MlflowException

    if lead is None:
        withdraw(client, name)
        return "none: no run measured what could decide"
    who = f"{lead.run.variant} leads on {lead.metric.title}"
    run_id = lead.run.result().get("mlflow_run_id")
    try:
        uri = client.get_run(run_id).data.tags.get(MODEL_TAG) if run_id else None
    except MlflowException as error:
        return f"none: {who}, but its run was logged to another store ({error})"
    if doubt := lead.doubt or ("" if uri else "its run logged no adapter to register"):
        withdraw(client, name)
        return f"none: {who}, but {doubt}"
    tags = {"variant": lead.run.variant, "seed": str(lead.run.seed)}
    return f"{register_version(client, name, uri, run_id, ALIAS, tags)} ({lead.run.label})"


def withdraw(client, name: str) -> None:
    """Takes the alias from whatever version had it."""
    from mlflow.exceptions import MlflowException

    try:
        client.delete_registered_model_alias(name, ALIAS)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
