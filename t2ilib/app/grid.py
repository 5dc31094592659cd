"""The third tab: what one or two settings do, on one labelled sheet (`drawing.grid`)."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from t2ilib.app.answering import QUIET, Updates, answer, stop_button
from t2ilib.app.panel import Panel
from t2ilib.app.studio import Studio
from t2ilib.app.visitors import Visitor
from t2ilib.app.wording import told, told_progress
from t2ilib.config import ConfigError
from t2ilib.drawing.axes import EXAMPLES, KINDS, OF_ADAPTERS, Axis, parse_axis
from t2ilib.drawing.desk import Drawing
from t2ilib.drawing.grid import Grid, Sheet, make_sheet, plan_grid
from t2ilib.drawing.pngtext import Restored
from t2ilib.tracking.pictures import log_pictures

NOTHING = ("nothing: one row", "")
TITLES = {
    "strength": "strength of the adapter",
    "checkpoint": "checkpoint of the adapter",
    "prompt": "words of the prompt",
}
"""What a kind of axis is called in the page, where its own name does not say it."""
COUNTED = re.compile(r"(?P<kind>[a-z]+)(?: \d+)?")


def kinds() -> list[tuple[str, str]]:
    """What may change along an axis: as the page calls it, and as an axis begins with it."""
    first = [(TITLES.get(kind, kind), kind) for kind in KINDS]
    return [
        *first,
        *(
            (f"{kind} of the second adapter" if kind != "adapter" else "second adapter", f"{kind} 2")
            for kind in OF_ADAPTERS
        ),
    ]


def example_of(kind: str) -> str:
    """What values of a kind look like."""
    found = COUNTED.fullmatch(kind or "")
    return f"such as {EXAMPLES[found['kind']]}" if found and found["kind"] in EXAMPLES else ""


def read_axis(kind: str | None, values: str) -> Axis | None:
    """An axis of what the page holds; None where nothing changes along it. Raises ConfigError as `parse_axis`."""
    if not kind:
        if values.strip():
            raise ConfigError(f"values {values.strip()!r}: choose what they are values of, or leave them out")
        return None
    return parse_axis(f"{kind}: {values}")


def split_axis(text: str) -> tuple[str, str]:
    """Kind and values of an axis as it was written."""
    kind, _, values = text.partition(":")
    return kind.strip(), values.strip()


class GridTab:
    """The tab, built into what is open of the page."""

    def __init__(self, studio: Studio, panel: Panel):
        self.studio, self.panel = studio, panel
        self.x, self.x_values = self.axis("x", "From column to column", kinds(), "strength")
        self.y, self.y_values = self.axis("y", "From row to row", [NOTHING, *kinds()], "seed")
        self.experiment = gr.Textbox(
            "",
            label="MLflow experiment",
            placeholder="without a name the sheet is only written as a file",
            elem_id="grid-experiment",
        )
        with gr.Row():
            self.button = gr.Button("Draw the grid", variant="primary", elem_id="grid-draw")
            self.told = gr.HTML("", elem_id="grid-told", render=False)
            stop_button(studio, self.told)
        self.told.render()
        self.image = gr.Image(
            label="Sheet",
            format="png",
            type="filepath",
            interactive=False,
            buttons=["download", "fullscreen"],
            elem_id="grid-sheet",
            elem_classes=["drawn"],
        )
        self.outputs = [self.x, self.x_values, self.y, self.y_values]
        self.button.click(
            answer(studio, self.told, self.draw),
            [*self.outputs, self.experiment, *panel.inputs],
            [self.told, self.image, panel.fields["seed"]],
            **QUIET,
        )

    def axis(self, name: str, label: str, choices: Sequence[tuple[str, str]], first: str) -> tuple[Any, Any]:
        """One axis's fields; what values look like is told as it changes."""
        with gr.Row(equal_height=True):
            kind = gr.Dropdown(
                choices, value=first, label=label, allow_custom_value=True, elem_id=f"grid-{name}", min_width=160
            )
            values = gr.Textbox(
                "",
                label=f"Values {label[0].lower()}{label[1:]}",
                placeholder=example_of(first),
                elem_id=f"grid-{name}-values",
                scale=2,
                min_width=200,
            )
        kind.change(lambda chosen: gr.update(placeholder=example_of(chosen)), kind, values, queue=False, **QUIET)
        return kind, values

    def take(self, restored: Restored) -> Updates:
        """The axes of a sheet that was dropped; nothing of another picture."""
        if not restored.grid:
            return {}
        x, y = (split_axis(restored.grid.get(axis, "")) for axis in ("x", "y"))
        return dict(zip(self.outputs, (*x, *y), strict=True))

    def draw(
        self, visitor: Visitor, x: str, x_values: str, y: str, y_values: str, experiment: str, *values: Any
    ) -> Iterator[Updates]:
        """Draws a sheet, writes it, and logs it where an experiment is named."""
        settings = self.panel.settings(visitor, values)
        columns, rows = read_axis(x, x_values), read_axis(y, y_values)
        if columns is None:
            raise ConfigError("choose what changes from column to column")
        grid = plan_grid(settings, columns, rows)
        yield {self.told: told("Beginning.", "going"), self.image: None, **self.panel.seed_told(settings)}
        for event in self.studio.follow(visitor, grid.jobs()):
            if isinstance(event, Drawing):
                yield self.written(grid, make_sheet(grid, event), experiment.strip())
                continue
            newest = [*event.previews[:1], *(picture.image for picture in event.finished[-1:])]
            yield {self.told: told_progress(event)} | ({self.image: newest[-1]} if newest else {})

    def written(self, grid: Grid, sheet: Sheet, experiment: str) -> Updates:
        """The sheet as a file, and in MLflow; a store that does not work loses no sheet."""
        if not sheet.pictures:
            return {self.told: told("Stopped before the first picture: nothing is kept.", "note"), self.image: None}
        with self.studio.saving:
            path = sheet.save(self.studio.out)
        lines = [f"{len(sheet.pictures)} of {sum(map(len, grid.cells))} pictures, written to {path}."]
        kind = "note" if sheet.stopped else "good"
        if experiment:
            try:
                log_pictures(
                    experiment, [path], grid.settings.model_dump(mode="json"), self.studio.results, name=path.stem
                )
                lines.append(f"Logged to the MLflow experiment {experiment}.")
            except (ConfigError, OSError) as error:
                lines, kind = [*lines, f"It is not in MLflow: {error}"], "bad"
        return {self.told: told("\n".join(lines), kind), self.image: self.studio.serve(path)}
