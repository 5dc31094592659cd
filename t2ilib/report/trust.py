"""How far the measures that need no checker can be trusted, for a report: what each of them means, how well it orders runs whose truth is
known, and which runs it flags. All of it comes from declarations, so a user's own measure is told in the same way.
"""

from t2ilib.evaluation.metrics import flagged
from t2ilib.evaluation.strength import passes, told_strength, was_checked
from t2ilib.report.contents import StudyReport

DECIDING = ("learned", "kept")
"""Roles of measures whose order of variants a reader will act on."""


def explain_declared(report: StudyReport) -> list[str]:
    """Markdown: a line for each measured metric that says of itself what it is, with its strength where that is known; what several have in
    common is said once, under their table's title."""
    told: dict[str, list[str]] = {}
    for name in report.measured():
        if note := report.metrics[name].note:
            told.setdefault(note, []).append(name)
    lines = []
    for note, names in told.items():
        known = {name: said for name in names if (said := told_strength(name))}
        first = report.metrics[names[0]]
        if len(names) == 1:
            lines.append(f"- **{first.title}**: {note} {known.get(names[0], '')}".rstrip())
        else:
            lines.append(f"- **{first.table}**: {note}")
            lines += [f"  - {report.metrics[name].title}: {said}" for name, said in known.items()]
    return lines


def flags(report: StudyReport) -> list[str]:
    """A sentence for each trained variant and metric of which runs lie above the ceiling."""
    found: dict[tuple[str, str], list[int]] = {}
    for (variant, seed), run in report.runs.items():
        for name in flagged(run.metrics, run.declared) if variant in report.trained else ():
            found.setdefault((variant, name), []).append(seed)
    return [
        f"{report.variants[variant].title}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, sorted(seeds)))}: **{about.flag}**"
        f" ({about.title})."
        for (variant, name), seeds in found.items()
        if (about := report.about(name))
    ]


def weak(report: StudyReport) -> list[str]:
    """A sentence for each of the metrics that speak for what was learned or kept and were held against the checker without passing."""
    speaking = {role: name for role in DECIDING for name in report.speaking(role)}
    return [
        f"{report.about(name).title} is a weak measure of what was {role}: {told_strength(name, role)}"
        for role, name in speaking.items()
        if was_checked(name, role) and not passes(name, role)
    ]
