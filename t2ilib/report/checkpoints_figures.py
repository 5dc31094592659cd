"""Figures of a variant's checkpoints: every measure by step, and the path from the base through what was learned and what was kept."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from t2ilib.evaluation.metrics import Metric
from t2ilib.evaluation.steps import BASE
from t2ilib.report.checkpoints import VariantSteps
from t2ilib.report.figures import COLORS, finish

ROLE_COLORS = {"learned": COLORS[2], "kept": COLORS[0], "followed": COLORS[3], "loss": COLORS[1]}
SCORE_COLOR = "0.15"
CHOSEN = "#ee7733"
"""Of the recommended step, in every figure."""
WIDTH = 10.4
MOST_NAMES = 10
"""Points of a path that are named, at most."""


def plot_curves(own: VariantSteps) -> Figure:
    """One panel for each unit: shares together with the score where it is one, other measures and the loss each alone. Lines are means over
    runs, thin lines single runs, the band the score's 95% interval; the recommended step is marked. The base is the point at 0."""
    panels = panels_of(own)
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(WIDTH, 3.5 * rows), layout="constrained")
    grid = figure.subplots(rows, min(2, len(panels)), squeeze=False).ravel()
    for axes, (label, names, with_score) in zip(grid, panels, strict=False):
        draw_panel(axes, own, label, names, with_score)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    return figure


def panels_of(own: VariantSteps) -> list[tuple[str, list[str], bool]]:
    """Label, metrics and whether the score is drawn, of each panel."""
    shares = [name for name in own.metrics if own.declared[name].unit == "share"]
    others = [name for name in own.metrics if name not in shares]
    metric, single = own.deciding.metric, len(own.deciding.parts) == 1
    score_there = not single or metric != own.declared[own.deciding.parts[0]]
    panels = [("share", shares, score_there and metric.unit == "share")] if shares else []
    panels += [(own.declared[name].title, [name], False) for name in others]
    if score_there and not (shares and metric.unit == "share"):
        panels.insert(0, (metric.title, [], True))
    return panels


def draw_panel(axes: Axes, own: VariantSteps, label: str, names: Sequence[str], with_score: bool) -> None:
    for name in names:
        draw_line(axes, own, name)
    if with_score:
        draw_score(axes, own)
    step = own.choice.recommended
    axes.axvline(step, color=CHOSEN, linewidth=1.6, linestyle=(0, (4, 2)), zorder=0)
    axes.annotate(
        f"step {step}", (step, 1.0), (3, -2), xycoords=("data", "axes fraction"), textcoords="offset points",
        color=CHOSEN, fontsize=9, va="top", bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )  # fmt: skip
    told = [own.declared[name] for name in names] or [own.deciding.metric]
    worse = all(metric.better == "lower" for metric in told)
    axes.set_ylabel(label + " (lower is better)" * worse)
    axes.set_xlabel("training step")
    if told[0].unit == "share":
        axes.set_ylim(min(-0.03, axes.get_ylim()[0]), max(1.03, axes.get_ylim()[1]))
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    if len(names) + with_score > 1:
        axes.legend(frameon=False, fontsize=8.5, loc="best")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5)


def draw_line(axes: Axes, own: VariantSteps, name: str) -> None:
    values, metric = own.metrics[name].values, own.declared[name]
    color = ROLE_COLORS.get(metric.role, COLORS[5])
    if len(values) > 1:
        for run in values:
            axes.plot(own.steps, run, color=color, linewidth=0.6, alpha=0.45)
    axes.plot(own.steps, values.mean(0), color=color, linewidth=2, marker="o", markersize=4, label=metric.title)
    if BASE in own.steps and np.isfinite(values[:, 0]).all():
        axes.plot(BASE, values[:, 0].mean(), marker="D", color="white", markeredgecolor=color, markersize=6, zorder=5)


def draw_score(axes: Axes, own: VariantSteps) -> None:
    choice = own.choice
    style = {"color": SCORE_COLOR, "linewidth": 2, "linestyle": (0, (5, 1.5)), "marker": "s", "markersize": 3.5}
    axes.plot(choice.steps, choice.scores, label=f"{own.deciding.metric.title} (score)", **style)
    if choice.low is not None:
        axes.fill_between(choice.steps, choice.low, choice.high, color=SCORE_COLOR, alpha=0.1, linewidth=0)


def plot_path(own: VariantSteps) -> Figure | None:
    """What was learned against what was kept, step after step from the base on; up and right is good. Where the score is their harmonic mean
    its lines of equal height are drawn. None where one of both was not measured."""
    learned, kept = own.speaking("learned"), own.speaking("kept")
    if learned is None or kept is None:
        return None
    figure = Figure(figsize=(6.2, 5.2), layout="constrained")
    axes = figure.add_subplot()
    x, y = own.metrics[kept].values.mean(0), own.metrics[learned].values.mean(0)
    there = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    axes.plot(x[there], y[there], color="0.55", linewidth=1.3, zorder=1)
    for place in there[1:]:
        before = there[list(there).index(place) - 1]
        middle = ((x[place] + x[before]) / 2, (y[place] + y[before]) / 2)
        if np.hypot(x[place] - x[before], y[place] - y[before]) > 0:
            arrow = {"arrowstyle": "-|>", "color": "0.55", "linewidth": 0}
            axes.annotate("", middle, (x[before], y[before]), arrowprops=arrow, zorder=1)
    points = []
    for place in there:
        step = own.steps[place]
        chosen, base = step == own.choice.recommended, step == BASE
        color = CHOSEN if chosen else "0.25"
        axes.plot(x[place], y[place], marker="D" if base else "o", color="white" if base else color, markeredgecolor=color,
                  markersize=9 if chosen else 6, zorder=4 if chosen else 3, linestyle="none")  # fmt: skip
        if step in named(own):
            points.append((x[place], y[place], "base" if base else f"step {step}", color))
    dress_path(axes, own.declared[kept], own.declared[learned])
    if own.deciding.parts == (learned, kept) and own.deciding.metric.unit == "share":
        draw_heights(axes)
    finish(figure, [(axes, points)])
    return figure


def named(own: VariantSteps) -> set[int]:
    """The steps whose points are named: all of a few; of many some, evenly, and those that matter."""
    steps, count = list(own.steps), len(own.steps)
    if count <= MOST_NAMES:
        return set(steps)
    some = {steps[int(place)] for place in np.linspace(0, count - 1, MOST_NAMES - 2).round()}
    return some | {own.choice.recommended, own.choice.best}


def dress_path(axes: Axes, kept: Metric, learned: Metric) -> None:
    axes.margins(0.12, 0.12)
    for axis, metric, put in ((axes.xaxis, kept, axes.set_xlim), (axes.yaxis, learned, axes.set_ylim)):
        axis.set_label_text(metric.title + " (lower is better)" * (metric.better == "lower"))
        if metric.unit == "share":
            low, high = axes.get_xlim() if axis is axes.xaxis else axes.get_ylim()
            negative = min(float(line.min()) for line in lines_of(axes, axis is axes.xaxis)) < 0
            put(low if negative else max(-0.06, min(low, 0.4)), min(1.08, max(high, 1.04)))
            axis.set_ticks([tick for tick in axis.get_ticklocs() if (negative or tick > -1e-6) and tick < 1 + 1e-6])
            axis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        axis.set_inverted(metric.better == "lower")
    axes.set_title("up and right is good; each point is a checkpoint, in the order of training", fontsize=9, color="0.35", loc="left")  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5)


def lines_of(axes: Axes, across: bool) -> list[np.ndarray]:
    """The values of all that is drawn, along one axis."""
    return [np.asarray(line.get_xdata() if across else line.get_ydata(), dtype=float) for line in axes.lines]


def draw_heights(axes: Axes) -> None:
    """Where the harmonic mean of both is 20, 40, 60, 80 %."""
    ends = axes.get_xlim(), axes.get_ylim()
    grid = np.linspace(0.005, 1.0, 200)
    x, y = np.meshgrid(grid, grid)
    lines = axes.contour(
        x, y, 2 * x * y / (x + y), levels=[0.2, 0.4, 0.6, 0.8], colors="0.82", linewidths=0.8, zorder=0
    )
    axes.clabel(lines, fmt=lambda value: f"{100 * value:.0f} %", fontsize=7, colors="0.6")
    axes.set(xlim=ends[0], ylim=ends[1])
