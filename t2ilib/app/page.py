"""The page: settings on the left, and on the right four ways of using them."""

from typing import Any

import gradio as gr

from t2ilib.app.answering import QUIET, Updates
from t2ilib.app.checkpoints import CheckpointsTab
from t2ilib.app.compare import CompareTab
from t2ilib.app.draw import DrawTab
from t2ilib.app.grid import GridTab
from t2ilib.app.panel import Panel
from t2ilib.app.studio import Studio
from t2ilib.drawing.pngtext import Restored

TITLE = "t2ilib"
STYLE = """
.gradio-container { width: 100% !important; max-width: 1500px !important; margin: 0 auto !important; }
.drawn img { width: 100% !important; height: 100% !important; object-fit: contain; }
input[role=combobox] { text-overflow: ellipsis; padding-right: 1.8rem !important; }
.block-label, .caption-label { pointer-events: none; }
#drop, #vote-drop { padding-top: 1.2rem; }
progress { accent-color: #4f46e5; }
.told { border-left: 4px solid var(--border-color-primary); padding: .5rem .8rem; border-radius: 4px;
        background: var(--background-fill-secondary); color: var(--body-text-color); overflow-wrap: anywhere; }
.told.good { border-color: #15803d; } .told.note { border-color: #b45309; } .told.bad { border-color: #b91c1c; }
.told.going { border-color: #1d4ed8; display: flex; gap: .8rem; align-items: center; }
.told.going progress { width: 9rem; flex: none; }
.grid-wrap img, .preview img, .drawn img { image-rendering: pixelated; }
.grid-wrap { max-height: none !important; overflow: visible !important; }
#drop .icon-wrap, #vote-drop .icon-wrap { display: none; }
.grid-wrap .caption-label { max-width: 100%; white-space: normal; }
footer { display: none !important; }
"""
"""Small pictures are enlarged as they are; large ones are made smaller by the browser, which smooths nothing either way that matters."""
DELETE_EVERY, DELETE_AFTER = 3600, 24 * 3600
"""Seconds: copies of pictures that were given out are kept for a day, the pictures themselves for good."""


def build_page(studio: Studio) -> gr.Blocks:
    """The whole page, over one studio."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(DELETE_EVERY, DELETE_AFTER)) as page:
        gr.Markdown(
            f"# {TITLE}\nDrawing with what was trained, over **{studio.model.base}**, with the adapters under `{studio.results}`."
        )
        with gr.Row():
            with gr.Column(scale=4, min_width=360):
                panel = Panel(studio)
            with gr.Column(scale=6, min_width=380), gr.Tabs() as tabs:
                with gr.Tab("Draw", id="draw"):
                    DrawTab(studio, panel)
                with gr.Tab("Checkpoints", id="checkpoints"):
                    checkpoints = CheckpointsTab(studio, panel)
                with gr.Tab("Grid", id="grid"):
                    grid = GridTab(studio, panel)
                with gr.Tab("Compare", id="compare"):
                    compare = CompareTab(studio, panel)
        wire(page, studio, panel, tabs, (checkpoints, grid, compare))
    return page


def wire(page: gr.Blocks, studio: Studio, panel: Panel, tabs: gr.Tabs, built: tuple[Any, GridTab, Any]) -> None:
    """What the parts of the page do to each other."""
    checkpoints, grid, compare = built

    def take_grid(restored: Restored) -> Updates:
        return grid.take(restored) | ({tabs: gr.Tabs(selected="grid")} if restored.grid else {})

    def offered(anywhere: bool, begins: bool) -> Updates:
        runs, names, said = panel.lists(anywhere)
        own = panel.begun(runs, names) if begins else panel.offered(runs, names)
        return {panel.told: said or gr.skip(), **own, **checkpoints.offered(runs), **compare.offered(runs, names)}

    def left(request: gr.Request) -> None:
        studio.visitors.leave(request.session_hash)

    panel.wire(take_grid, [*grid.outputs, tabs])
    lists = [panel.told, *panel.inputs, *panel.rows, checkpoints.run, compare.study, compare.one, compare.other]
    page.load(lambda: offered(False, True), None, lists, **QUIET)
    panel.look.click(lambda: offered(True, False), None, lists, **QUIET)
    page.unload(left)
