"""X/Y grids: the same settings along two axes, drawn in the order that loads least, on one labelled sheet that carries them as text.

A sheet's file says what a picture's does, of its first cell, and its axes: in A1111's text as its X/Y/Z plot has them, and in our own, from which
`read_picture` gives them back. Leaves out: a third axis, and sheets of other things than pictures.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from t2ilib.config import ConfigError
from t2ilib.drawing.axes import KINDS, Axis
from t2ilib.drawing.desk import Desk, Drawing, Picture, Stop, Watch
from t2ilib.drawing.pngtext import A1111, texts_of
from t2ilib.drawing.settings import DrawSettings
from t2ilib.evaluation.sampling import make_grid, save_png, shown_side

MOST_CELLS = 400
LEAST_SIDE, MOST_SIDE = 128, 512
"""Pixels of a cell's longer side: small pictures are enlarged to at least, large ones are at most."""
MOST_PIXELS = 2**26
"""Of a sheet; cells of more are smaller."""


@dataclass(frozen=True)
class Grid:
    """`cells`: rows of settings, one for each value of `y` (one row without it), in it one for each value of `x`. `settings`: what both axes
    change."""

    settings: DrawSettings
    x: Axis
    y: Axis | None
    cells: tuple[tuple[DrawSettings, ...], ...]

    def jobs(self) -> list[DrawSettings]:
        """The settings of all cells in `order`, for `Desk.draw` or `Desk.stream`; `make_sheet` takes what comes of them."""
        return [self.cells[row][column] for row, column in self.order()]

    def order(self) -> list[tuple[int, int]]:
        """(row, column) of every cell, so that the base changes least often, then the adapters, then what ends a batch; within these row by row."""
        places = [(row, column) for row, cells in enumerate(self.cells) for column in range(len(cells))]
        settings = {place: self.cells[place[0]][place[1]] for place in places}
        ranks: list[dict[Any, int]] = [{}, {}, {}]

        def rank(place: tuple[int, int]) -> tuple[int, ...]:
            return tuple(
                seen.setdefault(key, len(seen)) for seen, key in zip(ranks, changes_of(settings[place]), strict=True)
            )

        return sorted(places, key=lambda place: (rank(place), place))


@dataclass(frozen=True)
class Sheet:
    """A grid that was drawn. `pictures`: (row, column) -> picture, not all of them where it was `stopped`; `image`: the labelled sheet, in
    which cells that are lacking are grey."""

    grid: Grid
    pictures: Mapping[tuple[int, int], Picture]
    image: Image.Image
    stopped: bool = False

    def texts(self) -> dict[str, str]:
        """What its file says of it, see above. Raises ConfigError where nothing was drawn."""
        if not self.pictures:
            raise ConfigError("the grid was stopped before its first picture: there is nothing to keep")
        first = self.pictures[min(self.pictures)]
        axes = {"X": self.grid.x, **({"Y": self.grid.y} if self.grid.y else {})}
        more: dict[str, str] = {"Script": "X/Y/Z plot"}
        for name, axis in axes.items():
            more |= {f"{name} Type": KINDS[axis.kind].title, f"{name} Values": values_of(axis)}
        own = {name.lower(): written(axis) for name, axis in axes.items()}
        texts = texts_of(self.grid.settings, first.sampler, first.size, grid=own)
        return texts | {A1111: texts_of(first.settings, first.sampler, first.size, more=more)[A1111]}

    def save(self, folder: Path) -> Path:
        """Writes the sheet as `grid-00.png`, or the next free number, with its text; returns its path."""
        folder.mkdir(parents=True, exist_ok=True)
        taken = [int(p.stem[5:]) for p in folder.glob("grid-*.png") if p.stem[5:].isdecimal()]
        path = folder / f"grid-{1 + max(taken, default=-1):02d}.png"
        save_png(self.image, path, self.texts())
        return path


def changes_of(settings: DrawSettings) -> tuple[Any, Any, Any]:
    """What is loaded for settings, from what takes longest on: the base, what is attached to it, and all that pictures of one batch share."""
    attached = tuple((choice.path, choice.step) for choice in settings.adapters), settings.embeddings
    shared = settings.model_copy(update={"prompt": "", "seed": 0, "first": 0, "model": type(settings.model)()})
    return settings.model, attached, shared


def written(axis: Axis) -> str:
    """An axis as `parse_axis` reads it."""
    return f"{axis.kind}{f' {axis.which + 1}' if axis.which else ''}: {values_of(axis)}"


def values_of(axis: Axis) -> str:
    """The values of an axis as they were written; random seeds as the numbers that they were."""
    return ", ".join(map(str, axis.values)) if axis.kind == "seed" else axis.written


def plan_grid(settings: DrawSettings, x: Axis, y: Axis | None = None) -> Grid:
    """The settings of every cell. Where one axis is which adapter, it counts before the other, which may be how strong that one is.

    Raises ConfigError for two axes that change the same, too many cells, values that settings cannot have, and axes for which they have no
    place.
    """
    one = settings.model_copy(update={"num_pictures": 1})
    if y is None:
        return Grid(one, x, y, (tuple(x.applied(one)),))
    if (x.kind, x.which) == (y.kind, y.which) and (x.kind != "prompt" or x.values[0] == y.values[0]):
        raise ConfigError(f"both axes are {x.kind}: let something else change along one of them")
    if (count := len(x.values) * len(y.values)) > MOST_CELLS:
        raise ConfigError(f"the grid has {count} cells, and {MOST_CELLS} are the most: take fewer values")
    outer, inner = (x, y) if x.kind == "adapter" else (y, x)
    lines = [
        [outlined] * len(inner.values) if left_out(outlined, outer, inner) else inner.applied(outlined)
        for outlined in outer.applied(one)
    ]
    cells = lines if outer is y else zip(*lines, strict=True)
    return Grid(one, x, y, tuple(tuple(row) for row in cells))


def left_out(settings: DrawSettings, outer: Axis, inner: Axis) -> bool:
    """Whether the inner axis is how strong, or as when, an adapter is that the outer one has left out ("none")."""
    about = inner.kind in ("strength", "checkpoint") and inner.which >= len(settings.adapters)
    return about and outer.kind == "adapter"


def draw_grid(
    desk: Desk, grid: Grid, *, watch: Watch | None = None, stop: Stop | None = None, preview_every: int = 0
) -> Sheet:
    """Draws every cell of a grid, and the sheet; options as `Desk.draw`, which raises ConfigError as it does there."""
    return make_sheet(grid, desk.draw(grid.jobs(), watch=watch, stop=stop, preview_every=preview_every))


def make_sheet(grid: Grid, drawing: Drawing) -> Sheet:
    """The sheet of a grid of what `Desk` made of its `jobs`."""
    pictures = dict(zip(grid.order(), drawing.pictures, strict=False))
    sizes = [picture.size for picture in pictures.values()] or [(64, 64)]
    blank = Image.new("RGB", sizes[0], "#cccccc")
    rows = [
        [pictures[row, column].image if (row, column) in pictures else blank for column in range(len(cells))]
        for row, cells in enumerate(grid.cells)
    ]
    labels = grid.y.labels() if grid.y else [""]
    cell = cell_side(max(max(size) for size in sizes), sum(map(len, rows)))
    return Sheet(grid, pictures, make_grid(rows, labels, grid.x.labels(), cell), drawing.stopped)


def cell_side(side: int, count: int) -> int:
    """Pixels of a cell's longer side, so that a sheet of so many pictures has not too many."""
    shown = shown_side(side, LEAST_SIDE, MOST_SIDE)
    return min(shown, max(32, int((MOST_PIXELS / max(1, count)) ** 0.5)))
