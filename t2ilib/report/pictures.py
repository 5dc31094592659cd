"""What each variant draws for the same prompts and the same starting noise: variants are rows, prompts are columns."""

import io
import textwrap
from collections import Counter
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure, FigureBase
from PIL import Image

from t2ilib.report.contents import StudyReport

MAX_PROMPTS = 8
LONGEST_TITLE = 100
"""Characters of a prompt above its column."""
POINTS_A_CHARACTER = 0.53
"""Of the font's size: what a character is wide, on the average."""


def plot_pictures(report: StudyReport, max_prompts: int = MAX_PROMPTS) -> Figure | None:
    """Variants (rows) by prompts (columns), of the first seed that drew. None where nothing was drawn."""
    prompts = shown_prompts(report, max_prompts)
    if not prompts:
        return None
    size = (1.7 + 1.25 * len(prompts), 0.75 + 1.25 * len(report.present))
    figure = Figure(figsize=size, layout="constrained")
    draw_pictures(figure, report, prompts, width=1.25)
    return figure


def shown_prompts(report: StudyReport, max_prompts: int = MAX_PROMPTS) -> list[str]:
    """The prompts that are shown: first those that most variants drew."""
    asked = Counter(prompt for name in report.present for prompt in pictures_of(report, name))
    return [prompt for prompt, _ in asked.most_common(max_prompts)]


def draw_pictures(
    figure: FigureBase, report: StudyReport, prompts: list[str], width: float, small: bool = False
) -> None:
    """Draws the grid into `figure`. `width`: inches of a column, which its prompt is folded to; `small`: titles of
    variants in two lines at most, for rows that have no room for more."""
    font = 6.5 if small else 7
    drawn = {name: pictures_of(report, name) for name in report.present}
    grid = figure.subplots(len(report.present), len(prompts), squeeze=False)
    for row, name in zip(grid, report.present, strict=True):
        for axes, prompt in zip(row, prompts, strict=True):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if prompt in drawn[name]:
                with Image.open(io.BytesIO(drawn[name][prompt])) as picture:
                    axes.imshow(np.asarray(picture.convert("RGB")), interpolation="nearest")
            else:
                middle = {"ha": "center", "va": "center", "transform": axes.transAxes}
                axes.text(0.5, 0.5, "not drawn", fontsize=font, color="0.5", **middle)
        lines = {"width": 28, "max_lines": 2, "placeholder": " …"} if small else {"width": 20}
        title = textwrap.fill(report.variants[name].title, **lines)
        row[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=font + 1)
    characters = int(72 * width / (POINTS_A_CHARACTER * font))
    for axes, prompt in zip(grid[0], prompts, strict=True):
        title = prompt if len(prompt) <= LONGEST_TITLE else f"{prompt[:LONGEST_TITLE].rstrip()} …"
        axes.set_title(textwrap.fill(title, characters), fontsize=font, va="bottom")


def pictures_of(report: StudyReport, name: str) -> Mapping[str, bytes]:
    """{prompt: PNG} of the variant's first seed that has pictures."""
    return next((run.pictures for run in report.runs_of(name) if run.pictures), {})
