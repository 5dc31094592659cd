"""Which differences are shown: variants against their neighbours, leaders against all others, and what the study file
claims.

One test serves them all, `statistics.pooled`: a difference is shown where the interval that pays for the other questions
leaves out zero, and it is equivalent where that interval lies within the margin that the study file names. The questions
of a table are its trained variants; those of the leads all pairs of them, on every metric whose leader is named. The
untouched base stands outside the family: "does training change anything?" is another question, and asking it must not
cost the variants their power. Beside each stand the exact test, which assumes less, and the interval over seeds *and*
prompts. Speed is judged only where runs did not share a machine, and losses only where they are of the same quantity: one
prediction, one schedule of noise, one space.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from t2ilib.config import did_you_mean
from t2ilib.evaluation.metrics import Metric
from t2ilib.report.contents import StudyReport
from t2ilib.statistics.crossed import Crossed, cross
from t2ilib.statistics.pooled import Difference, Noise, differences, fit_noise, leads, not_tested, verdict
from t2ilib.statistics.power import seeds_needed, smallest_found
from t2ilib.statistics.signs import ExactDifference, exact_difference
from t2ilib.studies.champion import Choice, choose
from t2ilib.studies.file import Claim

SHARED = "not judged (the runs shared a machine)"
DIFFERENT = "not judged (it is of another quantity)"


@dataclass(frozen=True)
class Comparison:
    """One variant against another on one metric, and the verdict in plain words. `exact`: by the seeds that both have, None
    where they share none; `crossed`: over seeds and prompts, None where nothing is known of single pictures; `wanted`: of an
    undecided one the size that seeds are counted for, the margin or else what was seen, and `seeds`: how many show it in four
    of five studies, None above a thousand; where nothing was seen, what these seeds show."""

    difference: Difference
    verdict: str
    exact: ExactDifference | None = None
    crossed: Crossed | None = None
    wanted: float | None = None
    seeds: int | None = None


@dataclass(frozen=True)
class Judgement:
    """A claim, the verdict on it in plain words, and the comparison that it is judged by; None where there is none,
    which `note` then explains."""

    claim: Claim
    than: str
    verdict: str
    comparison: Comparison | None = None
    note: str = ""


def values_like(report: StudyReport, metric: str, variant: str) -> dict[str, dict[int, float]]:
    """{variant: {seed: value}} of all that measured the metric and mean the same by it as `variant`: they share its noise."""
    found = {name: values for name in report.variants if (values := report.values(name, metric))}
    return {name: values for name, values in found.items() if report.one_quantity(metric, name, variant)}


def still(report: StudyReport) -> list[str]:
    """The untouched base, which has no noise of training."""
    return [report.base] if report.base else []


def noise_of(report: StudyReport, metric: str) -> Noise | None:
    """What runs of the study vary by on a metric, as the reference means it; None where no variant has two."""
    return fit_noise(values_like(report, metric, report.reference), still(report))


def compare(report: StudyReport, metric: str, against: str | None = None) -> dict[str, Comparison]:
    """Every variant and what it is compared with (`against`, or the neighbour that it names, or the reference), those that
    both measured the metric."""
    others = {name: against or report.against(name) for name in report.variants}
    measured = [name for name in report.variants if report.values(name, metric)]
    pairs = [(name, others[name]) for name in measured if name != others[name] and others[name] in measured]
    families = list(families_of(report, metric, [pair for pair in pairs if report.base not in pair]))
    asked = [(family, len(families)) for family in families]
    asked += [([pair], 1) for pair in pairs if report.base in pair]
    found = {}
    for family, questions in asked:
        one, other = family[0]
        pool = values_like(report, metric, one if other == report.base else other)
        pool |= {name: report.values(name, metric) for pair in family for name in pair}
        noise = fit_noise(pool, still(report))
        for pair, difference in zip(family, differences(pool, family, still(report), questions), strict=True):
            found[pair[0]] = judge_pair(report, metric, pair, difference, noise)
    return {name: found[name] for name, _ in pairs}


def families_of(report: StudyReport, metric: str, pairs: Sequence[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """The pairs by what they mean by the metric, which is mostly one thing."""
    left = list(pairs)
    while left:
        alike = [pair for pair in left if report.one_quantity(metric, *left[0], *pair)]
        alike = alike or left[:1]  # a pair that does not mean the same itself, and is not judged
        yield alike
        left = [pair for pair in left if pair not in alike]


def judge_pair(
    report: StudyReport, metric: str, pair: tuple[str, str], difference: Difference, noise: Noise | None
) -> Comparison:
    known = report.about(metric)
    if reason := why_not_judged(report, metric, *pair):
        return Comparison(difference, reason)
    margin = report.margins.get(metric)
    said = judge(difference, known, margin)
    if known.exact:
        return Comparison(difference, said)
    one, other = ({run.seed: run.by_prompt(metric) for run in report.runs_of(name)} for name in pair)
    crossed = cross(one, other, difference) if all((*one.values(), *other.values())) else None
    exact = None if report.base in pair else exact_difference(*(report.values(name, metric) for name in pair))
    wanted, seeds = None, None
    if difference.shown == 0 and noise is not None and difference.alpha is not None:
        trained = [name for name in pair if name not in noise.still]
        deviation = math.sqrt(sum(noise.of(name)[0] ** 2 for name in trained) / len(trained))
        variants = len(trained) if difference.noisier else len(noise.counts.keys() - noise.still)
        asked = (variants, difference.alpha, report.base in pair)
        wanted, seeds = margin or abs(difference.mean), min(difference.runs)
        if wanted:
            seeds = seeds_needed(wanted, deviation, *asked)
        else:  # nothing was seen: what these seeds would have found
            wanted = smallest_found(deviation, seeds, *asked)
    return Comparison(difference, said, exact, crossed, wanted, seeds)


def why_not_judged(report: StudyReport, metric: str, *variants: str) -> str:
    """Why a metric says nothing about which of these variants is better; "" where it does."""
    if report.about(metric).role == "speed" and not report.timed_alone(*variants):
        return SHARED
    return "" if report.one_quantity(metric, *variants) else DIFFERENT


def judge(difference: Difference, metric: Metric, margin: float | None = None) -> str:
    if metric.exact:
        return "equal" if difference.mean == 0 else "higher" if difference.mean > 0 else "lower"
    if metric.better is None:
        return "not judged"
    return verdict(difference, metric.better == "higher", margin)


def competing(report: StudyReport, metric: str) -> dict[str, dict[int, float]]:
    """{trained variant: {seed: value}} of those that measured it."""
    return {name: values for name in report.trained if (values := report.values(name, metric))}


def is_tested(report: StudyReport, metric: str) -> bool:
    """Whether naming the leader on a metric asks whether it is seed noise."""
    known, names = report.about(metric), competing(report, metric)
    return len(names) > 1 and not known.exact and not why_not_judged(report, metric, *names)


def leads_on(report: StudyReport, metric: str, leader: str, named: Iterable[str]) -> dict[str, Difference]:
    """Leader - other for every other trained variant. `named`: the metrics whose leaders are named beside this one."""
    questions = max(1, sum(is_tested(report, other) for other in named))
    return leads(competing(report, metric), leader, questions)


def chosen(report: StudyReport) -> Choice | None:
    """Who leads by the champion's rule; None where nothing decides."""
    results: Mapping[str, Mapping[int, Mapping[str, float]]] = {
        name: {run.seed: run.metrics for run in runs} for name in report.trained if (runs := report.runs_of(name))
    }
    comparable = {name: about for name, about in report.metrics.items() if report.one_quantity(name, *report.trained)}
    titles = {name: variant.title for name, variant in report.variants.items()}
    return choose(results, comparable, titles, report.score)


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
        return not_tested(max(difference.runs))
    upwards = (claim.direction == "better") == (known.better == "higher") if relative else claim.direction == "higher"
    if shown == (1 if upwards else -1):
        return "shown"
    return "contradicted" if shown or known.exact else "not shown"
