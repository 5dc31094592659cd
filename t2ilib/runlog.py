"""run.log: what is said while a run trains, or a pipeline goes on, kept in its folder beside what is on the screen.

A run may be refused before it has a folder, and then it is to leave nothing; so lines wait in memory until `open` says where they go. Everything
that the library logs is written, with its time, also what the screen is not to show, and what `write` is told, which is for the file alone.
Leaves out what other libraries say.
"""

import contextlib
import logging
import os
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import TextIO

LIBRARY = logging.getLogger("t2ilib")
screen: list[int] = []
"""The level from which the screen shows what the library logs, while a log is kept."""


def on_screen(level: int, logger: logging.Logger = LIBRARY) -> bool:
    """Whether what the library logs at a level, by one of its loggers, is shown, and not only kept."""
    while logger is not LIBRARY and not logger.level:
        logger = logger.parent
    known = LIBRARY.getEffectiveLevel() if not screen else screen[0]
    return level >= (known if logger is LIBRARY else logger.level)


class RunLog(logging.Handler):
    """A log for as long as its scope lasts; an error that ends the scope is its last line. Of logs within logs, the outermost has the library
    log all that is worth keeping, and passes on what was to be shown."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(message)s"))
        self.waiting: list[str] = []
        self.file: TextIO | None = None
        self.before: tuple[int, bool] | None = None
        self.lost = False

    def __enter__(self) -> "RunLog":
        if not screen:
            self.before = (LIBRARY.level, LIBRARY.propagate)
            screen.append(LIBRARY.getEffectiveLevel())
            LIBRARY.propagate = False
            LIBRARY.setLevel(min(logging.INFO, screen[0]))
        LIBRARY.addHandler(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        LIBRARY.removeHandler(self)
        if self.before is not None:
            level, LIBRARY.propagate = self.before
            LIBRARY.setLevel(level)
            screen.clear()
        if isinstance(error, SystemExit):
            self.write(f"ended early, with exit status {error.code}")
        elif error is not None:
            self.write("".join(traceback.format_exception(kind, error, trace)).rstrip())
        if self.file is not None:
            with contextlib.suppress(OSError):  # what a full disk did not take, which has been told
                self.file.close()
        self.file = None

    def open(self, path: Path) -> None:
        """Writes to `path` from here on, behind what is there, and first what has waited. Raises OSError where that cannot be."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a", encoding="utf-8", errors="backslashreplace")
        waiting, self.waiting = self.waiting, []
        self.put(f"{now()} --- process {os.getpid()}")
        for line in waiting:
            self.put(line)

    def emit(self, record: logging.LogRecord) -> None:
        self.write(self.format(record), record.created)
        if self.before is not None and on_screen(record.levelno, logging.getLogger(record.name)):
            for handler in logging.getLogger().handlers or [logging.lastResort]:
                if record.levelno >= handler.level:
                    handler.handle(record)

    def write(self, text: str, at: float | None = None) -> None:
        """A line for the file alone."""
        line = f"{now(at)} {text}"
        if self.file is None:
            self.waiting.append(line)
        else:
            self.put(line)

    def put(self, line: str) -> None:
        """A disk that is full must not end what writes about it: that is told once, on the screen."""
        try:
            self.file.write(f"{line}\n")
            self.file.flush()
        except OSError as error:
            if not self.lost:
                print(f"{self.file.name} cannot be written, so it lacks lines: {error}", file=sys.stderr)
            self.lost = True


def now(at: float | None = None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
