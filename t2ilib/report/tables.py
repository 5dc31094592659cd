"""Numbers with their uncertainty: a summary of every variant, differences against the reference, and how both are written.

A row is a dict of plain strings, so one table serves a terminal (`format_table`), a notebook and a file (`markdown_table`).
"–" is a number that was not measured. p-values are adjusted over the variants of one table, not over tables.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from t2ilib.data.manifest import FEW_HELD_OUT, NAMED
from t2ilib.evaluation.metrics import Metric
from t2ilib.evaluation.statistics import (
    PairedDifference,
    max_statistic,
    mean_interval,
    paired_difference,
    smallest_p,
    verdict,
)
from t2ilib.report.reading import StudyReport

SEEDS_TO_DECIDE = next(n for n in range(2, 64) if smallest_p(n) < 0.05)
NOT_MEASURED = "–"
WORDS = ("variant", "name", "against", "verdict")
"""Columns of words, which stand to the left; numbers stand to the right."""
Row = dict[str, str]


@dataclass(frozen=True)
class Comparison:
    """One variant against another on one metric. `verdict` is in plain words; p-values are None where nothing is tested."""

    difference: PairedDifference
    adjusted_p: float | None
    verdict: str


def write_number(value: float, metric: Metric, signed: bool = False, beside: float | None = None) -> str:
    """A number as people write that kind of quantity: shares in percent (their differences, which are signed, in percentage
    points), counts with thousands separators. Its decimals suit `beside`, the number that it stands next to."""
    scaled, pattern = {
        "share": (100 * value, ".1f"),
        "loss": (value, ".4f"),
        "score": (value, ".2f"),
        "count": (value, ",.0f"),
        "mib": (value, ",.0f" if abs(value if beside is None else beside) >= 100 else ".2f"),
        "rate": (value, ".2f"),
    }[metric.unit]
    text = format(scaled, ("+" if signed else "") + pattern)
    return text + (" pp" if signed else " %") * (metric.unit == "share")


def write_mean(values: Mapping[int, float], metric: Metric) -> str:
    """ "81.0 ± 4.2 %" from {seed: value}; without ± for one seed or a quantity that seeds do not change."""
    if not values:
        return NOT_MEASURED
    interval = mean_interval(values.values())
    if not interval.half_width:
        return write_number(interval.mean, metric)
    half = write_number(interval.half_width, metric, beside=interval.mean)
    return f"{write_number(interval.mean, metric).removesuffix(' %')} ± {half}"


def write_interval(difference: PairedDifference, metric: Metric) -> str:
    if difference.low is None:
        return NOT_MEASURED
    low, high = (write_number(value, metric, signed=True) for value in (difference.low, difference.high))
    return f"{low.removesuffix(' pp')} to {high}"


def write_p(p: float | None) -> str:
    return NOT_MEASURED if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def summary_table(report: StudyReport, metrics: Sequence[str] = ()) -> list[Row]:
    """A row a variant: finished runs, then mean ± half-width of the 95% t-interval over seeds for every measured metric. `name`
    is what figures call the variant."""
    columns = report.measured(*metrics)
    rows = []
    for name in report.present:
        role = {report.reference: " (reference)", report.base: " (untouched)"}.get(name, "")
        row = {
            "variant": report.variants[name].title + role,
            "name": name,
            "runs": f"{len(report.runs_of(name))}/{len(report.seeds)}",
        }
        rows.append(
            row
            | {report.metrics[key].title: write_mean(report.values(name, key), report.metrics[key]) for key in columns}
        )
    return rows


def compare(report: StudyReport, metric: str, against: str | None = None) -> dict[str, Comparison]:
    """Every variant that shares seeds with what it is compared with (`against`, or the neighbour that it names, or the
    reference), paired by seed.

    The family that p-values are adjusted over is the trained variants. The untouched base stands outside it with its own p-value: "does training change
    anything?" is another question, and asking it must not cost the variants their power.
    """
    known = report.metrics[metric]
    others = {name: report.values(against or report.against(name), metric) for name in report.variants}
    pairs = {
        name: (values, others[name])
        for name in report.variants
        if name != (against or report.against(name))
        and (values := report.values(name, metric)).keys() & others[name].keys()
    }
    differences = {name: paired_difference(values, other) for name, (values, other) in pairs.items()}
    if known.exact:
        return {
            name: Comparison(difference, None, exact_verdict(difference)) for name, difference in differences.items()
        }
    adjusted = max_statistic(
        {
            name: {seed: value - other[seed] for seed, value in values.items() if seed in other}
            for name, (values, other) in pairs.items()
            if name != report.base
        }
    )
    adjusted |= {name: difference.p_value for name, difference in differences.items() if name == report.base}
    return {
        name: Comparison(difference, adjusted[name], judge(difference, adjusted[name], known))
        for name, difference in differences.items()
    }


def judge(difference: PairedDifference, adjusted_p: float | None, metric: Metric) -> str:
    if metric.better is None:
        return "not judged"
    return verdict(difference, adjusted_p, metric.better == "higher")


def exact_verdict(difference: PairedDifference) -> str:
    if difference.mean == 0:
        return "equal"
    return "higher" if difference.mean > 0 else "lower"


def difference_table(report: StudyReport, metric: str, against: str | None = None) -> list[Row]:
    """A row a variant: its paired difference to what it is compared with, 95% interval, p-values plain and adjusted, verdict."""
    known, compared = report.metrics[metric], compare(report, metric, against)
    rows = []
    for name in report.present:
        if name == (against or report.against(name)):
            continue
        row = {"variant": report.variants[name].title}
        if against is None and any(variant.against for variant in report.variants.values()):
            row["against"] = report.variants[report.against(name)].title
        if name not in compared:
            rest = dict.fromkeys(("difference", "95% interval", "pairs", "p", "p (adjusted)"), NOT_MEASURED)
            rows.append(row | rest | {"verdict": "not measured"})
            continue
        comparison = compared[name]
        difference = comparison.difference
        rows.append(row | {
            "difference": write_number(difference.mean, known, signed=True),
            "95% interval": NOT_MEASURED if known.exact else write_interval(difference, known),
            "pairs": str(difference.num_pairs),
            "p": NOT_MEASURED if known.exact else write_p(difference.p_value),
            "p (adjusted)": write_p(comparison.adjusted_p),
            "verdict": comparison.verdict,
        })  # fmt: skip
    return rows


def caveats(report: StudyReport) -> list[str]:
    """What a reader must know before believing the tables: missing runs, too few seeds, what few pictures and a CPU cannot
    tell."""
    titles = {name: variant.title for name, variant in report.variants.items()}
    notes = [
        f"{titles[name]}, seed {seed}: **did not finish**, so it is in no number here." for name, seed in report.missing
    ]
    if report.not_run:
        notes.append(
            f"Not run (left out by `--only` or `--seeds`, or not reached yet), so in no number here: {told_left_out(report)}."
        )
    if report.outdated:
        notes.append(
            f"Measured before the study's prompts or measures changed, so **not comparable with the others** until the study is run"
            f" again: {told_runs(report, report.outdated)}."
        )
    notes += [f"Not finite, so counted as not measured: {text}." for text in report.not_finite]
    least = smallest_p(len(report.seeds))
    if least is None:
        notes.append("One seed: nothing is tested. Differences may be seed noise, however large they look.")
    elif least >= 0.05:
        notes.append(
            f"With {len(report.seeds)} seeds no p-value can fall below {least:.2g} (2/2^n), so **no difference shown** is the only"
            " verdict that this study can give: it estimates, it does not decide. Read the intervals; to decide, run at least"
            f" {SEEDS_TO_DECIDE} seeds."
        )
    notes += [held_out_caveat(report)] if report.measured("held_out_pictures") else []
    if "peak_process_mib" in report.measured() and "peak_device_mib" not in report.measured():
        notes.append(
            "Measured on a CPU: process memory is mostly libraries, and says little about what a GPU would need."
        )
    if report.measured("steps_per_second"):
        notes.append("Steps per second of runs that shared a machine are comparable only as ratios within this study.")
    on_cpu = [name for name in report.trained if not report.values(name, "peak_device_mib")]
    slow = [titles[name] for name in on_cpu if optimizer_of(report, name) == "adamw8bit"]
    if slow:
        notes.append(
            f"{', '.join(slow)}: on a CPU, 8-bit AdamW costs some 35 times fused AdamW per step, so no conclusion about its speed"
            " can be drawn here."
        )
    return notes


def told_runs(report: StudyReport, places: Sequence[tuple[str, int]]) -> str:
    """Runs by variant: its title alone where all its seeds are meant."""
    seeds: dict[str, list[int]] = {}
    for name, seed in places:
        seeds.setdefault(name, []).append(seed)
    return "; ".join(
        report.variants[name].title
        + ("" if set(own) >= set(report.seeds) else f", seed{'s' * (len(own) > 1)} {', '.join(map(str, own))}")
        for name, own in seeds.items()
    )


def told_left_out(report: StudyReport) -> str:
    """What never began, in one line: whole variants, whole seeds, then single runs."""
    variants = [name for name in report.variants if name not in report.present]
    titles = [report.variants[name].title for name in variants]
    more = [f"{len(titles) - NAMED} other variants"] * (len(titles) > NAMED + 1)
    seeds = [seed for seed in dict.fromkeys(seed for _, seed in report.not_run) if seed not in report.seeds]
    whole = [f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))} of all variants"] * bool(seeds)
    single = [(name, seed) for name, seed in report.not_run if name not in variants and seed not in seeds]
    return "; ".join(
        [*titles[: NAMED if more else None], *more, *whole, *([told_runs(report, single)] if single else [])]
    )


def held_out_caveat(report: StudyReport) -> str:
    """What the held-out loss is measured on, and what its intervals do not say; a warning where that is few pictures."""
    counts = {int(n) for name in report.variants for n in report.values(name, "held_out_pictures").values()}
    least, most = min(counts), max(counts)
    number = f"{least} picture{'s' * (least != 1)}" if least == most else f"{least} to {most} pictures"
    names = f" ({', '.join(report.held_out)})" if 0 < len(report.held_out) <= NAMED else ""
    told = (
        f"Held-out loss is measured on {number}{names}, the same for every seed, so that all runs"
        " are measured alike: its intervals tell seed noise, not what other pictures would say."
    )
    few = f" **That is few**: below {FEW_HELD_OUT}, single pictures often say the opposite of many, however sure the seeds are."
    return told + few * (least < FEW_HELD_OUT)


def optimizer_of(report: StudyReport, name: str) -> str | None:
    """What the study says of a variant's optimizer, as its runs recorded it."""
    sections = [run.settings.get("optimizer") for run in report.runs_of(name)] + [
        report.variants[name].run.get("optimizer")
    ]
    return next((section["name"] for section in sections if section and "name" in section), None)


def format_table(rows: Sequence[Row]) -> str:
    """Aligned text for a terminal: words to the left, numbers to the right."""
    if not rows:
        return "(nothing to show)"
    columns = list(rows[0])
    widths = {column: max(len(column), *(len(row[column]) for row in rows)) for column in columns}
    lines = [{column: column for column in columns}, {column: "-" * widths[column] for column in columns}, *rows]
    return "\n".join(
        "  ".join(line[c].ljust(widths[c]) if c in WORDS else line[c].rjust(widths[c]) for c in columns).rstrip()
        for line in lines
    )


def markdown_table(rows: Sequence[Row]) -> str:
    """A GitHub-flavoured Markdown table of the same rows."""
    if not rows:
        return "*nothing to show*"
    columns = list(rows[0])
    rule = ["---" if column in WORDS else "---:" for column in columns]
    lines = [columns, rule, *([row[column] for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
