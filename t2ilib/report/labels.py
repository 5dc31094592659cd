"""Names beside what they name in a figure, where they cover neither each other nor a marker."""

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.6}
"""Keeps a name readable where an error bar passes under it."""
RADII = (7, 14, 22, 32, 44, 58, 74, 92, 112, 136, 164)
"""Pixels (at 100 dpi) between a point and its name, tried in this order."""
WIDEST = 18
"""Characters of a name in one line."""


def folded(name: str) -> str:
    """A name in lines of at most WIDEST characters, broken behind underscores too."""
    return "\n".join(line.replace("_ ", "_") for line in textwrap.wrap(name.replace("_", "_ "), WIDEST))


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


def place_labels(axes: Axes, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Names beside their points: the nearest place that covers no other name or marker, with a thin line where it is
    far."""
    pixels = axes.transData.transform([point[:2] for point in points]) if points else []
    taken = [Bbox.from_extents(x - 5, y - 5, x + 5, y + 5) for x, y in pixels]
    taken += [text.get_window_extent() for text in axes.texts]
    to_axes = axes.transAxes.inverted().transform
    style = {"fontsize": 8, "va": "center", "ha": "center", "linespacing": 0.95, "bbox": PAPER}
    for pixel, (_, _, name, color) in sorted(zip(pixels, points, strict=True), key=lambda pair: -pair[0][1]):
        name = folded(name)
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
    """Where a name of `size` goes around `pixel`, and whether that is far; without a free place, where it covers
    least."""
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
