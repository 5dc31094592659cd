"""Held-out loss and sample grids while a run trains: of the base before it, every so many steps, and at the end; there also how the
samples came to be, over the run (an animation) and over the sampling steps (strips)."""

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from t2ilib.config import RunConfig
from t2ilib.evaluation.animation import animate
from t2ilib.evaluation.denoising import chosen_steps, save_strips
from t2ilib.evaluation.sampling import load_pictures, make_grid, save_pictures
from t2ilib.evaluation.watching import require_known_noise
from t2ilib.text import write_whole
from t2ilib.tracking.tracker import Tracker
from t2ilib.training.checkpoint import step_name
from t2ilib.training.history import History
from t2ilib.training.setups import Setup
from t2ilib.training.state import TrainState

log = logging.getLogger(__name__)

PROMPTS = "prompts.json"
"""Beside the pictures of a step: what they were drawn for."""


class Evaluation:
    """Held-out loss and sample grids, before training (the base) and every so many steps."""

    def __init__(self, run: RunConfig, setup: Setup, state: TrainState, history: History, tracker: Tracker):
        self.run, self.setup, self.state, self.history, self.tracker = run, setup, state, history, tracker
        self.base_pictures = []
        self.folder = run.output / "samples"
        if self.strips:
            require_known_noise(setup.components.scheduler)

    @property
    def strips(self) -> bool:
        return self.setup.denoise is not None and self.run.evaluation.strip_steps is not None

    def due(self, step: int) -> bool:
        """Whether something is to be measured or drawn in the middle of a run; its ends are measured in any case."""
        return step != self.run.training.steps and (self.validates(step) or self.draws(step))

    def validates(self, step: int) -> bool:
        every = self.run.evaluation.validate_every
        return every > 0 and step % every == 0

    def draws(self, step: int) -> bool:
        """Whether samples are due in the middle of a run; of a number of epochs, after the step that completes it."""
        every, epochs = self.run.evaluation.sample_every, self.run.evaluation.sample_every_epochs
        if epochs:
            passes = self.setup.order.epoch
            return passes(step) // epochs > passes(step - 1) // epochs
        return every > 0 and step % every == 0

    def __call__(self, step: int) -> dict[str, float]:
        """Measures and draws what is due at `step`; everything before the first and after the last step. Of several processes the main
        one does, and the others help it to the weights."""
        if not self.state.accelerator.is_main_process:
            with self.state.averaged():
                return {}
        peaks = self.history.peaks
        ends, last = step in (0, self.run.training.steps), step == self.run.training.steps
        metrics, strips = {}, []
        with self.history.lasting("evaluating"), self.state.averaged(), torch.no_grad():
            if ends or self.validates(step):
                with peaks.during("validating"):
                    metrics = self.setup.validate(step)
                self.history.add(step, metrics)
                if "held_out_loss" in metrics:
                    log.info("step %d: held-out loss %.4f", step, metrics["held_out_loss"])
            if self.setup.draw is not None and (ends or self.draws(step)):
                with peaks.during("drawing"):
                    strips = self.setup.denoise() if last and self.strips else []
                    pictures = [strip[-1] for strip in strips] or self.setup.draw()
                self.show(step, pictures)
        if strips:
            self.show_denoising(step, strips)
        if last and self.setup.draw is not None:
            self.show_progress()
        return metrics

    def show(self, step: int, pictures: list[Image.Image]) -> None:
        if step == 0:
            self.base_pictures = pictures
            shutil.rmtree(
                self.folder, ignore_errors=True
            )  # of an attempt that left no checkpoint, drawn perhaps otherwise
        save_pictures(pictures, self.folder / step_name(step))
        write_whole(self.folder / step_name(step) / PROMPTS, json.dumps(self.setup.prompts))
        rows = [self.base_pictures, pictures] if step and self.base_pictures else [pictures]
        labels = ["start" if self.run.scratch or self.run.student else "base", f"step {step}"]
        labels = labels if len(rows) == 2 else labels[min(step, 1) :][:1]
        grid = make_grid(rows, labels, self.setup.prompts, most_columns=4)
        grid.save(self.folder / f"grid-{step:06d}.png")
        self.tracker.log_image(grid, "samples", step)

    def show_denoising(self, step: int, strips: list[list[Image.Image]]) -> None:
        """The pictures predicted on the way to each sample, in `denoising`."""
        folder = self.run.output / "denoising"
        whole = save_strips(strips, chosen_steps(self.run.evaluation), self.setup.prompts, folder)
        self.tracker.log_image(whole, "denoising", step)
        self.tracker.log_artifact(folder, "denoising")

    def show_progress(self) -> None:
        """All samples of the run, also of what came before a resume, as animations in `progress`; not of two, which the last grid shows
        side by side."""
        kind, drawn = self.run.evaluation.animation, self.drawn()
        if kind != "none" and len(drawn) > 2:
            animate(drawn, self.setup.prompts, self.run.output / "progress", kind)
            self.tracker.log_artifact(self.run.output / "progress", "progress")

    def drawn(self) -> dict[int, Path]:
        """Step -> folder of all samples that are there of these prompts."""
        folders = {int(path.name.removeprefix("step-")): path for path in sorted(self.folder.glob("step-*"))}
        told = {step: path / PROMPTS for step, path in folders.items()}
        prompts = list(self.setup.prompts)
        return {
            step: folders[step]
            for step, path in told.items()
            if path.exists() and json.loads(path.read_text()) == prompts
        }

    def restore(self, start: int) -> None:
        """After a resume: the base's pictures come from disk, if they are of the same prompts; and trackers are told of the grids up to
        `start` again, of which they may have lost some."""
        drawn = self.drawn()
        if 0 in drawn:
            self.base_pictures = load_pictures(drawn[0])
        for path in sorted(self.folder.glob("grid-*.png")):
            step = int(path.stem.removeprefix("grid-"))
            if step <= start:
                with Image.open(path) as grid:
                    self.tracker.log_image(grid, "samples", step)
        if not self.state.spread and self.lacks(start):
            self(start)

    def lacks(self, step: int) -> bool:
        """Whether something is due in the middle of a run, at `step`, that is there of the base and not of this step."""
        losses = [self.run.output / "held_out" / f"{step_name(at)}.json" for at in (0, step)]
        grids = [self.folder / f"grid-{at:06d}.png" for at in (0, step)]
        due = (losses if self.validates(step) else [], grids if self.draws(step) else [])
        return self.due(step) and any(both and both[0].exists() and not both[1].exists() for both in due)


def prompts_of(run: RunConfig) -> Sequence[str]:
    """`evaluation.prompts`, or what the newest samples of its training were drawn of."""
    told = sorted((run.output / "samples").glob(f"step-*/{PROMPTS}"))
    return run.evaluation.prompts or (tuple(json.loads(told[-1].read_text())) if told else ())
