"""One run's notebook on a worker of a Ray cluster, as the study sees it from elsewhere: start it, read what it prints, ask it to stop.

A class whose instance Ray makes an actor of, in a process of its own that has the run's share of a machine. It executes the notebook as a study
does here, in the folder that the study was started in, and leaves everything else to the study.
"""

import os
import queue
import secrets
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import t2ilib
from t2ilib.config import ConfigError
from t2ilib.studies.guard import MARK, Guard
from t2ilib.studies.notebooks import execute_notebook


class Bench:
    """Executes one notebook, once."""

    def __init__(self) -> None:
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.over, self.stopping = threading.Event(), False
        self.code: int | None = None
        self.error: BaseException | None = None
        self.end: Callable[[], None] | None = None

    def start(
        self, notebook: Path, output: Path, parameters: Path, variables: Mapping[str, str], folder: Path, version: str
    ) -> None:
        """`folder`: that the study was started in; `version`: of t2ilib there. Raises ConfigError where this machine has another one or does
        not see the study's files, TimeoutError where another notebook of this run does not end."""
        require_same(version)
        require_seen((folder, notebook, parameters))
        os.chdir(folder)
        mark = secrets.token_hex(8)
        guard = Guard(output.parent, mark)
        asked = (notebook, output, parameters, {**variables, MARK: mark})
        threading.Thread(target=self.work, args=(asked, guard), daemon=True).start()

    def work(self, asked: tuple, guard: Guard) -> None:
        try:
            self.code, _ = execute_notebook(*asked, self.lines.put, self.started, lambda: self.stopping)
        except Exception as error:
            self.error = error
        finally:
            guard.close()
            self.over.set()

    def started(self, end: Callable[[], None]) -> None:
        self.end = end
        if self.stopping:
            end()

    def read(self, seconds: float) -> tuple[list[str], int | None]:
        """The lines printed since the last time, and the exit code once there is one, for which it waits so long. Raises what went wrong with
        executing it at all."""
        ended = self.over.wait(seconds)
        lines = [self.lines.get() for _ in range(self.lines.qsize())]
        if self.error is not None:
            raise self.error
        return lines, self.code if ended else None

    def stop(self) -> None:
        """Asks the notebook to stop with a checkpoint; the second time, at once."""
        self.stopping = True
        if self.end is not None:
            self.end()


def require_same(version: str) -> None:
    """Raises ConfigError where this machine has another t2ilib than the study's: what they make is not to be compared."""
    if t2ilib.__version__ != version:
        raise ConfigError(
            f"{socket.gethostname()} has t2ilib {t2ilib.__version__} and the study is run by {version}: install the same on all nodes"
        )


def require_seen(paths: Sequence[Path]) -> None:
    """Raises ConfigError for the first of these that this machine does not see."""
    for path in paths:
        if not path.exists():
            raise ConfigError(
                f"{socket.gethostname()} does not see {path}: on a cluster the study's notebooks, its pictures, the folder that it is started in"
                " and --results must lie on storage that all nodes share, by the same path"
            )
