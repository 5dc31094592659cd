"""Figures of an inspection: how large the pictures are, how long their captions, and which words are in them."""

import numpy as np
from matplotlib.figure import Figure

from t2ilib.data.inspection import HELD_OUT, TRAINING, Inspection
from t2ilib.report.figures import COLORS

WORDS = 25
FEW_BARS = 8
"""Fewer do not fill the axes."""


def plot_sizes(found: Inspection) -> Figure | None:
    """Width by height of every picture, and of the samples that are made of them. None where there are no pictures."""
    if not found.records:
        return None
    figure = Figure(figsize=(7, 5.6), layout="constrained")
    axes = figure.add_subplot(xlabel="width, pixels", ylabel="height, pixels")
    parts = np.array(found.parts)
    for part, color in ((TRAINING, COLORS[0]), (HELD_OUT, COLORS[1])):
        heights, widths = found.sizes[parts == part].T
        style = {"s": 16, "alpha": 0.5, "color": color, "linewidths": 0}
        if len(widths):
            axes.scatter(widths, heights, label=f"{part} ({len(widths):,})", **style)
    samples = np.array([[found.run.data.resolution] * 2])
    if found.run.data.buckets:
        samples = np.array(sorted({tuple(size) for size in found.assigned.targets.tolist()}))
    axes.scatter(*samples.T[::-1], marker="s", s=40, facecolors="none", edgecolors=COLORS[2], label="samples")
    sides = np.concatenate([found.sizes, samples]).astype(float)
    low, high = sides.min() / 1.25, sides.max() * 1.25
    axes.plot([low, high], [low, high], color="0.8", linewidth=1, zorder=0)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
    doubling = [2**power for power in range(3, 16)]
    ticks = [side for side in doubling if low <= side <= high]
    if len(ticks) < 3:
        ticks = sorted({*ticks, *(side * 3 // 2 for side in doubling if low <= side * 3 // 2 <= high)})
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, [str(tick) for tick in ticks])
        axis.set_ticks([], minor=True)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes.set_title("left of or below its square a picture is enlarged", fontsize=9, color="0.35", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_lengths(found: Inspection) -> Figure | None:
    """How many captions have how many words. None where there are no captions."""
    lengths = found.captions.lengths
    if not lengths:
        return None
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot(xlabel="words of a caption", ylabel="captions")
    width = max(1, -(-(max(lengths) - min(lengths) + 1) // 40))
    edges = np.arange(min(lengths), max(lengths) + width + 1, width) - 0.5
    axes.hist(list(lengths), edges, weights=list(lengths.values()), color=COLORS[0], rwidth=0.9)
    if len(edges) < FEW_BARS:
        middle = (edges[0] + edges[-1]) / 2
        axes.set_xlim(middle - FEW_BARS / 2, middle + FEW_BARS / 2)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_words(found: Inspection) -> Figure | None:
    """The most frequent words. None where there are none."""
    words = found.captions.words[:WORDS]
    if not words:
        return None
    figure = Figure(figsize=(7, 0.7 + 0.2 * len(words)), layout="constrained")
    axes = figure.add_subplot(xlabel="times")
    axes.barh(range(len(words)), [count for _, count in words], color=COLORS[0], height=0.7)
    axes.set_yticks(range(len(words)), [word for word, _ in words], fontsize=9)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
