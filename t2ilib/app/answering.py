"""How a button is answered: by a generator that tells how far it is, whose mistakes become sentences in the page.

Every button that draws has its stop beside it, and waits for its turn at the desk, not in Gradio's queue: so the page can tell what is waited
for, and who waits can leave.
"""

from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from t2ilib.app.studio import Studio
from t2ilib.app.visitors import Visitor
from t2ilib.app.wording import told, told_error

Updates = dict[Any, Any]
QUIET = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
"""Of every event: no endpoint for programs, no cover over what is shown, no queue of Gradio's."""


def answer(studio: Studio, place: Any, work: Callable[..., Iterator[Updates]]) -> Callable[..., Iterator[Updates]]:
    """What Gradio calls for a button: `work(visitor, *values)`, whose mistakes are told in `place`."""

    def answered(request: gr.Request, *values: Any) -> Iterator[Updates]:
        try:
            yield from work(studio.visitors.of(request.session_hash), *values)
        except Exception as error:  # whatever it is, the page tells it and the server lives on
            yield {place: told_error(error)}

    return answered


def stop_button(studio: Studio, place: Any) -> gr.Button:
    """A button that stops all that is being drawn for this visitor."""
    button = gr.Button("Stop", variant="stop", min_width=80, scale=0)

    def stop(request: gr.Request) -> Any:
        visitor: Visitor = studio.visitors.of(request.session_hash)
        return gr.skip() if visitor.stop() else told("Nothing is being drawn.", "note")

    button.click(stop, None, place, queue=False, **QUIET)
    return button
