"""How many verdicts of a study change once each variant runs at its own best: the study at tuned values beside itself at one common rate.

Both are judged each by its own runs and its own table; a verdict is one variant against what it is compared with, on one metric. What was
run in one of them alone is left out, and told.
"""

from dataclasses import dataclass

from t2ilib.config import ConfigError
from t2ilib.report.comparing import compare
from t2ilib.report.contents import StudyReport
from t2ilib.report.tables import markdown_table
from t2ilib.studies.scoring import CRITERIA


@dataclass(frozen=True)
class Pair:
    """A verdict at tuned values, and at one common rate."""

    metric: str
    variant: str
    against: str
    tuned: str
    common: str

    @property
    def changed(self) -> bool:
        return self.tuned != self.common


def verdicts(tuned: StudyReport, common: StudyReport) -> list[Pair]:
    """The verdicts that both studies give, on what was learned and kept, the loss, and how prompts were followed. Raises ConfigError for
    two reports that are not of one study."""
    if (tuned.name, tuned.reference) != (common.name, common.reference):
        raise ConfigError(
            f"{tuned.folder} is the study {tuned.name} against {tuned.reference}, and {common.folder} {common.name} against"
            f" {common.reference}: compare a study with itself"
        )
    found = []
    for metric in (name for name in tuned.speaking(*CRITERIA) if common.measured(name)):
        both = compare(tuned, metric), compare(common, metric)
        found += [
            Pair(metric, name, tuned.against(name), both[0][name].verdict, both[1][name].verdict)
            for name in both[0]
            if name in both[1] and tuned.against(name) == common.against(name)
        ]
    return found


def changed_markdown(tuned: StudyReport, common: StudyReport) -> str:
    """A sentence with the count, and a table of the verdicts that change."""
    pairs = verdicts(tuned, common)
    changed = [pair for pair in pairs if pair.changed]
    apart = sorted({*tuned.present} ^ {*common.present})
    lacking = f" Run in one of them alone: {', '.join(apart)}." if apart else ""
    if not pairs:
        return f"No verdict of this study is given both at tuned values and at one common rate.{lacking}"
    head = (
        f"**{len(changed)} of {len(pairs)} verdicts change** between this study at one common rate ({common.preset}) and with each variant"
        f" at its own best ({tuned.preset}).{lacking}"
    )
    rows = [
        {
            "metric": tuned.about(pair.metric).title,
            "name": tuned.variants[pair.variant].title,
            "against": tuned.variants[pair.against].title,
            "at one common rate": pair.common,
            "each at its own best": pair.tuned,
        }
        for pair in changed
    ]
    return f"{head}\n\n{markdown_table(rows)}" if rows else head
