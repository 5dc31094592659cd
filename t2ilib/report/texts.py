"""What the numbers say, in sentences: a headline for the study, who is its champion, and a page for each variant.

A sentence restates a number or a verdict, nothing else. A study sees that a setting and a number changed together; it
does not see why, so no text here reasons. Hypotheses are quoted as their author wrote them; what can be tested of
one, its author says as claims.
"""

import json
from collections.abc import Mapping
from typing import Any

from t2ilib.config import RunConfig, check_choice
from t2ilib.evaluation.metrics import Metric
from t2ilib.report.comparing import (
    Comparison,
    Judgement,
    chosen,
    compare,
    competing,
    is_tested,
    judge_claims,
    leads_on,
    why_not_judged,
)
from t2ilib.report.contents import StudyReport
from t2ilib.report.tables import write_mean, write_number, write_p, write_together, write_verdict
from t2ilib.report.trust import explain_declared
from t2ilib.statistics.means import mean_interval
from t2ilib.statistics.pooled import not_tested
from t2ilib.studies.runs import changes
from t2ilib.studies.scoring import CRITERIA

QUALITY, COST = CRITERIA, ("memory", "size", "speed")
"""Roles of metrics."""
NAMED = 3
"""So many that are equal are named."""


def headline(report: StudyReport) -> str:
    """Markdown: which variant learned most, forgot least and cost least, and whether each lead can be told from seed
    noise.

    Where nothing counts what was learned, the other measures of quality stand in for it.
    """
    stand_in = [] if report.with_role("learned") else report.speaking(*QUALITY)
    told = {name: report.metrics[name].headline or claim(report, name) for name in stand_in}
    told |= {name: said for name in report.measured() if (said := report.metrics[name].headline)}
    told = {name: said for name, said in told.items() if said and is_fair(report, name)}
    lines = [lead(report, name, told) for name in told]
    return "\n".join(f"- {line}" for line in lines if line) or "- Nothing was measured yet."


def is_fair(report: StudyReport, metric: str) -> bool:
    """Whether a leader can be named at all: not the fastest of runs that shared a machine."""
    return not why_not_judged(report, metric, *competing(report, metric))


def claim(report: StudyReport, metric: str) -> str:
    """What the leader on a metric without words of its own is said to have, such as "Lowest held-out loss"; "" where
    nothing leads."""
    known = report.metrics[metric]
    return {"lower": f"Lowest {known.title}", "higher": f"Highest {known.title}"}.get(known.better, "")


def lead(report: StudyReport, metric: str, told: dict[str, str]) -> str:
    """One line: the leader on `metric`, and against whom its lead is shown; "" where no variant measured it. `told`:
    what the leaders on all metrics that are named here are said to be."""
    known, values = report.metrics[metric], competing(report, metric)
    if not values:
        return ""
    best_of = max if known.better == "higher" else min
    means = {name: mean_interval(own.values()).mean for name, own in values.items()}
    leaders = [name for name, mean in means.items() if mean == best_of(means.values())]
    titles = " and ".join(report.variants[name].title for name in leaders)
    if len(leaders) > NAMED:
        titles = f"{len(leaders)} of {len(means)} variants"
    line = f"**{told[metric]}: {titles}** ({write_mean(values[leaders[0]], known)})"
    others = [name for name in means if name not in leaders]
    if not others:
        return line + ("; nothing to compare it with." if len(leaders) == 1 else "; all are equal.")
    if len(leaders) > 1 or not is_tested(report, metric):
        second = best_of(others, key=means.__getitem__)
        return f"{line}; next is {report.variants[second].title} ({write_number(means[second], known)})."
    way = 1 if known.better == "higher" else -1
    found = leads_on(report, metric, leaders[0], told)
    shown = [report.variants[name].title for name in others if name in found and found[name].shown == way]
    return f"{line}; {lead_shown(shown, len(others), found, len(values[leaders[0]]))}"


def lead_shown(shown: list[str], others: int, found: dict, seeds: int) -> str:
    if all(difference.shown is None for difference in found.values()):
        return f"lead **{not_tested(seeds)}**."
    if not shown:
        return f"lead **not shown** against any of the other {others}."
    if len(shown) == others:
        return f"lead **shown** against all {others} others."
    return f"lead **shown** against {'; '.join(shown)}; not against the other {others - len(shown)}."


def champion(report: StudyReport) -> str:
    """The champion's rule and what comes of it, in two sentences; "" where nothing decides."""
    choice = chosen(report)
    if choice is None:
        return ""
    parts = " and ".join(f"*{metric.title}*" for metric in choice.parts)
    decides = f"best {parts}" if len(choice.parts) == 1 else f"highest harmonic mean of {parts}"
    if report.score:
        decides = f"best score by the study's formula, `{report.score}`"
    rule = (
        f"The champion is the trained variant with the {decides}, if its lead is shown against every other one; the run"
        " nearest to its median stands for it."
    )
    who = f"{report.variants[choice.leader].title} leads ({write_mean(choice.values[choice.leader], choice.metric)})"
    if report.missing or report.not_run:
        return f"{rule} None yet, since runs are missing; so far {who}."
    if choice.doubt:
        return f"{rule} None: {who}, but {choice.doubt}."
    return f"{rule} {who}, with the run of seed {choice.seed}."


def describe_variant(report: StudyReport, name: str) -> str:
    """Markdown: *Overview*, *How it helps*, *Origin of the idea* as the study tells them; *Settings*, by which it differs from what it is
    compared with; *Result* as measured; *Why*: the hypothesis as its author wrote it, and what came of its claims."""
    check_choice(name, report.variants, "variant")
    variant = report.variants[name]
    told = {"Overview": variant.overview, "How it helps": variant.how_it_helps, "Origin of the idea": variant.origin}
    parts = [f"### {variant.title} (`{name}`)"]
    parts += [f"*{heading}.* {text or 'The study file does not say.'}" for heading, text in told.items()]
    if different := settings_text(report, name):
        parts.append(f"*Settings.* {different}")
    parts += [f"*Result.* {result_text(report, name)}", f"*Why.* {why_text(report, name)}"]
    return "\n\n".join(parts)


def settings_text(report: StudyReport, name: str) -> str:
    """Every field by which a variant differs from what it is compared with, as their runs recorded them, or, where one has not run, as
    the study file says them; "" where there is nothing to compare."""
    other = report.against(name)
    recorded = [next((run.settings for run in report.runs_of(one) if run.settings), None) for one in (other, name)]
    before, now = recorded if all(recorded) else (report.variants[one].run for one in (other, name))
    told = [] if other == name else told_changes(before, now)
    return f"Other than {report.variants[other].title}: {'; '.join(told)}." if told else ""


def told_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """ "`prior.share: 0.25` instead of `0.5`", for every field that differs; a section that is not there any more as a whole."""
    told: dict[str, str] = {}
    for field, (old, value) in changes(before, now).items():
        section, _, name = field.partition(".")
        if name in (now.get(section) or {}):
            instead = "" if old is None else f" instead of `{json.dumps(old, ensure_ascii=False)}`"
            told[field] = f"`{field}: {json.dumps(value, ensure_ascii=False)}`{instead}"
        else:
            gone = section if now.get(section) is None and RunConfig.model_fields[section].default is None else field
            told[gone] = f"no `{gone}`"
    return list(told.values())


def result_text(report: StudyReport, name: str) -> str:
    """A list of the main numbers with intervals, each with its difference to what it is compared with and the
    verdict."""
    finished = len(report.runs_of(name))
    if not finished:
        return "No run of this variant finished, so nothing was measured."
    lines = [f"{finished} of {len(report.seeds)} runs finished."]
    for metric in report.with_role(*QUALITY, *COST):
        values = report.values(name, metric)
        if values:
            line = f"- {report.metrics[metric].title}: {write_mean(values, report.metrics[metric])}"
            comparison = compare(report, metric).get(name)
            told = f"; {told_against(report, report.against(name), metric, comparison)}" if comparison else ""
            lines.append(line + told)
    return "\n".join([lines[0], "", *lines[1:]])


def told_against(report: StudyReport, other: str, metric: str, comparison: Comparison) -> str:
    """ "+10.0 pp against the reference (95% interval ...): **better**"."""
    known, difference = report.about(metric), comparison.difference
    against = "the reference" if other == report.reference else report.variants[other].title
    text = f"{write_number(difference.mean, known, signed=True)} against {against}"
    return text if known.exact else f"{text}{doubt_about(difference, known)}: **{write_verdict(comparison, known)}**"


def doubt_about(difference, known: Metric) -> str:
    interval = write_together(difference, known)
    p = f", p {write_p(difference.p_value)}" if difference.together else ""
    return f" ({interval}{p})" if interval else ""


def why_text(report: StudyReport, name: str) -> str:
    """The hypothesis in its author's words, and the claims with what the test says of each."""
    hypothesis = report.variants[name].hypothesis
    quoted = f"The hypothesis: “{hypothesis}”" if hypothesis else "The study file names no hypothesis."
    claims = judge_claims(report, name)
    if not claims:
        return quoted + " No claim was made of it, so it is not judged here." * bool(hypothesis)
    return "\n".join(
        [f"{quoted} Claimed, and judged by the test of the tables:", "", *(told_claim(report, one) for one in claims)]
    )


def told_claim(report: StudyReport, judgement: Judgement) -> str:
    """ "- concept learned higher than LORA: **shown** (+10.0 pp; 95% interval ...)"."""
    claim, comparison, known = judgement.claim, judgement.comparison, report.about(judgement.claim.metric)
    line = f"- {known.title} {claim.direction} than {report.variants[judgement.than].title}: **{judgement.verdict}**"
    if comparison is None:
        return line + f" ({judgement.note})" * bool(judgement.note)
    doubt = "" if known.exact else write_together(comparison.difference, known)
    return f"{line} ({write_number(comparison.difference.mean, known, signed=True)}{f'; {doubt}' if doubt else ''})"


MEANINGS = {
    "concept/all": "share of prompts with a new concept whose picture shows it and is right in every other attribute.",
    "concept/shown": "share of prompts with a new concept in whose picture the checker finds it, whatever else is wrong.",
    "concept/chance": "what the same pictures score when each is held against every prompt instead of its own.",
    "concept/constant": "what one and the same picture for every prompt would score at best.",
    "world/all": "share of prompts whose picture is right in every attribute.",
    "world/chance": "what the same pictures score when each is held against every prompt instead of its own.",
    "world/constant": "what one and the same picture for every prompt would score at best.",
    "base_kept/all": "share of prompts from the world the base model knew whose picture is still right in every attribute. The untouched"
    " base is the level to keep.",
    "held_out_loss": "on pictures that were not trained on, at fixed timesteps and noise; lower is better.",
    "clip_score/prompts": "how well pictures agree with their prompts according to a contrastive model, 100 at the most. It knows common"
    " things, and hardly your own.",
}
"""What metrics mean that need a word, for those of them that a study measured."""


def explain_metrics(report: StudyReport) -> str:
    """Markdown: what the measured metrics mean, a line each; "" where they speak for themselves."""
    known = [name for name in MEANINGS if name in report.measured()]
    lines = [f"- **{report.metrics[name].title}**: {MEANINGS[name]}" for name in known]
    return "\n".join([*lines, *explain_declared(report)])


VERDICTS = (
    "Means over seeds ± half of their 95% intervals. The verdict is on the difference to the variant under *against*: **better** or"
    " **worse**; **equivalent**, where it is shown to be smaller than would matter; or **undecided**, where noise could be all of it."
)
"""How to read the table of verdicts."""


def explain_reading(report: StudyReport) -> str:
    """Markdown: how to read the tables, for someone who has not met these words."""
    margins = "; ".join(
        f"{report.about(name).title} {write_number(size, report.about(name), signed=True).removeprefix('+')}"
        for name, size in report.margins.items()
    )
    matter = (
        f"**Equivalent**: that interval lies within what would matter by the study file ({margins}): two one-sided tests."
        if margins
        else "**Equivalent** is never said here: the study file names no `margins`, the differences from which on it would matter."
    )
    return (
        "- **±**: half the 95% t-interval of the mean over seeds. A wide one means seeds disagree, or there are few.\n"
        "- **difference**: mean of the variant minus mean of what it is compared with; for shares in percentage points (pp).\n"
        "- **95% interval alone**: of that one difference, as if nothing else had been asked, for other seeds and these prompts.\n"
        "- **of all together**: the interval that decides. In 95 of 100 studies all intervals of a table hold their true difference. It"
        " assumes that runs vary independently, roughly normally, and alike for all variants; a variant that visibly varies more stands"
        " with its own noise. What runs vary by is pooled over all variants, so that two or three seeds can say something. **p** goes"
        " with it.\n"
        "- **over prompts too**: the same for other seeds *and* other prompts of the kind.\n"
        "- **P(above)**: the probability that a new run of the variant gives a higher number than a new run of the other.\n"
        "- **exact p**: of flipping signs seed by seed, which assumes only that noise favours neither. A check, for this difference"
        " alone; with fewer than six seeds it could not be below 0.05, and is not shown.\n"
        f"- **better / worse / shown**: that interval leaves out zero. {matter} **Undecided** does not mean equal: the interval says how"
        " large the difference could still be, and in brackets stands how many seeds would show a difference that matters, or else one"
        " as large as was seen, in four of five studies. **Not tested**: no variant has two seeds.\n"
        "- **lead**: whoever leads was picked by the numbers, so its lead is held against all pairs of variants, on all metrics whose"
        " leader is named.\n"
        "- **–**: not measured. Nothing here is filled in with a zero."
    )
