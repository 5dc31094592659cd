"""Finished runs -> tables, plots, verdicts, texts: which variant learned, kept and cost what; what is only seed noise.

    report = load_report("results/adapters-quick")
    print(format_table(verdict_table(report)))
    print(headline(report))
    write_markdown(report, "results/adapters-quick")

`reading` knows the files, `comparing` what is shown, `tables` the numbers, `figures`, `pictures` and `plots` what is
drawn, `texts` and `caveats` the sentences. Imports no torch.
"""

from pathlib import Path

from t2ilib.report.caveats import caveats
from t2ilib.report.comparing import compare
from t2ilib.report.contents import StudyReport
from t2ilib.report.figures import plot_cost_quality, plot_learned_kept, plot_learning_curves
from t2ilib.report.noise import noise_markdown
from t2ilib.report.parquet import ROWS, write_parquet
from t2ilib.report.pictures import plot_pictures
from t2ilib.report.plots import plot_overview, plots
from t2ilib.report.reading import load_report
from t2ilib.report.tables import difference_table, format_table, markdown_table, summary_table, verdict_table
from t2ilib.report.texts import (
    QUALITY,
    VERDICTS,
    champion,
    describe_variant,
    explain_metrics,
    explain_reading,
    headline,
)
from t2ilib.report.tuning import tuning_markdown, tuning_of
from t2ilib.report.votes import measured_better, votes_markdown, votes_of

__all__ = [
    "StudyReport",
    "caveats",
    "caveats_markdown",
    "champion",
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
    "noise_markdown",
    "people_markdown",
    "plot_cost_quality",
    "plot_learned_kept",
    "plot_learning_curves",
    "plot_overview",
    "plot_pictures",
    "plots",
    "summary_table",
    "verdict_table",
    "write_markdown",
]

DPI = 130


def caveats_markdown(report: StudyReport) -> str:
    return (
        "\n".join(f"- {note}" for note in caveats(report))
        or "- None: every run finished, and there are seeds enough to test."
    )


def people_markdown(report: StudyReport) -> str:
    """What people preferred, by the votes that the study was given; "" without any."""
    titles = {name: variant.title for name, variant in report.variants.items()}
    return votes_markdown(votes_of(report), titles, measured_better(report))


def differences_markdown(report: StudyReport) -> str:
    """The difference tables of what a study is about, each under its metric's name; those in which nothing was
    compared are left out."""
    reference = report.variants[report.reference].title
    tables = [
        f"**{report.metrics[metric].title}**, against {reference}\n\n{markdown_table(difference_table(report, metric))}"
        for metric in report.speaking(*QUALITY)
        if compare(report, metric)
    ]
    absent = "" if report.reference in report.present else f" {reference}, the reference, was not run."
    return "\n\n".join(tables) or f"Nothing was measured yet that could be compared.{absent}"


def write_markdown(report: StudyReport, folder: Path | str) -> Path:
    """Writes `folder/report.md` with pictures.png, learned_kept.png, curves.png and cost_quality.png beside it, those
    that have something to show, and rows.parquet, of which alone all of it can be made again; returns the path of report.md."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_parquet(report, folder / ROWS)
    shown = {}
    for plot in plots(report):
        plot.figure.savefig(folder / plot.file, dpi=DPI)
        shown[plot.file] = f"![{plot.caption}]({plot.file})"
    first = [shown.pop(file) for file in ("pictures.png", "learned_kept.png") if file in shown]
    numbers = "\n\n".join(
        f"### {title}\n\n{markdown_table(summary_table(report, metrics))}" for title, metrics in report.tables().items()
    )
    votes = people_markdown(report)
    sections = [
        f"# {report.name}{f' ({report.preset})' if report.preset else ''}",
        report.question,
        *first,
        f"## Verdicts\n\n{markdown_table(verdict_table(report))}\n\n{VERDICTS}",
        "## In short\n\n" + "\n\n".join(filter(None, (headline(report), champion(report)))),
        votes and f"## What people preferred\n\n{votes}",
        "## Before believing it\n\n" + caveats_markdown(report),
        numbers and f"## Numbers\n\n{numbers}",
        "## Differences\n\n" + differences_markdown(report),
        noise_markdown(report),
        tuning_markdown(tuning_of(report)),
        "## How to read this\n\n" + "\n".join(filter(None, (explain_reading(report), explain_metrics(report)))),
        "\n\n".join(("## Figures", *shown.values())) if shown else "",
        "## Variants\n\n" + "\n\n".join(describe_variant(report, name) for name in report.present),
    ]
    path = folder / "report.md"
    path.write_text("\n\n".join(section for section in sections if section) + "\n")
    return path
