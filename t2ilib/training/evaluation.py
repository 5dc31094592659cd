"""Held-out loss and sample grids while a run trains: of the base before it, every so many steps, and at the end."""

import json
import logging

import torch

from t2ilib.config import RunConfig
from t2ilib.evaluation.sampling import load_pictures, make_grid, save_pictures
from t2ilib.tracking.tracker import Tracker
from t2ilib.training.checkpoint import step_name
from t2ilib.training.history import History
from t2ilib.training.setups import Setup
from t2ilib.training.state import TrainState

log = logging.getLogger(__name__)

PROMPTS = "prompts.json"
"""Beside the sample grids: what the base's pictures were drawn for."""


class Evaluation:
    """Held-out loss and sample grids, before training (the base) and every so many steps."""

    def __init__(self, run: RunConfig, setup: Setup, state: TrainState, history: History, tracker: Tracker):
        self.run, self.setup, self.state, self.history, self.tracker = run, setup, state, history, tracker
        self.base_pictures = []
        self.folder = run.output / "samples"

    def due(self, step: int) -> bool:
        """Whether something is to be measured or drawn in the middle of a run; its ends are measured in any case."""
        if step == self.run.training.steps:
            return False
        every = (self.run.evaluation.validate_every, self.run.evaluation.sample_every)
        return any(n and step % n == 0 for n in every)

    def __call__(self, step: int) -> dict[str, float]:
        """Measures and draws what is due at `step`; everything before the first and after the last step."""
        peaks = self.history.peaks
        ends = step in (0, self.run.training.steps)
        every, draws_every = self.run.evaluation.validate_every, self.run.evaluation.sample_every
        metrics = {}
        with self.state.averaged(), torch.no_grad():
            if ends or (every and step % every == 0):
                with peaks.during("validating"):
                    metrics = self.setup.validate(step)
                self.history.add(step, metrics)
                if "held_out_loss" in metrics:
                    log.info("step %d: held-out loss %.4f", step, metrics["held_out_loss"])
            if self.setup.draw is not None and (ends or (draws_every and step % draws_every == 0)):
                with peaks.during("drawing"):
                    pictures = self.setup.draw()
                self.show(step, pictures)
        return metrics

    def show(self, step: int, pictures: list) -> None:
        save_pictures(pictures, self.folder / step_name(step))
        if step == 0:
            self.base_pictures = pictures
            (self.folder / PROMPTS).write_text(json.dumps(self.setup.prompts))
        rows = [self.base_pictures, pictures] if step and self.base_pictures else [pictures]
        labels = ["base", f"step {step}"] if len(rows) == 2 else ["base" if step == 0 else f"step {step}"]
        grid = make_grid(rows, labels, self.setup.prompts, most_columns=4)
        grid.save(self.folder / f"grid-{step:06d}.png")
        self.tracker.log_image(grid, "samples", step)

    def restore(self) -> None:
        """After a resume: the base's pictures come from disk, if they are of the same prompts."""
        told = self.folder / PROMPTS
        if told.exists() and json.loads(told.read_text()) == list(self.setup.prompts):
            self.base_pictures = load_pictures(self.folder / step_name(0))
