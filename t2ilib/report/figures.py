"""A study's pictures: learning curves, what quality costs, and what each variant draws for the same prompts and noise.

Figures are plain `matplotlib.figure.Figure` objects without pyplot's global state; notebooks show them with `display`.
A variant has one colour in every figure. One for which nothing was measured is None rather than an empty frame; `plots` are
those there are. Leaves out interactivity: a report must read the same on paper.
"""

import json
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
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
LONGEST_TITLE = 100
"""Characters of a prompt above its column."""


@dataclass(frozen=True)
class Plot:
    """A figure with its heading, how it is to be read, its caption, and the name of its file."""

    heading: str
    text: str
    caption: str
    file: str
    figure: Figure


def plots(report: StudyReport) -> list[Plot]:
    """The figures of a study for which something was measured or drawn."""
    told = (
        (
            "Learning",
            "Held-out loss by step; figures use the short names of the tables. Lower is better; a line that turns upwards has begun"
            " to memorise its training pictures. Where bands overlap, a lead of one line over another may be noise.",
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
        (
            "What it looks like",
            "The same prompts and the same starting noise in every row, first seed. Look for what was to be learned, and for what else"
            " changed. One picture proves nothing: numbers count more of them, over all seeds.",
            "The same prompts and noise, drawn by every variant",
            "pictures.png",
            plot_pictures,
        ),
    )
    drawn = [(*words, draw(report)) for *words, draw in told]
    return [Plot(*words, figure) for *words, figure in drawn if figure is not None]


def style_of(report: StudyReport, name: str) -> tuple[str, str]:
    """Colour and line style; more variants than colours go round again with another line."""
    index = list(report.variants).index(name)
    return COLORS[index % len(COLORS)], LINE_STYLES[index // len(COLORS) % len(LINE_STYLES)]


def plot_learning_curves(report: StudyReport, metric: str = "held_out_loss") -> Figure | None:
    """`metric` by step: the mean over seeds, and from the lowest to the highest seed as a band; named at the right end. None where
    no trained variant logged it.

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


def plot_cost_quality(report: StudyReport, costs: Sequence[str] = ()) -> Figure | None:
    """What was learned and kept, or where neither was measured held-out loss and CLIP score (rows), against costs (columns): means
    with 95% intervals, up is better; the untouched base is a line. None where no quality or no cost was measured.

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
    qualities = report.speaking("learned", "kept") or report.speaking("loss", "followed")
    if not costs or not qualities:
        return None
    figure = Figure(figsize=(5.2 * len(costs), 4.0 * len(qualities)), layout="constrained")
    grid = figure.subplots(len(qualities), len(costs), squeeze=False, sharex="col", sharey="row")
    panels = []
    for row, quality in zip(grid, qualities, strict=True):
        falls = report.metrics[quality].better == "lower"
        row[0].set_ylabel(report.metrics[quality].title + " (lower is better)" * falls)
        panels += [(axes, draw_panel(axes, report, cost, quality)) for axes, cost in zip(row, costs, strict=True)]
        if falls:
            row[0].invert_yaxis()  # and with it those that share it
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
    if report.metrics[quality].unit == "share":
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.05), min(high, 1.06))  # a t-interval may leave 0..1, a share may not
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


def plot_pictures(report: StudyReport, max_prompts: int = MAX_PROMPTS) -> Figure | None:
    """Variants (rows) by prompts (columns), of the first seed that drew: the same prompts and starting noise in every row. None
    where nothing was drawn."""
    drawn = {name: pictures for name in report.present if (pictures := pictures_of(report, name))}
    if not drawn:
        return None
    asked = Counter(prompt for pictures in drawn.values() for prompt in pictures)
    prompts = [prompt for prompt, _ in asked.most_common(max_prompts)]  # of all variants first
    rows, columns = len(report.present), len(prompts)
    figure = Figure(figsize=(1.7 + 1.25 * columns, 0.75 + 1.25 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for row, name in zip(grid, report.present, strict=True):
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
        row[0].set_ylabel(
            textwrap.fill(report.variants[name].title, 20), rotation=0, ha="right", va="center", fontsize=8
        )
    for axes, prompt in zip(grid[0], prompts, strict=True):
        title = prompt if len(prompt) <= LONGEST_TITLE else f"{prompt[:LONGEST_TITLE].rstrip()} …"
        axes.set_title(textwrap.fill(title, 19), fontsize=7, va="bottom")
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
