"""The first tab: pictures by the settings on the left, and beside each, if wanted, what the base alone makes of the same noise."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from t2ilib.app.answering import QUIET, Updates, answer, stop_button
from t2ilib.app.asking import changed_files
from t2ilib.app.panel import Panel
from t2ilib.app.studio import Studio
from t2ilib.app.visitors import Visitor
from t2ilib.app.wording import count_told, files_told, told, told_progress, words_told
from t2ilib.drawing.desk import Drawing, Picture
from t2ilib.drawing.settings import DrawSettings


class DrawTab:
    """The tab, built into what is open of the page."""

    def __init__(self, studio: Studio, panel: Panel):
        self.studio, self.panel = studio, panel
        self.beside = gr.Checkbox(label="The base alone beside it, from the same noise", elem_id="beside-base")
        with gr.Row():
            self.button = gr.Button("Draw", variant="primary", elem_id="draw")
            self.told = gr.HTML("", elem_id="draw-told", render=False)
            stop_button(studio, self.told)
        self.told.render()
        self.gallery = picture_gallery("Pictures")
        self.button.click(
            answer(studio, self.told, self.draw),
            [self.beside, *panel.inputs],
            [self.told, self.gallery, panel.fields["seed"]],
            **QUIET,
        )

    def draw(self, visitor: Visitor, beside: bool, *values: Any) -> Iterator[Updates]:
        """Draws, shows what is expected and what is whole, and tells where it was written."""
        settings = self.panel.settings(visitor, values)
        yield {self.told: told("Beginning.", "going"), **self.panel.seed_told(settings)}
        begun, shown, written = time.monotonic(), [], []
        for event in self.studio.follow(visitor, [settings], beside):
            if isinstance(event, Drawing):
                said = self.outcome(settings, event, written, time.monotonic() - begun)
                yield {self.told: said, self.gallery: gallery_update(shown, beside)}
                continue
            for picture in event.finished:
                written.append(self.studio.keep(picture))
                shown += self.entries(picture, written[-1])
            update = {self.told: told_progress(event)}
            if event.previews or event.finished:
                expected = [(image, "as expected so far") for image in event.previews]
                update[self.gallery] = gallery_update([*shown, *expected], beside and not expected)
            yield update

    def entries(self, picture: Picture, path: Path) -> list[tuple[str, str]]:
        """A picture as the gallery has it: its file and what stands below, and the base's beside it."""
        entries = [(self.studio.serve(path), path.name)]
        if picture.base is not None:
            base = path.with_stem(f"{path.stem}-base")
            entries.append((self.studio.serve(base), f"{path.stem}, base alone"))
        return entries

    def outcome(self, settings: DrawSettings, drawing: Drawing, written: list[Path], seconds: float) -> str:
        """What came of it, in words."""
        count = count_told(len(written), "picture")
        if drawing.stopped:
            head = f"Stopped: {count} of {settings.num_pictures} {'were' if len(written) != 1 else 'was'} whole"
        else:
            head = f"{count}, seed {settings.seed}, in {seconds:.1f} s"
        lines = [head + (f"; written to {files_told(written)}." if written else ".")]
        lines += words_told(self.studio.desk.loaded.words)
        notes = changed_files(settings.adapters, drawing.pictures[0]) if drawing.pictures else []
        return told("\n".join(lines + notes), "note" if notes or drawing.stopped else "good")


def picture_gallery(label: str) -> gr.Gallery:
    """Pictures side by side, each its own file."""
    return gr.Gallery(
        label=label,
        format="png",
        interactive=False,
        height="auto",
        object_fit="contain",
        columns=2,
        buttons=["download", "fullscreen"],
    )


def gallery_update(entries: list[tuple[Any, str]], pairs: bool = False) -> Any:
    """The gallery with these; pairs stand side by side."""
    columns = 2 if len(entries) in (2, 4) else 4 if pairs and len(entries) > 2 else min(3, max(1, len(entries)))
    return gr.update(value=entries, columns=columns)
