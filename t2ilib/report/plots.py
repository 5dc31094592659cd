"""The figures of a study in the order of its report, and the two that stand first side by side."""

from matplotlib.figure import Figure

from t2ilib.report.contents import StudyReport
from t2ilib.report.figures import (
    Plot,
    draw_learned_kept,
    finish,
    plot_cost_quality,
    plot_learned_kept,
    plot_learning_curves,
    qualities,
)
from t2ilib.report.pictures import draw_pictures, plot_pictures, shown_prompts
from t2ilib.report.tuning import tuning_figures, tuning_of

WIDTH = 14.2
"""Inches of the overview: a wide browser's page."""
LEAST_HEIGHT, MOST_HEIGHT = 3.4, 5.2
PAGE, ROW = 8.4, 0.47
"""Inches that the overview and the table of verdicts have together in a first screen, and that a row of the table
takes of them."""
TITLES, SMALLEST = 0.7, 0.3
"""Inches for the prompts above the pictures, and for a picture of a study that no screen holds."""


def plots(report: StudyReport) -> list[Plot]:
    """The figures of a study for which something was measured or drawn; the first two are what a report begins with."""
    told = (
        (
            "What it looks like",
            "The same prompts and the same starting noise in every row, first seed. One picture proves nothing: numbers count more of"
            " them, over all seeds.",
            "The same prompts and noise, drawn by every variant",
            "pictures.png",
            plot_pictures,
        ),
        (
            "Learned and kept",
            "Figures use the short names of the tables. Bars are 95% intervals over seeds, each alone: whether two variants differ is"
            " for the table of verdicts to say.",
            "How good every variant is; up and right is good",
            "learned_kept.png",
            plot_learned_kept,
        ),
        (
            "Learning",
            "Held-out loss by step; lower is better. Where bands overlap, a lead of one line over another may be noise.",
            "Held-out loss by step",
            "curves.png",
            plot_learning_curves,
        ),
        (
            "What it costs",
            "Each measure of quality against each cost; bars are 95% intervals, and up is better. Good places are top left for memory"
            " and parameters, top right for speed. The dashed line is the model before fine-tuning.",
            "Quality against cost",
            "cost_quality.png",
            plot_cost_quality,
        ),
    )
    drawn = [(*words, draw(report)) for *words, draw in told]
    found = [Plot(*words, figure) for *words, figure in drawn if figure is not None]
    return [*found, *tuning_figures(tuning_of(report))]


def plot_overview(report: StudyReport) -> Figure | None:
    """Pictures to the left, learned against kept to the right, small enough for a first screen; one alone where there
    is only one, None where there is neither."""
    prompts, measured = shown_prompts(report), qualities(report)
    if not prompts and not measured:
        return None
    rows, column = len(report.present), min(1.0, 6.6 / max(1, len(prompts)))
    left = 2.1 + column * len(prompts) if prompts else 0.0
    right = min(WIDTH - left, 6.2) if measured else 0.0
    height = min(MOST_HEIGHT, PAGE - ROW * rows, TITLES + column * rows)
    height = max(height, LEAST_HEIGHT, TITLES + SMALLEST * rows)
    figure = Figure(figsize=(left + right, height), layout="constrained")
    parts = figure.subfigures(
        1, bool(prompts) + bool(measured), squeeze=False, width_ratios=[part for part in (left, right) if part]
    )[0]
    if prompts:
        draw_pictures(parts[0], report, prompts, column, small=True)
    if measured:
        finish(figure, [draw_learned_kept(parts[-1].add_subplot(), report)])
    return figure
