"""Numbers with their uncertainty: verdicts at a glance, a summary of every variant, differences, and how all are
written.

A row is a dict of plain strings, so one table serves a terminal (`format_table`), a notebook and a file
(`markdown_table`). "–" is a number that was not measured. Verdicts are paid for by the variants of one table, not by
tables.
"""

from collections.abc import Mapping, Sequence

from t2ilib.evaluation.metrics import Metric
from t2ilib.report.comparing import DIFFERENT, SHARED, Comparison, compare
from t2ilib.report.contents import StudyReport
from t2ilib.statistics.means import mean_interval
from t2ilib.statistics.pooled import Difference

NOT_MEASURED = "–"
WORDS = ("variant", "name", "against", "verdict")
"""Columns of words, which stand to the left; numbers stand to the right."""
DIFFERENCES = (
    "difference", "95% interval alone", "of all together", "over prompts too", "P(above)", "p", "exact p", "seeds"
)  # fmt: skip
SHORT = {SHARED: "", DIFFERENT: ""}
"""Verdicts in a cell, where they are not what stands before a bracket."""
AT_A_GLANCE = ("learned", "kept", "loss", "followed", "memory", "size", "speed")
"""Roles of metrics that have a column among the verdicts."""
Row = dict[str, str]


def write_number(value: float, metric: Metric, signed: bool = False, beside: float | None = None) -> str:
    """A number as people write that kind of quantity: shares in percent (their differences, which are signed, in
    percentage points), counts with thousands separators. Its decimals suit `beside`, the number that it stands next
    to."""
    scaled, pattern = {
        "share": (100 * value, ".1f"),
        "loss": (value, ".4f"),
        "score": (value, ".2f"),
        "count": (value, ",.0f"),
        "mib": (value, ",.0f" if abs(value if beside is None else beside) >= 100 else ".2f"),
        "rate": (value, ".2f"),
        "seconds": (value, ".3f"),
    }[metric.unit]
    text = format(scaled, ("+" if signed else "") + pattern)
    if not signed and float(text.replace(",", "")) == 0:
        text = text.removeprefix("-")  # -0.0 is nothing that people write
    return text + (" pp" if signed else " %") * (metric.unit == "share")


def write_mean(values: Mapping[int, float], metric: Metric) -> str:
    """ "81.0 ± 4.2 %" from {seed: value}; without ± for one seed or a quantity that seeds do not change."""
    if not values:
        return NOT_MEASURED
    interval = mean_interval(values.values())
    if len(set(values.values())) == 1:  # whose spread may still be a last bit
        return write_number(interval.mean, metric)
    half = write_number(interval.half_width, metric, beside=interval.mean)
    return f"{write_number(interval.mean, metric).removesuffix(' %')} ± {half}"


def write_interval(ends: tuple[float, float] | tuple[None, None] | None, metric: Metric) -> str:
    if ends is None or ends[0] is None:
        return NOT_MEASURED
    low, high = (write_number(value, metric, signed=True) for value in ends)
    return f"{low.removesuffix(' pp')} to {high}"


def write_together(difference: Difference, metric: Metric) -> str:
    """The interval that decides, named; "" where nothing is tested."""
    return f"95% interval of all together {write_interval(difference.together, metric)}" if difference.together else ""


def write_needed(comparison: Comparison, metric: Metric) -> str:
    """ "23 seeds would show 5.0 pp": of an undecided difference, how many show one that would matter, or else one as large as
    was seen, in four of five studies; "" of a decided one."""
    if not comparison.wanted:
        return ""
    size = write_number(comparison.wanted, metric, signed=True).removeprefix("+")
    seeds = "over 1,000 seeds" if comparison.seeds is None else f"{comparison.seeds} seeds"
    return f"{seeds} would show {size}"


def write_verdict(comparison: Comparison, metric: Metric) -> str:
    needed = write_needed(comparison, metric)
    return f"{comparison.verdict} ({needed})" if needed else comparison.verdict


def write_p(p: float | None) -> str:
    return NOT_MEASURED if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def title_of(report: StudyReport, name: str) -> str:
    return report.variants[name].title + {report.reference: " (reference)", report.base: " (untouched)"}.get(name, "")


def verdict_table(report: StudyReport) -> list[Row]:
    """A row a variant: what it is compared with, and for each role that was measured its mean with the verdict on
    that comparison. Settings (how many parameters) and speeds of runs that shared a machine have none."""
    columns = report.speaking(*AT_A_GLANCE)
    compared = {metric: compare(report, metric) for metric in columns}
    rows = []
    for name in report.present:
        other = report.against(name)
        row = {"variant": title_of(report, name), "name": name, "against": other if other != name else NOT_MEASURED}
        for metric in columns:
            known = report.metrics[metric]
            mean = write_mean(report.values(name, metric), known)
            verdict = "" if known.exact or name not in compared[metric] else compared[metric][name].verdict
            row[known.title] = ", ".join(filter(None, (mean, SHORT.get(verdict, verdict.split(" (")[0]))))
        rows.append(row)
    return rows


def summary_table(report: StudyReport, metrics: Sequence[str] = ()) -> list[Row]:
    """A row a variant: finished runs, then mean ± half-width of the 95% t-interval over seeds for every measured
    metric. `name` is what figures call the variant."""
    columns = report.measured(*metrics)
    rows = []
    for name in report.present:
        row = {
            "variant": title_of(report, name),
            "name": name,
            "runs": f"{len(report.runs_of(name))}/{len(report.seeds)}",
        }
        rows.append(
            row
            | {report.metrics[key].title: write_mean(report.values(name, key), report.metrics[key]) for key in columns}
        )
    return rows


def difference_table(report: StudyReport, metric: str, against: str | None = None) -> list[Row]:
    """A row a variant: its difference to what it is compared with; of it the 95% interval alone, that of all variants together,
    which decides, and the same over other prompts too; the probability that a new run of it lies above a new run of the other; the
    p-value that goes with what decides, and that of the exact test; the verdict. What no row has gets no column."""
    known, compared = report.about(metric), compare(report, metric, against)
    rows = []
    for name in report.present:
        if name == (against or report.against(name)):
            continue
        row = {"variant": report.variants[name].title}
        if against is None and any(variant.against for variant in report.variants.values()):
            row["against"] = report.variants[report.against(name)].title
        if name not in compared:
            rows.append(row | dict.fromkeys(DIFFERENCES, NOT_MEASURED) | {"verdict": "not measured"})
            continue
        numbers = write_difference(compared[name], known)
        rows.append(row | numbers | {"verdict": write_verdict(compared[name], known)})
    optional = ("over prompts too", "P(above)", "exact p")
    empty = {column for column in optional if all(row[column] == NOT_MEASURED for row in rows)}
    return [{key: value for key, value in row.items() if key not in empty} for row in rows]


def write_difference(comparison: Comparison, metric: Metric) -> Row:
    difference, exact, crossed = comparison.difference, comparison.exact, comparison.crossed
    told = {"difference": write_number(difference.mean, metric, signed=True), "seeds": write_runs(difference.runs)}
    if not metric.exact:
        told |= {
            "95% interval alone": write_interval((difference.low, difference.high), metric),
            "of all together": write_interval(difference.together, metric),
            "p": write_p(difference.p_value),
        }
        if difference.above is not None:
            told["P(above)"] = write_probability(difference.above)
        if exact is not None and exact.low is not None:  # with fewer seeds it could show nothing
            told["exact p"] = write_p(exact.p_value)
        if crossed is not None:
            told["over prompts too"] = write_interval(crossed.together, metric)
    return dict.fromkeys(DIFFERENCES, NOT_MEASURED) | told


def write_runs(runs: tuple[int, int]) -> str:
    one, other = runs
    return str(one) if one == other else f"{one}, {other}"


def write_probability(share: float) -> str:
    """In percent, and never quite certain."""
    return "<1 %" if share < 0.01 else ">99 %" if share > 0.99 else f"{100 * share:.0f} %"


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
