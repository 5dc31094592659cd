"""What a run writes down as it goes: numbers by step, and how long and how much it all took."""

import contextlib
import json
import logging
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from t2ilib.evaluation.metrics import PEAKS, Metric
from t2ilib.memory import Peaks
from t2ilib.tracking.tracker import Tracker

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
COSTS = {
    "peak_device_mib": Metric("peak GPU memory, MiB", "mib", "lower", False, "Cost", "memory", "Least GPU memory"),
    "trainable_parameters": Metric("trainable parameters", "count", "lower", True, "Cost", "size", "Fewest trainable parameters"),
    "adapter_mib": Metric("adapter, MiB", "mib", "lower", True, "Cost", "size"),
    "moments_in_8bit": Metric("moments in 8 bits", "share", None, True, "Cost"),
    "peak_process_mib": Metric("peak process memory, MiB", "mib", "lower", False, "Cost", "host"),
    "steps_per_second": Metric("steps per second", "rate", "higher", False, "Cost", "speed", "Fastest"),
    "data_wait_share": Metric("waiting for data", "share", "lower", False, "Cost"),
    **PEAKS,
}  # fmt: skip
"""What every run says of itself besides what it learned. The peaks are those of the whole run, whichever phase they fall into."""


WINDOW = 50
"""Steps whose time is looked at together: single ones tell little."""
STARVING = 0.2


class History:
    """metrics.jsonl: one line a logged step, cut back to the checkpoint on resume; the same numbers go to the tracker, which knows what it
    has. Without a folder, in processes beside the main one, nothing is written.

    Seconds in steps, of these those spent waiting for data, and memory peaks are kept in timing.json beside it, so that a resumed run
    reports the whole run. `longest`: the most seconds that anything else took once, by its name.
    """

    def __init__(self, output: Path | None, start: int, tracker: Tracker, peaks: Peaks):
        self.output, self.tracker, self.peaks = output, tracker, peaks
        self.seconds, self.waited, self.timed, self.first, self.last, self.began = 0.0, 0.0, 0, start + 1, {}, 0.0
        self.recent: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self.starving = False
        self.longest: dict[str, float] = {}
        if output is None:
            return
        rows = [row for row in read_rows(self.path) if row["step"] <= start] if start else []
        for row in rows:
            self.last |= {name: value for name, value in row.items() if name != "step"}
        draft = self.path.with_suffix(".part")
        draft.write_text("".join(json.dumps(row) + "\n" for row in rows))
        draft.replace(self.path)
        if start and self.timing.exists():
            known = json.loads(self.timing.read_text())
            self.seconds, self.waited, self.timed = known["seconds"], known.get("waited", 0.0), known["timed"]
            self.longest = known.get("longest", {})
            peaks.include(known.get("peaks", {}))
        # a tracker leaves out what it has; one that is new, or that lost its last seconds to a kill, has not all of it
        for row in rows:
            tracker.log_metrics({name: value for name, value in row.items() if name != "step"}, row["step"])

    @property
    def path(self) -> Path:
        return self.output / METRICS

    @property
    def timing(self) -> Path:
        return self.output / "timing.json"

    @contextlib.contextmanager
    def lasting(self, name: str) -> Iterator[None]:
        """What this scope does is timed as `name`."""
        began = time.perf_counter()
        yield
        self.longest[name] = max(self.longest.get(name, 0.0), time.perf_counter() - began)

    def begin(self) -> None:
        """Before a step."""
        self.peaks.enter("training")
        self.began = time.perf_counter()

    def step(self, step: int, values: dict[str, float], waited: float = 0.0) -> None:
        """After a step, the numbers it gave, and for how many of its seconds it waited for data. The first one of a process is not timed: it
        pays for what others find warm."""
        if step > self.first:
            seconds = time.perf_counter() - self.began
            self.seconds, self.waited, self.timed = self.seconds + seconds, self.waited + waited, self.timed + 1
            self.recent.append((seconds, waited))
            share = share_of(*map(sum, zip(*self.recent, strict=True)))
            if share > STARVING and len(self.recent) == WINDOW and not self.starving:
                self.starving = True
                log.warning(
                    "%d%% of the time of the last %d steps went into waiting for data (%.0f ms a step): raise data.workers, put the data"
                    " on a faster disk, or have pictures encoded once (data.cache latents or all)",
                    round(100 * share), WINDOW, 1000 * sum(waits for _, waits in self.recent) / WINDOW,
                )  # fmt: skip
            values = values | {"data_wait_share": share}
        self.add(step, values)

    def save_timing(self) -> None:
        self.peaks.leave()
        if self.output is None:
            return
        draft = self.timing.with_suffix(".part")
        told = {"seconds": self.seconds, "waited": self.waited, "timed": self.timed, "longest": self.longest}
        draft.write_text(json.dumps(told | {"peaks": self.peaks.found}))
        draft.replace(self.timing)

    def add(self, step: int, values: dict[str, float]) -> None:
        self.last |= values
        if self.output is None:
            return
        with self.path.open("a") as lines:
            lines.write(json.dumps({"step": step, **values}) + "\n")
        self.tracker.log_metrics(values, step)

    def speed(self) -> dict[str, float]:
        """Of all steps that were timed."""
        if not self.timed:
            return {}
        return {
            "steps_per_second": self.timed / self.seconds,
            "data_wait_share": share_of(self.seconds, self.waited),
        }


def share_of(seconds: float, waited: float) -> float:
    """At most 1: another process may have waited longer than a step took here."""
    return min(1.0, waited / seconds)


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl; a last line that was cut off while being written is left out."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise
    return rows
