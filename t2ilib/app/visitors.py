"""What one visitor's page is about, kept on the server under the name that Gradio gives a page: nobody sees another's.

A page that was closed is forgotten, and what is being drawn for it stops.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from t2ilib.config import ModelConfig
from t2ilib.drawing.settings import AdapterChoice


@dataclass
class Visitor:
    """`model`: the base of the page's settings, with all that its fields do not show; `restored`: the adapters of the picture that was dropped
    last, with what their files were then; `steps`, `comparison`: what those tabs are about, a `StepPictures` and a `Comparison`."""

    model: ModelConfig
    restored: tuple[AdapterChoice, ...] = ()
    steps: Any = None
    comparison: Any = None
    working: list[threading.Event] = field(default_factory=list)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[threading.Event]:
        """What stops the work of the scope when it is set."""
        event = threading.Event()
        self.working.append(event)
        try:
            yield event
        finally:
            self.working.remove(event)

    def stop(self) -> bool:
        """Stops all that is being drawn for this visitor; whether there was anything."""
        going = list(self.working)
        for event in going:
            event.set()
        return bool(going)


class Visitors:
    """`first`: the base that a new page begins with."""

    def __init__(self, first: Callable[[], ModelConfig]):
        self.first = first
        self.known: dict[str, Visitor] = {}
        self.lock = threading.Lock()

    def of(self, page: str) -> Visitor:
        """The visitor of a page, a new one where it is new. `page`: Gradio's `session_hash`."""
        with self.lock:
            return self.known.setdefault(page, Visitor(self.first()))

    def leave(self, page: str) -> None:
        """Forgets a page."""
        with self.lock:
            visitor = self.known.pop(page, None)
        if visitor is not None:
            visitor.stop()

    def close(self) -> None:
        """Forgets all pages."""
        for page in list(self.known):
            self.leave(page)
