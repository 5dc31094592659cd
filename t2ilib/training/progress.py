"""Progress for whoever watches: plain lines in a terminal and in the kernels of a study, a panel in a notebook that a person runs (`panel`)."""

import contextlib
import os
import time
from collections.abc import Iterator

from t2ilib.config import RunConfig
from t2ilib.tracking.tracker import Tracker, Trackers
from t2ilib.training.panel import Panel

SECONDS_BETWEEN_LINES = 5.0
SHARE_BETWEEN_LINES = 0.05
"""Of the time so far, in kernels, whose lines stay in a saved notebook: of ten hours some 140 lines."""


def in_kernel() -> bool:
    """True in a Jupyter kernel."""
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    shell = get_ipython()
    return shell is not None and getattr(shell, "kernel", None) is not None


def in_live_notebook() -> bool:
    """True in a Jupyter kernel that a person uses; studies set T2ILIB_BATCH for the kernels they start."""
    return not os.environ.get("T2ILIB_BATCH") and in_kernel()


@contextlib.contextmanager
def shown_in_notebook(run: RunConfig, tracker: Tracker, main: bool) -> Iterator[tuple[Tracker, Panel | None]]:
    """A tracker that also tells a panel, and the panel, in the `main` process of a Jupyter kernel; elsewhere the tracker, and None. When the
    scope ends the panel shows how it did."""
    if not (main and in_kernel()):
        yield tracker, None
        return
    panel = Panel(run, live=in_live_notebook())
    try:
        yield Trackers(tracker, panel), panel
    except BaseException as error:
        panel.end(error)
        raise
    panel.end()


class Progress:
    """Called after every step with the loss and the seconds spent in steps so far, by earlier starts of the run too."""

    def __init__(self, run: RunConfig, start: int, panel: Panel | None = None):
        self.steps, self.start, self.panel = run.training.steps, start, panel
        self.share = SHARE_BETWEEN_LINES if panel else 0.0
        self.began = self.shown = time.monotonic()
        self.before: float | None = None

    def __call__(self, step: int, loss: float, seconds: float) -> None:
        if self.panel is not None:
            self.panel.progress(step, seconds)
        if self.panel is not None and self.panel.live:
            return
        self.before = seconds if self.before is None else self.before
        seconds -= self.before  # of this start alone: the first step of one is not timed
        now = time.monotonic()
        pause = max(SECONDS_BETWEEN_LINES, self.share * (now - self.began))
        if now - self.shown >= pause or step in (self.start + 1, self.steps):
            self.shown = now
            print(self.line(step, loss, seconds), flush=True)

    def line(self, step: int, loss: float, seconds: float) -> str:
        done = step - self.start - 1
        if not done or not seconds:
            return f"step {step}/{self.steps}  loss {loss:.4f}"
        left = round((self.steps - step) * seconds / done)
        return (
            f"step {step}/{self.steps}  loss {loss:.4f}  {done / seconds:.2f} steps/s  ETA {left // 60}:{left % 60:02d}"
        )
