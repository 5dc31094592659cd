"""What a study's runs vary by when nothing was changed, what pairing them saves, and how many seeds a difference needs.

The noise floor is the study's reference against itself: so far apart two means of the same variant lie in 95 of 100 studies.
"""

import math

from scipy import stats

from t2ilib.evaluation.metrics import Metric
from t2ilib.report.comparing import Comparison, compare, noise_of
from t2ilib.report.contents import StudyReport
from t2ilib.report.tables import NOT_MEASURED, Row, markdown_table, write_number, write_probability
from t2ilib.statistics.crossed import Pairing, pairing_by_seed
from t2ilib.statistics.means import LEVEL
from t2ilib.statistics.pooled import Noise
from t2ilib.statistics.power import POWER, power, seeds_needed, smallest_found
from t2ilib.studies.scoring import CRITERIA

COUNTS = (2, 3, 6, 12)
SIZES = {"share": (0.05, 0.10, 0.20)}
"""Differences that a table of power asks about, by the metric's unit; of other units multiples of one run's deviation."""
MULTIPLES = (0.5, 1.0, 2.0)
SAVES_NOTHING = 1.1
"""By what pairing must divide the variance at least to be worth a word."""


def noisy(report: StudyReport) -> dict[str, Noise]:
    """The metrics that speak for quality, with what runs vary by, those that vary."""
    found = {name: noise_of(report, name) for name in report.speaking(*CRITERIA)}
    return {name: noise for name, noise in found.items() if noise is not None and noise.deviation > 0}


def pairs_of(report: StudyReport) -> list[tuple[str, str]]:
    return [(name, other) for name in report.trained if (other := report.against(name)) != name]


def by_seed(report: StudyReport, metric: str) -> Pairing:
    """What pairing runs by seed saves, over all trained variants and what they are compared with."""
    pairs = [pair for pair in pairs_of(report) if report.base not in pair and report.one_quantity(metric, *pair)]
    return pairing_by_seed({name: report.values(name, metric) for name in report.variants}, pairs)


def by_prompt(report: StudyReport, metric: str) -> Pairing:
    """What pairing by prompt and drawing noise saves: the middle one of all comparisons; none without single pictures."""
    crossed = [one.crossed for name, one in compare(report, metric).items() if one.crossed and name != report.base]
    known = sorted((one.pairing for one in crossed if one.pairing.saved is not None), key=lambda one: one.saved)
    return known[len(known) // 2] if known else Pairing(None, None)


def noise_table(report: StudyReport) -> list[Row]:
    """A row a metric: by how much one run varies, the noise floor, and what pairing by seed and by prompt saves."""
    rows = []
    for name, noise in noisy(report).items():
        known, seeds, prompts = report.about(name), by_seed(report, name), by_prompt(report, name)
        rows.append(
            {
                "name": known.title,
                "one run": f"± {write_size(noise.deviation, known)}",
                "runs beyond the first": str(noise.df),
                "noise floor": f"± {write_size(floor(noise, report), known)}",
                "correlation by seed": write_correlation(seeds),
                "variance it saves": write_saved(seeds),
                "correlation by prompt": write_correlation(prompts),
                "variance that saves": write_saved(prompts),
            }
        )
    return rows


def floor(noise: Noise, report: StudyReport) -> float:
    """Half the 95% interval of the difference between the reference and itself, with as many seeds as it has."""
    seeds = noise.counts.get(report.reference) or max(noise.counts.values())
    return float(stats.t.isf((1 - LEVEL) / 2, noise.df)) * noise.deviation * math.sqrt(2 / seeds)


def write_size(size: float, metric: Metric) -> str:
    return write_number(size, metric, signed=True).removeprefix("+")


def write_correlation(pairing: Pairing) -> str:
    return NOT_MEASURED if pairing.correlation is None else f"{pairing.correlation:.2f}"


def write_saved(pairing: Pairing) -> str:
    return (
        NOT_MEASURED if pairing.saved is None else f"{pairing.saved:.1f} times less" if pairing.saved >= 1 else "none"
    )


def power_table(report: StudyReport, metric: str, noise: Noise, alpha: float) -> list[Row]:
    """A row a difference: how often so many seeds show it, and how many show it in four of five studies."""
    known, variants = report.about(metric), len(noise.counts.keys() - noise.still)
    margin = report.margins.get(metric)
    sizes = SIZES.get(known.unit) or tuple(noise.deviation * factor for factor in MULTIPLES)
    rows = []
    for size in sorted({*sizes, *([margin] if margin else [])}):
        needed = seeds_needed(size, noise.deviation, variants, alpha)
        shares = {
            f"{count} seeds": write_probability(power(size, noise.deviation, count, variants, alpha))
            for count in COUNTS
        }
        told = write_size(size, known) + " (what would matter)" * (size == margin)
        rows.append({"name": told, **shares, "seeds for 80 %": "over 1,000" if needed is None else str(needed)})
    return rows


def level_of(compared: dict[str, Comparison]) -> float:
    """The two-sided level of one question of a table."""
    return min((one.difference.alpha for one in compared.values() if one.difference.alpha), default=1 - LEVEL)


def power_tables(report: StudyReport) -> list[tuple[str, list[Row]]]:
    """For each metric that speaks for quality how often so many seeds show a difference, with a sentence about it, by what the study's runs
    vary by; [] where nobody knows."""
    tables = []
    for name, noise in noisy(report).items():
        trained = {key: one for key, one in compare(report, name).items() if key != report.base}
        alpha, known = level_of(trained), report.about(name)
        seeds = noise.counts.get(report.reference) or max(noise.counts.values())
        least = smallest_found(noise.deviation, seeds, len(noise.counts.keys() - noise.still), alpha)
        told = f"{known.title} (one run ± {write_size(noise.deviation, known)}): how often a difference is shown."
        told += f" With the {seeds} seeds of this study {write_size(least, known)} is found." if least else ""
        tables.append((told, power_table(report, name, noise, alpha)))
    return tables


def noise_markdown(report: StudyReport) -> str:
    """The report's section about noise; "" where nobody knows of any."""
    rows = noise_table(report)
    if not rows:
        return ""
    return (
        f"## Noise\n\n{markdown_table(rows)}\n\n**One run**: by how much it varies with its seed. **Noise floor**: the reference against"
        " itself; so far apart two means of the same variant lie in 95 of 100 studies of as many seeds. Verdicts do not pair runs by seed;"
        " intervals over prompts pair by prompt and starting noise.\n\n### How many seeds a difference needs\n\n"
        + "\n\n".join(f"{told}\n\n{markdown_table(table)}" for told, table in power_tables(report))
    )


def told_noise(report: StudyReport) -> list[str]:
    """What noise has to be said of before the tables are believed: variants that vary more than others, and pairing by seed."""
    notes = []
    for name, noise in noisy(report).items():
        known = report.about(name)
        loud = [
            f"{report.variants[one].title} (one run ± {write_size(own, known)}, others together {write_size(noise.deviation, known)})"
            for one, (own, _) in noise.own.items()
        ]
        if loud:
            notes.append(
                f"On {known.title} some vary more than the others, and stand with their own noise: {'; '.join(loud)}."
            )
    saved = {name: by_seed(report, name) for name in noisy(report)}
    idle = [
        report.about(name).title for name, one in saved.items() if one.saved is not None and one.saved < SAVES_NOTHING
    ]
    if idle:
        notes.append(
            f"Sharing seeds between variants saves nothing here ({', '.join(idle)}): what a seed does to one variant says next to nothing of"
            f" what it does to another. Differences that need more than is here need more seeds ({POWER:.0%} power: see *Noise*)."
        )
    return notes
