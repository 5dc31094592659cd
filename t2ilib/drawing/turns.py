"""Whose turn it is: one at a time, in the order they came, for whoever shares what cannot be used by two at once."""

import contextlib
import threading
from collections.abc import Callable, Iterator

SECONDS_BETWEEN_LOOKS = 0.05


class Line:
    """Those who wait, and first among them who has the turn."""

    def __init__(self) -> None:
        self.moved = threading.Condition()
        self.tickets: list[object] = []

    def __len__(self) -> int:
        """Who has the turn, and all who wait for it."""
        return len(self.tickets)

    @contextlib.contextmanager
    def turn(self, waiting: Callable[[int], None] = lambda before: None) -> Iterator[None]:
        """Waits for the turn, and has it for as long as the scope lasts. `waiting`: is told again and again how many are before, in this thread;
        leaves the line by raising."""
        ticket = object()
        with self.moved:
            self.tickets.append(ticket)
        try:
            while before := self.tickets.index(ticket):
                waiting(before)
                with self.moved:
                    self.moved.wait(SECONDS_BETWEEN_LOOKS)
            yield
        finally:
            with self.moved:
                self.tickets.remove(ticket)
                self.moved.notify_all()
