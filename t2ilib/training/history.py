"""What a run writes down as it goes: numbers by step, held-out loss, sample grids, and how long and how much it all took."""

import json
import logging
from pathlib import Path

import torch

from t2ilib.config import RunConfig
from t2ilib.evaluation.sampling import load_pictures, make_grid, save_pictures
from t2ilib.memory import Peak
from t2ilib.tracking import Tracker
from t2ilib.training.setups import Setup
from t2ilib.training.state import TrainState

log = logging.getLogger(__name__)


class History:
    """metrics.jsonl: one line a logged step, cut back to the checkpoint on resume; the same numbers go to the tracker.

    Seconds in steps and memory peaks are kept in timing.json beside it, so that a resumed run reports the whole run.
    """

    def __init__(self, output: Path, start: int, tracker: Tracker, peak: Peak):
        self.path, self.timing, self.tracker, self.peak = (
            output / "metrics.jsonl",
            output / "timing.json",
            tracker,
            peak,
        )
        self.seconds, self.timed, self.first, self.last = 0.0, 0, start + 1, {}
        rows = [row for row in read_rows(self.path) if row["step"] <= start] if start else []
        for row in rows:
            self.last |= {name: value for name, value in row.items() if name != "step"}
        draft = self.path.with_suffix(".part")
        draft.write_text("".join(json.dumps(row) + "\n" for row in rows))
        draft.replace(self.path)
        if start and self.timing.exists():
            known = json.loads(self.timing.read_text())
            self.seconds, self.timed = known["seconds"], known["timed"]
            peak.process_mib, peak.device_mib = known["peak_process_mib"], known["peak_device_mib"]

    def save_timing(self) -> None:
        peaks = {"peak_process_mib": self.peak.process_mib, "peak_device_mib": self.peak.device_mib}
        draft = self.timing.with_suffix(".part")
        draft.write_text(json.dumps({"seconds": self.seconds, "timed": self.timed, **peaks}))
        draft.replace(self.timing)

    def add(self, step: int, values: dict[str, float], seconds: float | None = None) -> None:
        if seconds is not None and step > self.first:  # the first step pays for what the others find warm
            self.seconds, self.timed = self.seconds + seconds, self.timed + 1
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


class Evaluation:
    """Held-out loss and sample grids, before training (the base) and every so many steps."""

    def __init__(self, run: RunConfig, setup: Setup, state: TrainState, history: History, tracker: Tracker):
        self.run, self.setup, self.state, self.history, self.tracker = run, setup, state, history, tracker
        self.base_pictures = []
        self.folder = run.output / "samples"

    def due(self, step: int) -> bool:
        every = (self.run.evaluation.validate_every, self.run.evaluation.sample_every)
        return any(n and step % n == 0 for n in every)

    def __call__(self, step: int) -> dict[str, float]:
        """Measures and draws what is due at `step`; everything before the first and after the last step."""
        ends = step in (0, self.run.training.steps)
        every, draws_every = self.run.evaluation.validate_every, self.run.evaluation.sample_every
        metrics = {}
        with self.state.averaged(), torch.no_grad():
            if ends or (every and step % every == 0):
                metrics = self.setup.validate(step)
                self.history.add(step, metrics)
                if "held_out_loss" in metrics:
                    log.info("step %d: held-out loss %.4f", step, metrics["held_out_loss"])
            if self.setup.draw is not None and (ends or (draws_every and step % draws_every == 0)):
                self.show(step, self.setup.draw())
        return metrics

    def show(self, step: int, pictures: list) -> None:
        save_pictures(pictures, self.folder / f"step-{step:06d}")
        if step == 0:
            self.base_pictures = pictures
        rows = [self.base_pictures, pictures] if step and self.base_pictures else [pictures]
        labels = ["base", f"step {step}"] if len(rows) == 2 else ["base" if step == 0 else f"step {step}"]
        grid = make_grid(rows, labels, self.setup.prompts, most_columns=4)
        grid.save(self.folder / f"grid-{step:06d}.png")
        self.tracker.log_image(grid, "samples", step)

    def restore(self) -> None:
        """After a resume: the base's pictures come from disk."""
        self.base_pictures = load_pictures(self.folder / "step-000000")
