"""What a run writes down as it goes: numbers by step, and how long and how much it all took."""

import json
import time
from pathlib import Path

from t2ilib.evaluation.metrics import PEAKS, Metric
from t2ilib.memory import Peaks
from t2ilib.tracking.tracker import Tracker

COSTS = {
    "peak_device_mib": Metric("peak GPU memory, MiB", "mib", "lower", False, "Cost", "memory", "Least GPU memory"),
    "trainable_parameters": Metric("trainable parameters", "count", "lower", True, "Cost", "size", "Fewest trainable parameters"),
    "adapter_mib": Metric("adapter, MiB", "mib", "lower", True, "Cost", "size"),
    "moments_in_8bit": Metric("moments in 8 bits", "share", None, True, "Cost"),
    "peak_process_mib": Metric("peak process memory, MiB", "mib", "lower", False, "Cost", "host"),
    "steps_per_second": Metric("steps per second", "rate", "higher", False, "Cost", "speed", "Fastest"),
    **PEAKS,
}  # fmt: skip
"""What every run says of itself besides what it learned. The peaks are those of the whole run, whichever phase they fall into."""


class History:
    """metrics.jsonl: one line a logged step, cut back to the checkpoint on resume; the same numbers go to the tracker.

    Seconds in steps and memory peaks are kept in timing.json beside it, so that a resumed run reports the whole run.
    """

    def __init__(self, output: Path, start: int, tracker: Tracker, peaks: Peaks):
        self.path, self.timing = output / "metrics.jsonl", output / "timing.json"
        self.tracker, self.peaks = tracker, peaks
        self.seconds, self.timed, self.first, self.last, self.began = 0.0, 0, start + 1, {}, 0.0
        rows = [row for row in read_rows(self.path) if row["step"] <= start] if start else []
        for row in rows:
            self.last |= {name: value for name, value in row.items() if name != "step"}
        draft = self.path.with_suffix(".part")
        draft.write_text("".join(json.dumps(row) + "\n" for row in rows))
        draft.replace(self.path)
        if start and self.timing.exists():
            known = json.loads(self.timing.read_text())
            self.seconds, self.timed = known["seconds"], known["timed"]
            peaks.include(known.get("peaks", {}))

    def begin(self) -> None:
        """Before a step."""
        self.peaks.enter("training")
        self.began = time.perf_counter()

    def step(self, step: int, values: dict[str, float]) -> None:
        """After a step, the numbers it gave. The first one of a process is not timed: it pays for what others find warm."""
        if step > self.first:
            self.seconds, self.timed = self.seconds + time.perf_counter() - self.began, self.timed + 1
        self.add(step, values)

    def save_timing(self) -> None:
        self.peaks.leave()
        draft = self.timing.with_suffix(".part")
        draft.write_text(json.dumps({"seconds": self.seconds, "timed": self.timed, "peaks": self.peaks.found}))
        draft.replace(self.timing)

    def add(self, step: int, values: dict[str, float]) -> None:
        self.last |= values
        with self.path.open("a") as lines:
            lines.write(json.dumps({"step": step, **values}) + "\n")
        self.tracker.log_metrics(values, step)

    def speed(self) -> dict[str, float]:
        return {"steps_per_second": self.timed / self.seconds} if self.timed else {}


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
