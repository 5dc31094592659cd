"""What ends a training before its last step: signals, its time, a disk or a memory that is nearly full, and errors. All leave a checkpoint.

Why to stop is asked once a step, before its update, by every process, and exchanged as a number, so that all stop after the same step. Time is
foreseen: what comes before it can be asked again, and what a stop takes, must fit into what is left. A reading under a floor is
warned about, and stops the run when the next one, SECONDS_BETWEEN_READINGS later, is under it too: another program's peak passes.
"""

import contextlib
import logging
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping

import torch

from t2ilib.config import RunConfig
from t2ilib.config.section import seconds_in
from t2ilib.evaluation.measures import prompt_groups
from t2ilib.memory import MIB, MemoryLog
from t2ilib.tracking.ending import Stopped
from t2ilib.training.evaluation import Evaluation
from t2ilib.training.history import History
from t2ilib.training.state import TrainState

log = logging.getLogger(__name__)

MEMORY, DISK, TIME = 201, 202, 203
"""Reasons to stop, beside the numbers of signals, all of which are lower."""
NO_ROOM, AGAIN = 74, 75
"""Exit statuses, as sysexits.h has them: EX_IOERR, and EX_TEMPFAIL, which means that the same command goes on."""
MARGIN = 1.25
"""By which what was seen may be exceeded."""
SECONDS_TO_END = 5.0
"""For closing trackers and the process."""
SLOW_DISK = 50 * MIB
"""Bytes a second at which a first checkpoint is expected to be written."""


class Interrupted(Stopped):
    """A signal arrived. The exit code is 128 + signal, as shells have it."""

    def __init__(self, number: int, done: int | None = None) -> None:
        after = "" if done is None else f" after step {done}, of which there is a checkpoint"
        super().__init__(128 + number, f"{signal.Signals(number).name}{after}")


class Stops:
    """Why a run is to stop. `began`: when it did, by `time.monotonic`; `tell` has the readings that are made on the way."""

    def __init__(
        self,
        run: RunConfig,
        state: TrainState,
        history: History,
        evaluation: Evaluation,
        memory: MemoryLog,
        began: float,
        tell: Callable[[str], None] = log.debug,
    ):
        self.run, self.state, self.history, self.evaluation = run, state, history, evaluation
        self.memory, self.began, self.tell = memory, began, tell
        self.limit = None if run.training.time_budget is None else seconds_in(run.training.time_budget)
        self.reasons: list[int] = []
        self.readings: dict[str, float] = {}
        self.low: set[int] = set()
        groups = {} if run.trains in ("vae", "clip") else prompt_groups(run, evaluation.setup.prompts)
        self.measured = sum(len(asked) for asked, _ in groups.values())

    def __call__(self, done: int) -> list[int]:
        """Why to stop when step `done` is done; empty where the run is to go on. It is one list, so that a signal that comes later in the
        step is in it too."""
        self.readings = self.memory.now(done, self.tell)
        self.reasons += self.out_of_room(self.readings)
        if not self.reasons and self.out_of_time(done):
            self.reasons.append(TIME)
        return self.reasons

    def floors(self) -> dict[int, tuple[str, float]]:
        """Reason -> the reading that it is about, and what this must not be less than, in MiB. The disk also has to hold one more
        checkpoint, that of the stop."""
        training = self.run.training
        disk = training.least_free_disk_mib and training.least_free_disk_mib + self.state.checkpoint_bytes() / MIB
        return {DISK: ("memory/disk_free_mib", disk), MEMORY: ("memory/system_available_mib", training.least_free_memory_mib)}  # fmt: skip

    def out_of_room(self, readings: Mapping[str, float]) -> list[int]:
        """Reasons of which these readings are the second under the floor, one after the other; the first is warned about."""
        if not readings:
            return []
        below = {reason for reason, (name, least) in self.floors().items() if readings[name] < least}
        for reason in below - self.low:
            log.warning("%s. If that stays so, the run stops with a checkpoint", self.sentence(reason))
        again, self.low = below & self.low, below
        return sorted(again)

    def out_of_time(self, done: int) -> bool:
        """Whether what comes until this can be asked again, and after a stop, does not fit into what is left of the budget."""
        if self.limit is None:
            return False
        longest, state, evaluation = self.history.longest, self.state, self.evaluation
        saving = longest.get("saving", state.checkpoint_bytes() / SLOW_DISK)
        judging = longest.get("evaluating", 0.0)
        if done == self.run.training.steps:
            ending = judging * (1 + self.measured / max(1, len(evaluation.setup.prompts)))
            left = saving + ending
        else:
            begun = time.perf_counter() - self.history.began
            step = max((seconds for seconds, _ in self.history.recent), default=begun)
            left = saving * (1 + state.due(done)) + judging * (evaluation.due(done) + evaluation.due(done + 1)) + step
        return time.monotonic() - self.began + MARGIN * left + SECONDS_TO_END > self.limit

    def sentence(self, reason: int) -> str:
        """What is short, and what to do."""
        training, output = self.run.training, self.run.output
        name, least = self.floors()[reason]
        told = f"{self.readings[name]:,.0f} MiB"
        if reason == DISK:
            return (
                f"the disk under {output} has {told} free, less than training.least_free_disk_mib {training.least_free_disk_mib} with room for"
                f" a checkpoint ({least - training.least_free_disk_mib:,.1f}): free some (earlier runs beside it, earlier-* in it, encoded"
                " pictures in data.cache_path, which can be made again), lower training.keep_checkpoints, or move output to another disk"
            )
        return (
            f"the system can give {told} of memory, less than training.least_free_memory_mib {least:.0f}: close other programs, or lower"
            " data.workers or training.batch_size divided by training.accumulation"
        )

    def ending(self, reason: int, done: int) -> Stopped:
        """What to raise after the checkpoint of step `done`. Says so."""
        steps = self.run.training.steps
        place = f"stopped after step {done} of {steps} with a checkpoint"
        if reason < MEMORY:
            return Interrupted(reason, done)
        if reason == TIME:
            left = max(0.0, self.limit - (time.monotonic() - self.began)) if self.limit else 0.0
            goes_on = "goes on from there" if done < steps else "measures and draws what was trained"
            why = (
                f"training.time_budget {self.run.training.time_budget}: {place}, {left:.0f} s before it is spent; the same command"
                f" {goes_on}"
            )
            log.warning(why)
            return Stopped(AGAIN, why, "SCHEDULED")
        why = f"{place}: {self.sentence(reason) if reason in self.low else 'another machine has no room left'}. Then the same command goes on"
        log.warning(why)
        return Stopped(NO_ROOM, why)

    @contextlib.contextmanager
    def catching(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C are looked at between steps; a second signal exits at once."""

        def receive(number: int, frame) -> None:
            if any(reason < MEMORY for reason in self.reasons):
                raise Interrupted(number)
            self.reasons.append(number)
            name = signal.Signals(number).name
            log.warning("%s: committing a checkpoint, then stopping (once more stops at once)", name)

        before = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # signals belong to the main thread; others catch none
                before[number] = signal.signal(number, receive)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def rescued(state: TrainState, history: History) -> Iterator[None]:
    """Where this scope breaks off, the state of the last whole step is committed (`TrainState.rescue`), but not where it was told to stop, and
    has done so, or at once."""
    try:
        yield
    except Stopped:
        raise
    except BaseException as error:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            traceback.clear_frames(error.__traceback__)  # which hold the activations of the step that did not fit
        with contextlib.suppress(OSError, RuntimeError):  # of a full disk, a broken GPU: the weights come first
            history.save_timing()
        state.rescue()
        raise
