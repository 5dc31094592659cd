"""A study in figures: learned against kept, learning curves, and what quality costs.

Figures are plain `matplotlib.figure.Figure` objects without pyplot's global state; notebooks show them with
`display`. A variant has one colour in every figure. One for which nothing was measured is None rather than an empty
frame. Leaves out interactivity: a report must read the same on paper.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from t2ilib.report.contents import StudyReport
from t2ilib.report.labels import folded, label_ends, place_labels
from t2ilib.statistics.means import mean_interval

COLORS = ("#4477aa", "#ee6677", "#228833", "#aa3377", "#3fa7c9", "#a58f00", "#000000", "#ee7733", "#009988", "#888888")
"""After Paul Tol's bright and vibrant palettes (SRON/EPS/TN/09-002), which colour-blind eyes tell apart; cyan and
yellow are darkened, because names are written in these colours."""
LINE_STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Plot:
    """A figure with its heading, how it is to be read, its caption, and the name of its file."""

    heading: str
    text: str
    caption: str
    file: str
    figure: Figure


def style_of(report: StudyReport, name: str) -> tuple[str, str]:
    """Colour and line style; more variants than colours go round again with another line."""
    index = list(report.variants).index(name)
    return COLORS[index % len(COLORS)], LINE_STYLES[index // len(COLORS) % len(LINE_STYLES)]


def plot_learning_curves(report: StudyReport, metric: str = "held_out_loss") -> Figure | None:
    """`metric` by step: the mean over seeds, and from the lowest to the highest seed as a band; named at the right
    end. None where no trained variant logged it.

    Only steps that all of a variant's runs logged are drawn, or the mean would jump where a seed joins or leaves.
    """
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.add_subplot(
        xlabel="step", ylabel=report.metrics[metric].title if metric in report.metrics else metric
    )
    ends = []
    for name in report.trained:
        curves = [run.history[metric] for run in report.runs_of(name) if metric in run.history]
        steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
        if not steps:
            continue
        values = np.array([[curve[step] for step in steps] for curve in curves])
        color, line = style_of(report, name)
        axes.plot(
            steps, values.mean(0), color=color, linestyle=line, linewidth=1.8, marker="o" if len(steps) == 1 else None
        )
        if len(curves) > 1:
            axes.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.12, linewidth=0)
        ends.append((steps[-1], float(values.mean(0)[-1]), name, color))
    axes.set_title("mean over seeds; band: lowest to highest seed", fontsize=9, color="0.35", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    if not ends:
        return None
    label_ends(axes, ends)
    return figure


def plot_learned_kept(report: StudyReport) -> Figure | None:
    """What was learned against what was kept, means with 95% intervals; up and right is good. On pictures of one's
    own, held-out loss against CLIP score; of a single measure, a line a variant. None where no quality was
    measured."""
    if not qualities(report):
        return None
    figure = Figure(figsize=(7.2, 5.2), layout="constrained")
    finish(figure, [draw_learned_kept(figure.add_subplot(), report)])
    return figure


def qualities(report: StudyReport) -> list[str]:
    """The one or two metrics that say how good a variant is, the first of which is drawn upwards."""
    return report.speaking("learned", "kept") or report.speaking("loss", "followed")


def finish(figure: Figure, labelled: Sequence[tuple[Axes, list]]) -> None:
    """Names the points of each axes, which have their final places only now: labels are placed in pixels."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes, points in labelled:
        place_labels(axes, points)


def draw_learned_kept(axes: Axes, report: StudyReport) -> tuple[Axes, list[tuple[float, float, str, str]]]:
    """Draws into `axes`; returns them with (x, y, label, colour) of the points that want a name."""
    up, *right = qualities(report)
    measured = [name for name in report.present if all(report.values(name, metric) for metric in (up, *right))]
    points = []
    for row, name in enumerate(reversed(measured)):
        color = "0.35" if name == report.base else style_of(report, name)[0]
        y = mean_interval(report.values(name, up).values())
        style = {"color": color, "markersize": 6, "elinewidth": 1.2, "ecolor": (color, 0.5)}
        style["fmt"] = "D" if name == report.base else "o"
        if right:
            x = mean_interval(report.values(name, right[0]).values())
            axes.errorbar(x.mean, y.mean, xerr=x.half_width, yerr=y.half_width, **style)
            points.append((x.mean, y.mean, name, color))
        else:
            axes.errorbar(y.mean, row, xerr=y.half_width, **style)
    if right:
        axes.margins(0.14, 0.14)
        dress(axes.yaxis, axes, report, up)
        dress(axes.xaxis, axes, report, right[0])
        axes.set_title("up and right is good; bars: 95% intervals over seeds", fontsize=9, color="0.35", loc="left")
    else:
        dress(axes.xaxis, axes, report, up)
        axes.set_yticks(range(len(measured)), [folded(name) for name in reversed(measured)])
        axes.set_title("right is good; bars: 95% intervals over seeds", fontsize=9, color="0.35", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    return axes, points


def dress(axis, axes: Axes, report: StudyReport, metric: str) -> None:
    """An axis of `axes` for a metric: its title, percent for shares, and turned round where lower is better, so that
    good has one direction."""
    known = report.metrics[metric]
    axis.set_label_text(known.title + " (lower is better)" * (known.better == "lower"))
    if known.unit == "share":
        get, put = (axes.get_xlim, axes.set_xlim) if axis is axes.xaxis else (axes.get_ylim, axes.set_ylim)
        means = [
            mean_interval(values.values()).mean for name in report.present if (values := report.values(name, metric))
        ]
        least, most = min(0.0, *means), max(1.0, *means)  # a t-interval may leave 0..1, a share of something may not
        low, high = get()
        put(max(low, least - 0.05), min(high, most + 0.06))
        axis.set_ticks([tick for tick in axis.get_ticklocs() if least - 1e-6 < tick < most + 1e-6])
        axis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axis.set_inverted(known.better == "lower")


def plot_cost_quality(report: StudyReport, costs: Sequence[str] = ()) -> Figure | None:
    """What was learned and kept, or where neither was measured held-out loss and CLIP score (rows), against costs
    (columns): means with 95% intervals, up is better; the untouched base is a line. None where no quality or no cost
    was measured.

    Costs default to what speaks for memory, size and speed.
    """
    costs = (
        report.measured(*costs)
        if costs
        else (
            *(report.speaking("memory") or report.speaking("host")),
            *report.speaking("size", "speed"),
        )
    )
    measured = qualities(report)
    if not costs or not measured:
        return None
    figure = Figure(figsize=(5.2 * len(costs), 4.0 * len(measured)), layout="constrained")
    grid = figure.subplots(len(measured), len(costs), squeeze=False, sharex="col", sharey="row")
    panels = [
        (axes, draw_panel(axes, report, cost, quality))
        for row, quality in zip(grid, measured, strict=True)
        for axes, cost in zip(row, costs, strict=True)
    ]
    for row, quality in zip(grid, measured, strict=True):
        dress(row[0].yaxis, row[0], report, quality)
    for axes, cost in zip(grid[-1], costs, strict=True):
        shared = report.metrics[cost].role == "speed" and not report.timed_alone(*report.trained)
        axes.set_xlabel(report.metrics[cost].title + " (of a shared machine)" * shared)
    finish(figure, panels)
    return figure


def draw_panel(axes: Axes, report: StudyReport, cost: str, quality: str) -> list[tuple[float, float, str, str]]:
    """One scatter; returns (x, y, label, colour) of its points for labelling."""
    points = []
    for name in report.trained:
        paid, got = report.values(name, cost), report.values(name, quality)
        if not paid or not got:
            continue
        x, y = mean_interval(paid.values()), mean_interval(got.values())
        color = style_of(report, name)[0]
        bars = {"yerr": y.half_width, "xerr": x.half_width}
        axes.errorbar(
            x.mean, y.mean, **bars, fmt="o", color=color, markersize=6, elinewidth=1, capsize=0, ecolor=(color, 0.4)
        )
        points.append((x.mean, y.mean, name, color))
    base = report.values(report.base, quality) if report.base else {}
    if base:
        level = mean_interval(base.values()).mean
        axes.axhline(level, color="0.6", linewidth=1, linestyle="--", zorder=0)
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right"}
        axes.annotate("untouched base", (1, level), (-2, 2), fontsize=7.5, color="0.5", **place)
    counts = [x for x, *_ in points]
    if report.metrics[cost].unit == "count" and counts and min(counts) > 0 and max(counts) > 8 * min(counts):
        axes.set_xscale("log")
    axes.margins(0.16, 0.14)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    return points
