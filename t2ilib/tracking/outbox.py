"""What a run logs on its way to MLflow: sent in order as it comes, and while the store does not answer kept in the run's folder.

    <run>/unsent/<MLflow run>.jsonl     where it is to go, then a thing a line (see `tracking.sending`)
    <run>/unsent/<MLflow run>.refused   likewise: things that the store would not take, which the next start tries once more
    <run>/unsent/<MLflow run>/          pictures, and files from elsewhere, that wait

No error of a store ends a training, or holds it up: after a failed attempt the next one comes a second later, then two, four, at last a
minute, and takes SECONDS_TO_ANSWER where nothing answers. MLflow's own client would wait and try again for four minutes at every request.
What still waits when the run ends is tried for a while, then told: the next start of the run sends it, the next start of its study, and
`send_kept`. The file has what is older, memory what is younger: while the store is away no more than what came since the last attempt.

Leaves out the beginning of a run, for which a store has to answer. The file is one process's at a time, by a lock.
"""

import contextlib
import json
import logging
import os
import shutil
import threading
import time
from pathlib import Path
from shlex import quote
from typing import Any

from filelock import FileLock, Timeout

from t2ilib.tracking.sending import MAX_METRICS, SENDERS, Destination, Thing, is_refusal, store_errors
from t2ilib.tracking.store import patience, quiet_mlflow

log = logging.getLogger(__name__)

UNSENT = "unsent"
SECONDS_TO_ANSWER, SECONDS_TO_WORK = 3, 30
"""Of a store that has just failed, and of one that works: for connecting, and between two parts of an answer."""
LONGEST_PAUSE = 60.0
SECONDS_AT_END = 30.0
SECONDS_FOR_LOCK = 10.0


class Outbox:
    """Things for one MLflow run, first in, first out. `folder`: the run's. `add` may be called by any thread, all else by one."""

    def __init__(self, folder: Path, uri: str, run_id: str, client: Any = None):
        self.folder, self.uri, self.run_id, self.client = folder.absolute(), uri, run_id, client
        self.file = self.folder / UNSENT / f"{run_id}.jsonl"
        self.refused = self.file.with_suffix(".refused")
        self.files = self.file.with_suffix("")
        self.lock = FileLock(self.file.with_suffix(".lock"))
        self.adding = threading.Lock()
        self.things: list[Thing] = []
        self.known: Destination | None = None
        self.at, self.failures, self.pause_until, self.reason = 0, 0, 0.0, ""
        if self.refused.exists() and self.hold():
            self.append(self.file, self.refused.read_text(encoding="utf-8").partition("\n")[2])
            self.refused.unlink()

    def add(self, kind: str, **told: Any) -> None:
        """`kind`: one of SENDERS. Metrics join those before them."""
        with self.adding:
            last = self.things[-1] if self.things else {}
            joins = kind == "metrics" == last.get("kind") and last.get("again") == told.get("again")
            if joins and len(last["values"]) + len(told["values"]) <= MAX_METRICS:
                last["values"] += told["values"]
            else:
                self.things.append({"kind": kind, **told})

    def send(self, at_once: bool = False) -> bool:
        """Sends what waits; returns whether all of it was sent. After a failure the next attempt comes after a pause, or `at_once`. What
        was not sent then is kept on disk."""
        due = at_once or time.monotonic() >= self.pause_until
        if due and (not self.file.exists() or self.hold()):
            try:
                with patience(SECONDS_TO_ANSWER if self.failures else SECONDS_TO_WORK):
                    self.send_file()
                    self.send_things()
                if self.failures:
                    log.info("the MLflow store %s answers again, and has what was kept meanwhile", self.uri)
                self.failures = 0
            except store_errors() as error:
                self.failed(error)
        if self.things and self.failures:
            self.keep()
        return not self.things and not self.file.exists()

    def send_file(self) -> None:
        """From where the last attempt ended, `at`, in bytes."""
        if not self.file.exists():
            return
        with self.file.open("rb") as lines:
            lines.seek(self.at)
            while line := lines.readline():
                with contextlib.suppress(ValueError):  # cut off by a kill while it was written
                    thing = json.loads(line)
                    if "kind" in thing:
                        self.send_one(thing)
                self.at = lines.tell()
        self.file.unlink()
        self.at = 0
        if not self.refused.exists():
            shutil.rmtree(self.files, ignore_errors=True)

    def send_things(self) -> None:
        while self.things:
            with self.adding:
                thing = self.things.pop(0)
            try:
                self.send_one(thing)
            except store_errors():
                with self.adding:
                    self.things.insert(0, thing | {"kept": True})
                raise

    def send_one(self, thing: Thing) -> None:
        """Raises what a store raises that does not work. What it refuses is set aside, so that nothing else waits for it."""
        try:
            SENDERS[thing["kind"]](self.destination(), thing)
        except store_errors() as error:
            if not is_refusal(error):
                raise
            if not self.refused.exists():
                log.warning("MLflow does not take all that is logged (%s): %s", thing["kind"], said(error))
            self.reason = said(error)
            self.append(self.refused, self.written(thing))

    def destination(self) -> Destination:
        if self.known is None:
            quiet_mlflow()
            from mlflow import MlflowClient

            self.client = self.client or MlflowClient(self.uri)
            self.known = Destination(self.client, self.run_id, self.folder)
        return self.known

    def failed(self, error: Exception) -> None:
        if not self.failures:
            log.warning(
                "the MLflow store %s does not take what is logged (%s): the run goes on, and what it logs is kept in %s until it does",
                self.uri, said(error), self.file.parent,
            )  # fmt: skip
        self.failures, self.reason = self.failures + 1, said(error)
        self.pause_until = time.monotonic() + min(LONGEST_PAUSE, 2.0 ** (self.failures - 1))
        self.known = None  # to be asked again: some of it may have arrived and not been confirmed

    def keep(self, seconds: float = 0.0) -> None:
        """Writes down what waits in memory, unless another process has the file, for which up to `seconds` are waited."""
        if self.hold(seconds):
            with self.adding:
                things, self.things = self.things, []
            self.append(self.file, "".join(map(self.written, things)))

    def written(self, thing: Thing) -> str:
        """A thing as a line. A picture becomes a file, and what lies outside the run's folder is copied, as it may not stay."""
        if "picture" in thing:
            self.files.mkdir(parents=True, exist_ok=True)
            path = self.files / f"{time.time_ns()}.png"
            thing.pop("picture").save(path)
            thing["path"] = str(path)
        if "path" in thing:
            path = (self.folder / thing["path"]).absolute()
            if not path.is_relative_to(self.folder) and path.exists():
                place = self.files / str(time.time_ns()) / path.name
                place.parent.mkdir(parents=True)
                (shutil.copytree if path.is_dir() else shutil.copy)(path, place)
                path = place
            thing["path"] = str(path.relative_to(self.folder) if path.is_relative_to(self.folder) else path)
        return json.dumps(thing | {"kept": True}) + "\n"

    def append(self, file: Path, lines: str) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            lines = json.dumps({"uri": self.uri, "run_id": self.run_id}) + "\n" + lines
        elif not ends_whole(file):
            lines = "\n" + lines
        with file.open("a", encoding="utf-8") as kept:
            kept.write(lines)

    def hold(self, seconds: float = 0.0) -> bool:
        """Whether the file is this outbox's to write and to send, until it is closed."""
        if self.lock.is_locked:
            return True
        self.file.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire(timeout=seconds)
        except Timeout:
            return False
        return True

    def close(self, seconds: float | None = None) -> str:
        """Tries for `seconds`, SECONDS_AT_END where none are said, to send what waits, and keeps the rest; returns a sentence about that, "" where there is none."""
        from tenacity import Retrying, retry_if_result, stop_after_delay, wait_exponential

        trying = Retrying(
            stop=stop_after_delay(SECONDS_AT_END if seconds is None else seconds),
            wait=wait_exponential(multiplier=0.5, max=8),
            retry=retry_if_result(lambda sent: not sent),
            retry_error_callback=lambda state: False,
        )
        trying(self.send, at_once=True)
        if self.things:
            self.keep(SECONDS_FOR_LOCK)
        if waits := self.file.exists() or self.refused.exists():
            told = (
                f"not all that was logged is in the MLflow store {self.uri} ({self.reason}). The rest is kept in {self.file.parent}:"
                f" `t2ilib send {quote(str(self.folder))}` sends it, and so does the next start of the run"
            )
        self.lock.release()
        if not waits and self.file.parent.exists():
            Path(self.lock.lock_file).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # where something waits for another MLflow run
                self.file.parent.rmdir()
        return told if waits else ""


def send_kept(folder: Path, seconds: float | None = None) -> dict[Path, str]:
    """Sends what runs at and below `folder` kept; run's folder -> a sentence about what could not be sent, "" where all of it was.

    `seconds`: for how long each is tried, SECONDS_AT_END where none are said. Leaves a file alone that a running training has.
    """
    told: dict[Path, str] = {}
    for file in sorted(Path(folder).rglob(f"{UNSENT}/*")):
        if file.suffix not in (".jsonl", ".refused") or not file.exists():
            continue
        with file.open(encoding="utf-8") as lines:
            place = json.loads(lines.readline())
        owner = file.parent.parent
        box = Outbox(owner, place["uri"], place["run_id"])
        told[owner] = box.close(seconds) if box.hold() else f"{owner}: another process is sending what it kept"
    return told


def keeps(folder: Path) -> bool:
    """Whether the run in `folder` has something that was not sent."""
    return any(path.suffix in (".jsonl", ".refused") for path in (folder / UNSENT).glob("*"))


def ends_whole(file: Path) -> bool:
    """Whether the last line of a file is there to its end: a kill may have cut it off."""
    with file.open("rb") as lines:
        size = lines.seek(0, os.SEEK_END)
        lines.seek(max(0, size - 1))
        return lines.read() in (b"", b"\n")


def said(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
