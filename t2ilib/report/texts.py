"""What the numbers say, in sentences: a headline for the study and a page for each variant.

Sentences are composed from measured quantities and their verdicts only. A study sees that a setting and a number changed
together; it does not see why. So a text says "fits", never "because", and says "no difference shown" when that is so.
"""

from collections.abc import Sequence

from t2ilib.config import check_choice
from t2ilib.evaluation.statistics import PairedDifference, mean_interval, paired_difference, smallest_p
from t2ilib.report.reading import StudyReport
from t2ilib.report.tables import Comparison, compare, write_interval, write_mean, write_number, write_p

QUALITY, COST = ("learned", "kept", "loss", "followed"), ("memory", "size", "speed")
"""Roles of metrics."""
LAST_SHARE = 0.2
"""Of the steps: what "the loss at the end" averages over, because the loss of one step is mostly its timesteps and noise."""


def headline(report: StudyReport) -> str:
    """Markdown: which variant learned most, forgot least and cost least, and whether each lead can be told from seed noise.

    Where nothing counts what was learned, the other measures of quality stand in for it.
    """
    stand_in = [] if report.with_role("learned") else report.speaking(*QUALITY)
    told = {name: report.metrics[name].headline or claim(report, name) for name in stand_in}
    told |= {name: said for name in report.measured() if (said := report.metrics[name].headline)}
    lines = [lead(report, name, said) for name, said in told.items() if said]
    return "\n".join(f"- {line}" for line in lines if line) or "- Nothing was measured yet."


def claim(report: StudyReport, metric: str) -> str:
    """What the leader on a metric without words of its own is said to have, such as "Lowest held-out loss"; "" where nothing leads."""
    known = report.metrics[metric]
    return {"lower": f"Lowest {known.title}", "higher": f"Highest {known.title}"}.get(known.better, "")


def lead(report: StudyReport, metric: str, claim: str) -> str:
    """One line: the leader on `metric`, and against whom its lead is shown. "" where no variant measured it."""
    known = report.metrics[metric]
    best_of = max if known.better == "higher" else min
    means = {
        name: mean_interval(values.values()).mean for name in report.trained if (values := report.values(name, metric))
    }
    if not means:
        return ""
    best = best_of(means.values())
    leaders = [name for name, mean in means.items() if mean == best]
    titles = " and ".join(report.variants[name].title for name in leaders)
    line = f"**{claim}: {titles}** ({write_mean(report.values(leaders[0], metric), known)})"
    others = [name for name in means if name not in leaders]
    if not others:
        return line + ("; nothing to compare it with." if len(leaders) == 1 else "; all are equal.")
    if len(leaders) > 1 or known.exact:
        second = best_of(others, key=means.__getitem__)
        return f"{line}; next is {report.variants[second].title} ({write_number(means[second], known)})."
    return f"{line}; {lead_shown(report, metric, leaders[0], others)}"


def lead_shown(report: StudyReport, metric: str, leader: str, others: Sequence[str]) -> str:
    """Against whom a lead is shown: the leader is tested against every other, because testing only the runner-up that the data
    picked would flatter it."""
    compared = compare(report, metric, against=leader)
    shown = [report.variants[name].title for name in others if name in compared and compared[name].verdict == "worse"]
    if not shown and all(name in compared and compared[name].verdict.startswith("not tested") for name in others):
        return "lead **not tested** (one seed)."
    if not shown:
        return f"lead **not distinguishable** from seed noise against any of the other {len(others)}."
    if len(shown) == len(others):
        return f"lead **distinguishable** against all {len(others)} others."
    return f"lead **distinguishable** against {', '.join(shown)}; not against the other {len(others) - len(shown)}."


def describe_variant(report: StudyReport, name: str) -> str:
    """Markdown: *Overview*, *How it helps*, *Origin of the idea* as the study tells them; *Result* and *Why* as measured."""
    check_choice(name, report.variants, "variant")
    variant = report.variants[name]
    told = {"Overview": variant.overview, "How it helps": variant.how_it_helps, "Origin of the idea": variant.origin}
    parts = [f"### {variant.title} (`{name}`)"]
    parts += [f"*{heading}.* {text or 'The study file does not say.'}" for heading, text in told.items()]
    parts += [f"*Result.* {result_text(report, name)}", f"*Why.* {why_text(report, name)}"]
    return "\n\n".join(parts)


def result_text(report: StudyReport, name: str) -> str:
    """A list of the main numbers with intervals, each with its difference to the reference and the verdict."""
    finished = len(report.runs_of(name))
    if not finished:
        return "No run of this variant finished, so nothing was measured."
    lines = [f"{finished} of {len(report.seeds)} runs finished."]
    for metric in report.with_role(*QUALITY, *COST):
        values = report.values(name, metric)
        if values:
            line = f"- {report.metrics[metric].title}: {write_mean(values, report.metrics[metric])}"
            comparison = compare(report, metric).get(name) if name != report.against(name) else None
            lines.append(line + (f"; {told_against(report, name, metric, comparison)}" if comparison else ""))
    return "\n".join([lines[0], "", *lines[1:]])


def told_against(report: StudyReport, name: str, metric: str, comparison: Comparison) -> str:
    known, difference, other = report.metrics[metric], comparison.difference, report.against(name)
    against = "the reference" if other == report.reference else report.variants[other].title
    text = f"{write_number(difference.mean, known, signed=True)} against {against}"
    if known.exact:
        return text
    if difference.low is not None:
        text += f" (95% interval {write_interval(difference, known)}, adjusted p {write_p(comparison.adjusted_p)})"
    return f"{text}: **{comparison.verdict}**"


def why_text(report: StudyReport, name: str) -> str:
    """Reasoning from what was measured: capacity, fit, learning against forgetting, overfitting, and the hypothesis."""
    if not report.runs_of(name):
        return "Nothing can be said without a finished run."
    if name == report.base:
        return "This is the model before any fine-tuning: what the others learned and forgot is counted from here."
    own = overfitting(report, name)
    if name == report.reference:
        return " ".join(filter(None, ["The other variants are compared with this one.", own]))
    sentences = [
        capacity(report, name),
        fit(report, name),
        trade(report, name),
        own,
        gap_against_reference(report, name),
    ]
    return "\n\n".join(filter(None, [" ".join(filter(None, sentences)), hypothesis_text(report, name)]))


def compared(report: StudyReport, role: str, name: str) -> Comparison | None:
    """The comparison of a variant by the metric that speaks for a role, where there is one."""
    return next((compare(report, metric).get(name) for metric in report.speaking(role)), None)


def capacity(report: StudyReport, name: str) -> str:
    """How much it trains, as a ratio to the reference."""
    mine, theirs = (report.values(variant, "trainable_parameters") for variant in (name, report.reference))
    if not mine or not theirs or not any(theirs.values()):
        return ""
    own, reference = (mean_interval(values.values()).mean for values in (mine, theirs))
    if own == reference:
        return "It trains as many parameters as the reference, so capacity does not tell them apart."
    return f"It trains {own / reference:.2g} times the reference's parameters ({own:,.0f} against {reference:,.0f})."


def fit(report: StudyReport, name: str) -> str:
    """The held-out loss beside the concept: losses and pictures need not agree, and where they differ that is worth knowing."""
    loss, learned = (compared(report, role, name) for role in ("loss", "learned"))
    if loss is None:
        return ""
    if loss.verdict not in ("better", "worse"):
        return f"On held-out loss: {loss.verdict}."
    said = f"Its held-out loss is {'lower' if loss.verdict == 'better' else 'higher'} than the reference's"
    if learned is None or learned.verdict not in ("better", "worse"):
        return said + "."
    if learned.verdict == loss.verdict:
        return said + ", which fits what its pictures show."
    return said + ", while its pictures show the opposite: here the loss does not predict what is learned."


def trade(report: StudyReport, name: str) -> str:
    """Learning against forgetting, from the two verdicts together."""
    learned, kept = (compared(report, role, name) for role in ("learned", "kept"))
    if learned is None or kept is None:
        return ""
    said = {
        ("better", "worse"): "It learned more of the concept and kept less of the base: a trade, not a gain.",
        (
            "worse",
            "better",
        ): "It learned less of the concept and kept more of the base: a trade in the gentle direction.",
        ("better", "better"): "It learned more of the concept and kept more of the base: better on both counts.",
        ("worse", "worse"): "It learned less of the concept and kept less of the base: worse on both counts.",
        ("better", "no difference shown"): "It learned more of the concept; on keeping the base, no difference shown.",
        ("worse", "no difference shown"): "It learned less of the concept; on keeping the base, no difference shown.",
        ("no difference shown", "better"): "It kept more of the base; on learning the concept, no difference shown.",
        ("no difference shown", "worse"): "It kept less of the base; on learning the concept, no difference shown.",
        (
            "no difference shown",
            "no difference shown",
        ): "On learning the concept and on keeping the base: no difference shown.",
    }
    return said.get(
        (learned.verdict, kept.verdict), f"On learning the concept and on keeping the base: {learned.verdict}."
    )


def overfitting(report: StudyReport, name: str) -> str:
    """Whether the held-out loss, averaged over seeds, ended above its lowest point: more steps of this did not help."""
    curves = [
        run.history["held_out_loss"] for run in report.runs_of(name) if len(run.history.get("held_out_loss", {})) > 2
    ]
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    if len(steps) < 3:
        return ""
    means = {step: sum(curve[step] for curve in curves) / len(curves) for step in steps}
    lowest = min(steps, key=means.__getitem__)
    rise = means[steps[-1]] / means[lowest] - 1
    if lowest == steps[-1]:
        return f"Its held-out loss was lowest at the last measurement (step {lowest}): no sign of overfitting."
    said = f"Its held-out loss was lowest at step {lowest} and ended"
    if rise < 0.01:
        return f"{said} within 1 % of that: little left to gain, no clear overfitting."
    return f"{said} {100 * rise:.0f} % above that: a sign of overfitting by step {steps[-1]}."


def gaps(report: StudyReport, name: str) -> dict[int, float]:
    """{seed: held-out loss - mean training loss of the last fifth of the steps}, where a run logged both."""
    found = {}
    for run in report.runs_of(name):
        training, held_out = run.history.get("loss", {}), run.history.get("held_out_loss", {})
        if training and held_out:
            last = [loss for step, loss in training.items() if step > (1 - LAST_SHARE) * max(training)]
            found[run.seed] = held_out[max(held_out)] - sum(last) / len(last)
    return found


def gap_against_reference(report: StudyReport, name: str) -> str:
    """The gap between held-out and training loss against the reference's. The gap itself means little, because the two losses
    weight timesteps differently; that difference cancels between variants of one study."""
    mine, theirs = gaps(report, name), gaps(report, report.reference)
    if not mine.keys() & theirs.keys():
        return ""
    difference = paired_difference(mine, theirs)
    said = f"Its gap of held-out to training loss differs from the reference's by {difference.mean:+.4f}"
    if difference.low is None:
        return f"{said} (not tested)."
    return (
        f"{said} (95% interval {difference.low:+.4f} to {difference.high:+.4f}, not tested): {gap_meaning(difference)}."
    )


def gap_meaning(difference: PairedDifference) -> str:
    if difference.low > 0:
        return "a sign that it overfits more than the reference"
    if difference.high < 0:
        return "a sign that it overfits less than the reference"
    return "no difference shown"


def hypothesis_text(report: StudyReport, name: str) -> str:
    """The study's hypothesis beside the verdicts that bear on it. Which measure it is about only its author can say."""
    hypothesis = report.variants[name].hypothesis
    verdicts = {
        report.metrics[metric].title: found.verdict
        for metric in report.with_role(*QUALITY, *COST)
        if (found := compare(report, metric).get(name))
    }
    if not hypothesis or not verdicts:
        return ""
    decided = {verdicts.get(report.metrics[metric].title) for metric in report.with_role(*QUALITY)} & {
        "better",
        "worse",
    }
    if decided == {"better"}:
        close = "As far as it expects a gain in quality, the measurements support it."
    elif decided == {"worse"}:
        close = "As far as it expects no loss of quality, the measurements contradict it."
    elif decided:
        close = "The measurements go both ways: it holds for what is better and fails for what is worse."
    else:
        close = (
            "On quality this neither supports nor refutes it: the intervals say how large a difference could be."
            + power(report)
        )
    measured = "; ".join(f"{title}: {told}" for title, told in verdicts.items())
    return f"The hypothesis was: “{hypothesis}” Measured: {measured}. {close}"


def power(report: StudyReport) -> str:
    """A reminder where the number of seeds alone ruled out any other verdict."""
    least = smallest_p(len(report.seeds))
    return "" if least is not None and least < 0.05 else " With so few seeds, no other verdict was possible."


MEANINGS = {
    "concept/learned": "**concept learned**: share of prompts with a new concept in whose picture the checker really finds it;"
    " **concept prompt all right** asks for every other attribute too.",
    "base_kept/all": "**base kept**: share of prompts from the world the base model knew whose picture is still right in every"
    " attribute. The untouched base is the level to keep.",
    "concept/chance": "**by chance**: what guessing would reach.",
    "held_out_loss": "**held-out loss**: on pictures that were not trained on, at fixed timesteps and noise; lower is better.",
    "clip_score/prompts": "**CLIP score**: how well pictures agree with their prompts according to a contrastive model, 100 at the"
    " most. It knows common things, and hardly your own.",
}
"""What metrics mean that need a word, for those of them that a study measured."""


def explain_metrics(report: StudyReport) -> str:
    """Markdown: what the measured metrics mean, a line each; "" where they speak for themselves."""
    return "\n".join(f"- {MEANINGS[name]}" for name in MEANINGS if name in report.measured())


def explain_reading() -> str:
    """Markdown: how to read the tables, for someone who has not met these words."""
    return (
        "- **±** and **interval**: 95% t-interval of the mean over seeds. A wide one means seeds disagree, or there are few.\n"
        "- **difference**: variant minus reference *by seed*, then averaged, so what a seed does to both cancels; for shares in"
        " percentage points (pp).\n"
        "- **p**: exact sign-flip test of those differences; **p (adjusted)** also pays for comparing several variants at once.\n"
        "- **better / worse**: adjusted p below 0.05. **No difference shown** does not mean equal: it means that this many seeds"
        " cannot tell the difference from noise, and the interval says how large it could still be.\n"
        "- **–**: not measured. Nothing here is filled in with a zero."
    )
