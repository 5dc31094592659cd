"""How far a long job on files is: a bar on a terminal, and elsewhere a line now and then, so that logs stay readable."""

import contextlib
import logging
import sys
import time

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from t2ilib.runlog import on_screen

log = logging.getLogger(__name__)

LEAST, MOST = 5, 60
"""Seconds between lines: a new tenth is told after the first at the earliest, and how far it is by the second at the latest."""


class Progress:
    """`progress(what, done, total)`, in bytes, or things of a kind, of which who does the job tells the end; another `what` begins another job.
    Says nothing where only warnings are logged."""

    def __init__(self, things: str = "") -> None:
        self.things = things
        self.what, self.tenths, self.last, self.bar = "", 0, 0.0, None
        self.quiet, self.terminal = not on_screen(logging.INFO), sys.stderr.isatty()

    def __enter__(self) -> "Progress":
        self.redirected = contextlib.ExitStack()
        if self.terminal and not self.quiet:
            self.redirected.enter_context(logging_redirect_tqdm())  # or lines would be written into the bar
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
        self.redirected.close()

    def __call__(self, what: str, done: int, total: int) -> None:
        if self.quiet or not total:
            return
        if what != self.what:
            self.close()
            self.what, self.tenths, self.last = what, 0, time.monotonic()
            if self.terminal:
                units = {"unit": f" {self.things}"} if self.things else {"unit": "B", "unit_scale": True}
                self.bar = tqdm(desc=what, total=total, initial=done, file=sys.stderr, **units)
        if self.bar is not None:
            self.bar.update(done - self.bar.n)
            return
        waited, tenths = time.monotonic() - self.last, done * 10 // total
        if (done == total and not self.things) or waited > MOST or (tenths > self.tenths and waited > LEAST):
            self.tenths, self.last = tenths, time.monotonic()
            size = f"{total:,} {self.things}" if self.things else f"{total / 1e6:,.1f} MB"
            log.info("%s: %.0f %% of %s", what, 100 * done / total, size)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
