"""Sees to it that a notebook ends with the worker that executes it, and that no other begins before it has: a process of its own beside both.

A worker on a cluster may be gone at any moment, killed or with its machine, and its notebook is to go on elsewhere, from its last checkpoint.
Two processes must never write to one run's folder. So the worker starts a guard, as `python -m t2ilib.studies.guard FOLDER MARK`, which

- takes a lock in the run's folder, waiting for the guard before it, and says so by a line;
- then waits for its standard input to end, which it does when the worker closes it or dies in any way;
- then kills every process whose environment has MARK, which is the notebook's and what that starts, and lets go of the lock.

A lock is the operating system's, and dies with its machine: on NFS when the server has not heard of that for its lease time (90 seconds unless
set otherwise), for which SECONDS_TO_WAIT leaves room. The guard is no child of the worker's, for Ray kills those itself, and nothing that the
project imports at length is imported here, for every run waits for its guard.
"""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

MARK = "T2ILIB_GUARDED_BY"
"""The variable by which a guard knows its notebook's processes."""
LOCK = ".executing.lock"
SECONDS_TO_WAIT = 300.0
HELD, REFUSED = "held", "refused"


class Guard:
    """The worker's side: `mark` goes into the notebook's environment. Raises TimeoutError where another notebook of this run does not end."""

    def __init__(self, folder: Path, mark: str):
        command = [sys.executable, "-m", "t2ilib.studies.guard", str(folder), mark]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True)
        self.process.wait()  # its child, which is nobody's, is the guard
        if (said := self.process.stdout.readline().strip()) != HELD:
            raise TimeoutError(
                f"{folder / LOCK} is still held after {SECONDS_TO_WAIT:.0f} s, so another process is executing this run: end it, or wait"
                if said == REFUSED
                else f"the guard of {folder} did not start"
            )

    def close(self) -> None:
        """Lets the guard go, and waits until it has."""
        self.process.stdin.close()
        self.process.stdout.read()


def marked(mark: str) -> list[psutil.Process]:
    """The processes that have the mark, dead ones left out."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # gone meanwhile, or another user's
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def kill_marked(mark: str) -> None:
    """Until there is none: one that is killed may just have started another."""
    while family := marked(mark):
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=5)


def guard(folder: Path, mark: str) -> None:
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=SECONDS_TO_WAIT, poll_interval=0.2)
    except Timeout:
        print(REFUSED, flush=True)
        return
    print(HELD, flush=True)
    sys.stdin.read()
    kill_marked(mark)
    lock.release()


if __name__ == "__main__":
    if os.fork():
        os._exit(0)
    guard(Path(sys.argv[1]), sys.argv[2])
