"""Which differences are shown: variants against their neighbours, leaders against all others, and what the study file
claims.

One test serves them all, `evaluation.statistics`: a difference is shown where the interval that pays for the other
questions leaves out zero. The questions of a table are its trained variants; those of the leads all pairs of them, on
every metric whose leader is named. The untouched base stands outside the family: "does training change anything?" is
another question, and asking it must not cost the variants their power. Speed is judged only where runs did not share
a machine, and losses only where they are of the same quantity: one prediction, one schedule of noise, one space.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from t2ilib.config import did_you_mean
from t2ilib.evaluation.metrics import Metric
from t2ilib.evaluation.statistics import PairedDifference, leads, not_tested, paired_difference, verdict
from t2ilib.report.reading import StudyReport
from t2ilib.studies.champion import Choice, choose
from t2ilib.studies.file import Claim

SHARED = "not judged (the runs shared a machine)"
DIFFERENT = "not judged (it is of another quantity)"


@dataclass(frozen=True)
class Comparison:
    """One variant against another on one metric, and the verdict in plain words."""

    difference: PairedDifference
    verdict: str


@dataclass(frozen=True)
class Judgement:
    """A claim, the verdict on it in plain words, and the comparison that it is judged by; None where there is none,
    which `note` then explains."""

    claim: Claim
    than: str
    verdict: str
    comparison: Comparison | None = None
    note: str = ""


def compare(report: StudyReport, metric: str, against: str | None = None) -> dict[str, Comparison]:
    """Every variant that shares seeds with what it is compared with (`against`, or the neighbour that it names, or the
    reference), paired by seed."""
    known = report.about(metric)
    others = {name: against or report.against(name) for name in report.variants}
    pairs = {
        name: (values, other)
        for name in report.variants
        if name != others[name]
        and (values := report.values(name, metric)).keys() & (other := report.values(others[name], metric)).keys()
    }
    family = sum(name != report.base for name in pairs)
    found = {}
    for name, (values, other) in pairs.items():
        difference = paired_difference(values, other, 1 if name == report.base else family)
        reason = why_not_judged(report, metric, name, others[name])
        found[name] = Comparison(difference, reason or judge(difference, known))
    return found


def why_not_judged(report: StudyReport, metric: str, *variants: str) -> str:
    """Why a metric says nothing about which of these variants is better; "" where it does."""
    if report.about(metric).role == "speed" and not report.timed_alone(*variants):
        return SHARED
    return "" if report.one_quantity(metric, *variants) else DIFFERENT


def judge(difference: PairedDifference, metric: Metric) -> str:
    if metric.exact:
        return "equal" if difference.mean == 0 else "higher" if difference.mean > 0 else "lower"
    if metric.better is None:
        return "not judged"
    return verdict(difference, metric.better == "higher")


def competing(report: StudyReport, metric: str) -> dict[str, dict[int, float]]:
    """{trained variant: {seed: value}} of those that measured it."""
    return {name: values for name in report.trained if (values := report.values(name, metric))}


def is_tested(report: StudyReport, metric: str) -> bool:
    """Whether naming the leader on a metric asks whether it is seed noise."""
    known, names = report.about(metric), competing(report, metric)
    return len(names) > 1 and not known.exact and not why_not_judged(report, metric, *names)


def leads_on(report: StudyReport, metric: str, leader: str, named: Iterable[str]) -> dict[str, PairedDifference]:
    """Leader - other for every other trained variant. `named`: the metrics whose leaders are named beside this one."""
    questions = max(1, sum(is_tested(report, other) for other in named))
    return leads(competing(report, metric), leader, questions)


def chosen(report: StudyReport) -> Choice | None:
    """Who leads by the champion's rule; None where nothing decides."""
    results: Mapping[str, Mapping[int, Mapping[str, float]]] = {
        name: {run.seed: run.metrics for run in runs} for name in report.trained if (runs := report.runs_of(name))
    }
    comparable = {name: about for name, about in report.metrics.items() if report.one_quantity(name, *report.trained)}
    return choose(results, comparable, {name: variant.title for name, variant in report.variants.items()})


def judge_claims(report: StudyReport, name: str) -> list[Judgement]:
    """The claims of a variant, each judged by the difference to what it is held against: shown, contradicted (the
    opposite is shown), not shown, or why it is not judged."""
    found = []
    for claim in report.variants[name].claims:
        than = claim.than or report.against(name)
        comparison = compare(report, claim.metric, None if than == report.against(name) else than).get(name)
        measured = {metric for run in report.runs.values() for metric in run.metrics}
        if comparison is None:
            unknown = f"no run has {claim.metric}.{did_you_mean(claim.metric, measured)}"
            found.append(Judgement(claim, than, "not measured", None, "" if claim.metric in measured else unknown))
        else:
            found.append(Judgement(claim, than, judged(report.about(claim.metric), claim, comparison), comparison))
    return found


def judged(known: Metric, claim: Claim, comparison: Comparison) -> str:
    difference, relative = comparison.difference, claim.direction in ("better", "worse")
    if comparison.verdict in (SHARED, DIFFERENT):
        return comparison.verdict
    if relative and known.better is None:
        return "not judged (neither way is better: claim higher or lower)"
    shown = (difference.mean > 0) - (difference.mean < 0) if known.exact else difference.shown
    if shown is None:
        return not_tested(difference.num_pairs)
    upwards = (claim.direction == "better") == (known.better == "higher") if relative else claim.direction == "higher"
    if shown == (1 if upwards else -1):
        return "shown"
    return "contradicted" if shown or known.exact else "not shown"
