"""A study's pictures: learning curves, what quality costs, and what each variant draws for the same prompts and noise.

Figures are plain `matplotlib.figure.Figure` objects without pyplot's global state; notebooks show them with `display`.
A variant has one colour in every figure. Leaves out interactivity: a report must read the same on paper.
"""

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image

from t2ilib.evaluation.statistics import mean_interval
from t2ilib.report.reading import StudyReport

COLORS = ("#4477aa", "#ee6677", "#228833", "#aa3377", "#3fa7c9", "#a58f00", "#000000", "#ee7733", "#009988", "#888888")
"""After Paul Tol's bright and vibrant palettes (SRON/EPS/TN/09-002), which colour-blind eyes tell apart; cyan and yellow are
darkened, because names are written in these colours."""
LINE_STYLES = ("-", "--", ":", "-.")
PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.6}
"""Keeps a name readable where an error bar passes under it."""
RADII = (7, 14, 22, 32, 44, 58, 74, 92, 112)
"""Pixels (at 100 dpi) between a point and its name, tried in this order."""
MAX_PROMPTS = 8
PICTURE_PIXELS = 256


def style_of(report: StudyReport, name: str) -> tuple[str, str]:
    """Colour and line style; more variants than colours go round again with another line."""
    index = list(report.variants).index(name)
    return COLORS[index % len(COLORS)], LINE_STYLES[index // len(COLORS) % len(LINE_STYLES)]


def plot_learning_curves(report: StudyReport, metric: str = "held_out_loss") -> Figure:
    """`metric` by step: the mean over seeds, and from the lowest to the highest seed as a band; named at the right end.

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
    if ends:
        label_ends(axes, ends)
    else:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes, color="0.5")
    return figure


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]], gap: float = 0.055) -> None:
    """Names to the right of the axes, at the height of their line's end, pushed apart to `gap` of the axes' height."""
    bottom, top = axes.get_ylim()
    ordered = sorted(ends, key=lambda end: end[1])
    wanted = np.array([(end[1] - bottom) / (top - bottom) for end in ordered])
    placed = wanted.copy()
    for index in range(1, len(placed)):
        placed[index] = max(placed[index], placed[index - 1] + gap)
    placed -= min(max(0.0, (placed - wanted).mean()), placed[0])  # centred on what it names, but not below the axes
    style = {"fontsize": 9, "va": "center", "annotation_clip": False}
    for (step, value, text, color), height in zip(ordered, placed, strict=True):
        # The line meets the name's left end; matplotlib's default, its middle, would strike through the names between.
        line = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0.5)}
        place = {"xy": (step, value), "xytext": (1.04, height), "xycoords": "data", "textcoords": "axes fraction"}
        axes.annotate(text, color=color, arrowprops=line, **place, **style)


def plot_cost_quality(report: StudyReport, costs: Sequence[str] = ()) -> Figure:
    """What was learned and kept (rows) against costs (columns): means with 95% intervals; the untouched base is a line.

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
    qualities = report.speaking("learned", "kept")
    figure = Figure(figsize=(5.2 * max(1, len(costs)), 4.0 * max(1, len(qualities))), layout="constrained")
    if not costs or not qualities:
        figure.text(0.5, 0.5, "cost or quality was not measured", ha="center", color="0.5")
        return figure
    grid = figure.subplots(len(qualities), len(costs), squeeze=False, sharex="col", sharey="row")
    panels = []
    for row, quality in zip(grid, qualities, strict=True):
        row[0].set_ylabel(report.metrics[quality].title)
        panels += [(axes, draw_panel(axes, report, cost, quality)) for axes, cost in zip(row, costs, strict=True)]
    for axes, cost in zip(grid[-1], costs, strict=True):
        axes.set_xlabel(report.metrics[cost].title)
    figure.draw_without_rendering()  # axes have their final places only now, and labels are placed in pixels
    figure.set_layout_engine("none")
    for axes, points in panels:
        place_labels(axes, points)
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
    axes.set_ylim(
        max(axes.get_ylim()[0], -0.05), min(axes.get_ylim()[1], 1.06)
    )  # a t-interval may leave 0..1, a share may not
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    return points


def place_labels(axes: Axes, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Names beside their points: the nearest place that covers no other name or marker, with a thin line where it is far."""
    pixels = axes.transData.transform([point[:2] for point in points]) if points else []
    taken = [Bbox.from_extents(x - 5, y - 5, x + 5, y + 5) for x, y in pixels]
    taken += [text.get_window_extent() for text in axes.texts]
    to_axes = axes.transAxes.inverted().transform
    style = {"fontsize": 8, "va": "center", "ha": "center", "bbox": PAPER}
    for pixel, (_, _, name, color) in sorted(zip(pixels, points, strict=True), key=lambda pair: -pair[0][1]):
        text = axes.annotate(name, to_axes(pixel), xycoords="axes fraction", **style)
        size = text.get_window_extent()
        text.remove()  # it was there to be measured
        box, far = nearest_free(pixel, size, taken, axes.get_window_extent())
        taken.append(box)
        line = {"arrowstyle": "-", "color": color, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3} if far else None
        middle = to_axes(((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2))
        place = {"xy": to_axes(pixel), "xytext": middle, "xycoords": "axes fraction", "textcoords": "axes fraction"}
        axes.annotate(name, color=color, arrowprops=line, **place, **style)


def nearest_free(pixel: np.ndarray, size: Bbox, taken: Sequence[Bbox], frame: Bbox) -> tuple[Bbox, bool]:
    """Where a name of `size` goes around `pixel`, and whether that is far; without a free place, where it covers least."""
    angles = np.pi / 8 + np.linspace(0, 2 * np.pi, 16, endpoint=False)  # not along an error bar first
    width, height = size.width + 2, size.height + 2
    best = None
    for radius in RADII:
        for angle in angles:
            x = pixel[0] + np.cos(angle) * (radius + width / 2) - width / 2
            y = pixel[1] + np.sin(angle) * (radius + height / 2) - height / 2
            box = Bbox.from_bounds(x, y, width, height)
            outside = width * height - area(Bbox.intersection(box, frame))
            covered = sum(area(Bbox.intersection(box, other)) for other in taken) + 100 * outside
            if best is None or covered < best[0]:
                best = (covered, box, radius > RADII[0])
            if covered < 1e-6:
                return best[1:]
    return best[1:]


def area(box: Bbox | None) -> float:
    return 0.0 if box is None else box.width * box.height


def plot_pictures(report: StudyReport, max_prompts: int = MAX_PROMPTS) -> Figure:
    """Variants (rows) by prompts (columns), of the first seed that drew: the same prompts and starting noise in every row."""
    drawn = {name: pictures for name in report.variants if (pictures := pictures_of(report, name))}
    prompts = list(next(iter(drawn.values())))[:max_prompts] if drawn else []
    rows, columns = max(1, len(report.variants)), max(1, len(prompts))
    figure = Figure(figsize=(1.7 + 1.25 * columns, 0.75 + 1.25 * rows), layout="constrained")
    if not drawn:
        figure.text(0.5, 0.5, "no pictures were drawn", ha="center", color="0.5")
        return figure
    grid = figure.subplots(rows, columns, squeeze=False)
    for row, (name, variant) in zip(grid, report.variants.items(), strict=True):
        for axes, prompt in zip(row, prompts, strict=True):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if prompt in drawn.get(name, {}):
                with Image.open(drawn[name][prompt]) as picture:
                    picture.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS))
                    axes.imshow(np.asarray(picture.convert("RGB")), interpolation="nearest")
            else:
                axes.text(
                    0.5, 0.5, "not drawn", ha="center", va="center", fontsize=7, color="0.5", transform=axes.transAxes
                )
        row[0].set_ylabel(textwrap.fill(variant.title, 20), rotation=0, ha="right", va="center", fontsize=8)
    for axes, prompt in zip(grid[0], prompts, strict=True):
        axes.set_title(textwrap.fill(prompt, 19), fontsize=7, va="bottom")
    return figure


def pictures_of(report: StudyReport, name: str) -> dict[str, Path]:
    """{prompt: file} of the variant's first seed that has pictures."""
    for run in report.runs_of(name):
        listing = run.folder / "pictures" / "prompts.json"
        if listing.exists():
            prompts = json.loads(listing.read_text())
            paths = {prompt: listing.parent / f"{index:02d}.png" for index, prompt in enumerate(prompts)}
            return {prompt: path for prompt, path in paths.items() if path.exists()}
    return {}
