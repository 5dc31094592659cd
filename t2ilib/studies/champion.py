"""A study's champion: an adapter of the variant that leads, registered in MLflow under the alias `champion`.

The rule, which the report states too: variants compete by the study's `score`, which without a formula is what they learned and kept
together, where every run measured both as shares, and otherwise by the first of CRITERIA that every run measured (`scoring`). There is a champion only
where the lead is shown against every other trained variant, all pairs paid for. Of the leader's runs the one nearest
to their median is registered: the best one would be the luck of its seed.

A study registers one version for each new winner under its name, and moves the alias to it:
`models:/<study>-<preset>@champion`; where no lead is shown any more, the alias goes.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from t2ilib.evaluation.metrics import Metric
from t2ilib.statistics.pooled import leads, not_tested
from t2ilib.studies.runs import StudyRun
from t2ilib.studies.scoring import scoring
from t2ilib.tracking.models import MODEL_TAG, NO_MODEL, register_version

ALIAS = "champion"


@dataclass(frozen=True)
class Choice:
    """Who leads. `values`: variant -> {seed: score}, by `metric`, which is made of `parts`; `seed`: of the leader's
    run that stands for it; `doubt`: why the leader is no champion, "" where it is one."""

    leader: str
    seed: int
    metric: Metric
    parts: tuple[Metric, ...]
    values: Mapping[str, Mapping[int, float]]
    doubt: str


@dataclass(frozen=True)
class Lead:
    """The run that stands for the variant that leads, by the metric that decides. `doubt`: why it is no champion; ""
    where it is one."""

    run: StudyRun
    metric: Metric
    doubt: str


def choose(
    results: Mapping[str, Mapping[int, Mapping[str, float]]],
    declared: Mapping[str, Metric],
    titles: Mapping[str, str] | None = None,
    score: str | None = None,
) -> Choice | None:
    """Who leads by the study's `score`, or by the rule, and whether the lead is shown; None where the rule has no metric of CRITERIA that
    every run measured. Raises ConfigError as `scoring` does.

    `results`: trained variant -> {seed: metrics}. `titles`: what variants are called in a doubt.
    """
    every = [metrics for by_seed in results.values() for metrics in by_seed.values()]
    scored = scoring(every, declared, score) if every else None
    if scored is None:
        return None
    metric = scored.metric
    values = {
        variant: {seed: scored.of(metrics) for seed, metrics in by_seed.items()} for variant, by_seed in results.items()
    }
    best_of = max if metric.better == "higher" else min
    leader = best_of(values, key=lambda variant: statistics.fmean(values[variant].values()))
    middle = statistics.median(values[leader].values())
    seed = min(values[leader], key=lambda seed: (abs(values[leader][seed] - middle), seed))
    doubt = doubt_of(values, leader, metric, titles or {})
    parts = tuple(declared.get(key) or Metric(key) for key in scored.parts)
    return Choice(leader, seed, metric, parts, values, doubt)


def doubt_of(values: Mapping[str, Mapping[int, float]], leader: str, metric: Metric, titles: Mapping[str, str]) -> str:
    """Why a lead is not to be believed; "" where it is shown against all others."""
    others = [name for name in values if name != leader]
    if not others:
        return "it is the only trained variant, so there is nothing that it leads"
    found, way = leads(values, leader), 1 if metric.better == "higher" else -1
    close = [titles.get(name, name) for name in others if name not in found or found[name].shown != way]
    if close and all(difference.shown is None for difference in found.values()):
        return f"its lead is {not_tested(len(values[leader]))}: two are needed"
    return f"its lead is not shown against {'; '.join(close)}" if close else ""


def find_lead(runs: Sequence[StudyRun], score: str | None = None) -> Lead | None:
    """Who leads among finished runs, of which the untouched base does not compete; None where no run measured what
    decides."""
    trained = {(run.variant, run.seed): run for run in runs if run.trains}
    found = {place: run.result() for place, run in trained.items()}
    declared: dict[str, Metric] = {}
    mixed: set[str] = set()
    for result in found.values():
        own = {key: Metric(**about) for key, about in result["measures"].items()}
        mixed |= {key for key in own.keys() & declared.keys() if own[key].quantity != declared[key].quantity}
        declared |= own
    results: dict[str, dict[int, Mapping[str, float]]] = {}
    for (variant, seed), result in found.items():
        results.setdefault(variant, {})[seed] = result["metrics"]
    choice = choose(results, {key: metric for key, metric in declared.items() if key not in mixed}, score=score)
    return choice and Lead(trained[choice.leader, choice.seed], choice.metric, choice.doubt)


def name_champion(client, name: str, lead: Lead | None, about: str = "", tags: Mapping[str, str] | None = None) -> str:
    """Registers the leader's adapter as a version of the model `name` and gives it the alias, or, where no lead is
    shown, takes the alias away; returns a line that says what came of it. `about`, in Markdown, and `tags` are said of
    both.

    A winner that is the champion already gets no second version, but is described anew.
    """
    from mlflow.exceptions import MlflowException

    if lead is None:
        withdraw(client, name)
        return "none: no run measured what could decide"
    who = f"{lead.run.variant} leads on {lead.metric.title}"
    run_id = lead.run.result().get("mlflow_run_id")
    try:
        logged = client.get_run(run_id).data.tags if run_id else {}
    except MlflowException as error:
        return f"none: {who}, but its run was logged to another store ({error})"
    uri, reason = logged.get(MODEL_TAG), f": {logged[NO_MODEL]}" if NO_MODEL in logged else ""
    if doubt := lead.doubt or ("" if uri else f"its run logged no adapter to register{reason}"):
        withdraw(client, name)
        return f"none: {who}, but {doubt}"
    own = {name: value for name, value in lead.run.tags.items() if not name.startswith("mlflow.")}
    own |= {"variant": lead.run.variant, "seed": str(lead.run.seed), **(tags or {})}
    return f"{register_version(client, name, uri, run_id, ALIAS, own, about)} ({lead.run.label})"


def withdraw(client, name: str) -> None:
    """Takes the alias from whatever version had it."""
    from mlflow.exceptions import MlflowException

    try:
        client.delete_registered_model_alias(name, ALIAS)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
