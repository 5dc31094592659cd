"""Finished runs -> tables, plots, verdicts, texts: which variant learned, kept and cost what, and what is only seed noise.

    report = load_report("results/adapters-quick")
    print(format_table(summary_table(report)))
    print(headline(report))
    write_markdown(report, "results/adapters-quick")

`reading` knows the files, `tables` the numbers, `figures` the plots, `texts` the sentences. Imports no torch.
"""

from pathlib import Path

from t2ilib.report.figures import plot_cost_quality, plot_learning_curves, plot_pictures, plots
from t2ilib.report.reading import StudyReport, load_report
from t2ilib.report.tables import caveats, compare, difference_table, format_table, markdown_table, summary_table
from t2ilib.report.texts import QUALITY, describe_variant, explain_metrics, explain_reading, headline

__all__ = [
    "StudyReport",
    "caveats",
    "caveats_markdown",
    "compare",
    "describe_variant",
    "difference_table",
    "differences_markdown",
    "explain_metrics",
    "explain_reading",
    "format_table",
    "headline",
    "load_report",
    "markdown_table",
    "plot_cost_quality",
    "plot_learning_curves",
    "plot_pictures",
    "plots",
    "summary_table",
    "write_markdown",
]

DPI = 130


def caveats_markdown(report: StudyReport) -> str:
    return (
        "\n".join(f"- {note}" for note in caveats(report))
        or "- None: every run finished, and there are seeds enough to test."
    )


def differences_markdown(report: StudyReport) -> str:
    """The difference tables of what a study is about, each under its metric's name; those in which nothing was compared are left
    out."""
    reference = report.variants[report.reference].title
    tables = [
        f"**{report.metrics[metric].title}**, against {reference}\n\n{markdown_table(difference_table(report, metric))}"
        for metric in report.speaking(*QUALITY)
        if compare(report, metric)
    ]
    absent = "" if report.reference in report.present else f" {reference}, the reference, was not run."
    return "\n\n".join(tables) or f"Nothing was measured yet that could be compared.{absent}"


def write_markdown(report: StudyReport, folder: Path | str) -> Path:
    """Writes `folder/report.md` with curves.png, cost_quality.png and pictures.png beside it, those that have something to show;
    returns the path of report.md."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shown = plots(report)
    for plot in shown:
        plot.figure.savefig(folder / plot.file, dpi=DPI)
    figures = "\n\n".join(f"![{plot.caption}]({plot.file})" for plot in shown)
    numbers = "\n\n".join(
        f"### {title}\n\n{markdown_table(summary_table(report, metrics))}" for title, metrics in report.tables().items()
    )
    sections = [
        f"# {report.name}{f' ({report.preset})' if report.preset else ''}",
        report.question,
        "## In short\n\n" + headline(report),
        "## Before believing it\n\n" + caveats_markdown(report),
        numbers and f"## Numbers\n\n{numbers}",
        "## Differences\n\n" + differences_markdown(report),
        "## How to read this\n\n" + "\n".join(filter(None, (explain_reading(), explain_metrics(report)))),
        figures and f"## Figures\n\n{figures}",
        "## Variants\n\n" + "\n\n".join(describe_variant(report, name) for name in report.present),
    ]
    path = folder / "report.md"
    path.write_text("\n\n".join(section for section in sections if section) + "\n")
    return path
