"""Where a run begins: at the newest whole checkpoint of its folder, at one that lies anywhere, or anew.

Nothing of a run is deleted, and no two pasts are mixed: where a run does not go on from the newest checkpoint of its folder, what the
folder holds of runs moves to `earlier-1` in it, or the next free number, and a copy of what led to the chosen step takes its place.
A kill in between leaves a folder that says what is still to be moved, and the next start moves it. Everything stays inside the run's folder,
which may be a mounted drive.
"""

import hashlib
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from t2ilib.adapters.start import content_of
from t2ilib.config import ConfigError, RunConfig
from t2ilib.data.journal import MANIFEST, NAME
from t2ilib.data.prior import DRAWING
from t2ilib.runfile import load_run
from t2ilib.tracking.mlflow_run import NOTE, fork_note
from t2ilib.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    load_latest,
    newest,
    owned,
    read_meta,
    retire_damaged,
    step_name,
    verified,
)
from t2ilib.training.history import METRICS

log = logging.getLogger(__name__)

LATEST, NEVER = "latest", "never"
LOG = "run.log"
"""What was said while a run trained (`runlog`)."""
BY_STEP = ("samples", "held_out", "steps")
"""Folders of a run that hold something of many steps, whose names end in its number."""
OF_A_RUN = (
    *("run.yaml", LOG, METRICS, "metrics.json", "metrics.about.json", "timing.json", NOTE),
    *(MANIFEST, "manifest.json", NAME),
    *(*BY_STEP, "adapter", "model", "pictures", "hub", "denoising", "progress", "tensorboard", "wandb", "checkpoints"),
)
"""What a run writes into its folder; whatever else lies there stays."""
DRAFT, TO_SET_ASIDE, TO_PUT_IN_PLACE = ".beginning", ".beginning-after-", ".beginning-with-"
"""Folders of a beginning that is being made, of one before which a number of `earlier-` is to be filled, and of one whose content goes
to the run's folder."""


@dataclass(frozen=True)
class Beginning:
    """Where a run begins. `checkpoint`: which one it goes on from; None is the newest whole one in `output`, if there is one, or, where
    the run begins `anew`, none. `anew`: what is in `output` is set aside."""

    output: Path
    checkpoint: Path | None = None
    anew: bool = False

    def load(self) -> Checkpoint | None:
        """What the run goes on from, None for step 0; raises CheckpointError where that is damaged."""
        if self.checkpoint is not None:
            return load_checkpoint(self.checkpoint)
        return None if self.anew else load_latest(self.output / "checkpoints")

    def make_room(self, step: int) -> None:
        """Makes the run's folder, which this process owns, that of a run which has taken `step` steps and is about to take the next."""
        if self.anew:
            set_aside(self.output, self.checkpoint, step)
        else:
            retire_damaged(self.output / "checkpoints", step)


def find_beginning(run: RunConfig, resume: str | Path = LATEST) -> Beginning:
    """Where `run` begins. `resume`: latest, never, or a checkpoint's folder or that of a run, whose newest whole one it then is.

    Raises CheckpointError, with the fields that differ, for a checkpoint of another run, or of more steps, and ConfigError for a path
    without one. Asked before anything is loaded, opened or written, so that a refused run leaves a finished one as it was.
    """
    if any(run.output.glob(f"{DRAFT}-*")):
        with owned(run.output):
            settle(run.output)
    if str(resume) == NEVER:
        return Beginning(run.output, anew=True)
    own = run.output / "checkpoints"
    if str(resume) == LATEST:
        if (last := newest(own, with_meta)) is not None:
            require_same_run(run, last, run.output)
        return Beginning(run.output)
    path = checkpoint_at(Path(resume).expanduser())
    require_same_run(run, path, path)
    is_last = path.resolve() in [last.resolve() for last in list_checkpoints(own)[-1:]]
    return Beginning(run.output, path, anew=not is_last)


def with_meta(path: Path) -> Path:
    """A checkpoint of which at least its step and settings can be read: its tensors are many, and read once, when they are needed."""
    read_meta(path)
    return path


def checkpoint_at(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest whole one of a run's folder."""
    if path.is_dir():
        found = newest(path / "checkpoints", verified) or newest(path, verified)
        if found is not None or any(path.glob("*.safetensors")):
            return found or path
    others = [other.name for other in list_checkpoints(path.parent)]
    raise ConfigError(
        f"there is no checkpoint at {path}"
        + (f"; beside it there are {', '.join(others)}" if others else "")
        + f": give the folder of one, such as results/run/checkpoints/step-000200, or of a run, or {LATEST} or {NEVER}"
    )


def require_same_run(run: RunConfig, checkpoint: Path, told: Path) -> None:
    """Raises CheckpointError where a checkpoint is of other settings, which it names, of more steps, or damaged. `told`: what it is
    called."""
    meta = read_meta(checkpoint)
    instead = (
        "choose another output folder, or --resume never, which sets aside what is there"
        if told == run.output
        else "give its settings, or begin without it"
    )
    if meta["digest"] != digest_of(run):
        raise CheckpointError(
            f"{told} holds a run with other settings{changes_of(run, run_folder(checkpoint))}: {instead}"
        )
    if meta["step"] > run.training.steps:
        raise CheckpointError(
            f"{told} holds a run that has taken {meta['step']} steps, and training.steps is {run.training.steps}: raise it, or {instead}"
        )


def digest_of(run: RunConfig) -> str:
    """What decides the steps of a run: where the base draws what it is trained on, also how it is drawn; where it starts from an adapter,
    also what that is."""
    fields = run.flat()
    drawn = {name: fields[name] for name in drawing_fields(run)}
    if run.adapter is not None and run.adapter.start is not None:
        drawn["adapter.start"] = content_of(run.adapter.start)
    return f"{run.training_digest()}{hashlib.sha256(json.dumps(drawn).encode()).hexdigest()[:12] if drawn else ''}"


def drawing_fields(run: RunConfig) -> tuple[str, ...]:
    """Fields that otherwise only judge, and that pictures of the class depend on where the base draws them."""
    return DRAWING if run.prior is not None and run.prior.path is None else ()


def deciding_fields(run: RunConfig) -> set[str]:
    """The fields that `digest_of` is made of, as `section.field`."""
    sections = run.deciding().items()
    return {
        *drawing_fields(run),
        *(f"{section}.{field}" for section, content in sections if isinstance(content, dict) for field in content),
        *(section for section, content in sections if not isinstance(content, dict)),
    }


def run_folder(checkpoint: Path) -> Path:
    """The folder of a checkpoint's run, as it lies beside it."""
    return checkpoint.absolute().parent.parent


def changes_of(run: RunConfig, folder: Path) -> str:
    """How `run` differs, in what decides its steps, from the run in `folder`; "" where that cannot be told."""
    try:
        other = load_run(folder / "run.yaml")
    except ConfigError:
        return ""
    before, now = other.flat(), run.flat()
    deciding = deciding_fields(run) | deciding_fields(other)
    differing = [name for name in now if before.get(name) != now[name] and name in deciding]
    told = ", ".join(f"{name} {before.get(name)!r} -> {now[name]!r}" for name in differing)
    laid_out = ""
    if "training.steps" in differing and run.optimizer.schedule != "constant":
        laid_out = f"; a {run.optimizer.schedule} schedule is laid out over all steps, so more of them would have been other steps"
    if not told and run.adapter is not None and run.adapter.start is not None:
        told = f"what lies at adapter.start, {run.adapter.start}, has changed"
    return f" ({told}{laid_out})" if told else ""


def set_aside(output: Path, checkpoint: Path | None, step: int) -> None:
    """Moves what `output` holds of runs to `earlier-N` in it, and puts in its place what led to `step` of the run of `checkpoint`."""
    draft = output / DRAFT
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    for name in (NAME, MANIFEST) if (output / NAME).exists() else ():  # what was met of a stream is true of it
        shutil.copy2(output / name, draft)
    if checkpoint is not None:
        copy_past(checkpoint, draft, step)
    number = next(number for number in itertools.count(1) if not (output / f"earlier-{number}").exists())
    draft.rename(output / f"{TO_SET_ASIDE}{number}")
    settle(output)


def settle(output: Path) -> None:
    """Finishes what `set_aside` has begun, wherever in it a kill came."""
    for pending in output.glob(f"{TO_SET_ASIDE}*"):
        earlier = output / f"earlier-{pending.name.removeprefix(TO_SET_ASIDE)}"
        for name in OF_A_RUN:
            if (output / name).exists():
                earlier.mkdir(exist_ok=True)
                (output / name).rename(earlier / name)
        if earlier.exists():
            log.warning("what %s held of earlier runs is now in %s", output, earlier)
        pending.rename(output / f"{TO_PUT_IN_PLACE}{earlier.name}")
    for pending in output.glob(f"{TO_PUT_IN_PLACE}*"):
        for entry in [*pending.iterdir()]:
            entry.rename(output / entry.name)
        pending.rmdir()


def copy_past(checkpoint: Path, target: Path, step: int) -> None:
    """A checkpoint, and of the run that it lies in what that run had written at its step: metrics (cut back when they are read),
    pictures, adapters. Not how long it took. Its MLflow run is left alone; the new one says where it comes from."""
    shutil.copytree(checkpoint, target / "checkpoints" / step_name(step), copy_function=link_or_copy)
    folder = run_folder(checkpoint)
    for name in (METRICS, "metrics.about.json"):
        if (folder / name).exists():
            shutil.copy2(folder / name, target)
    for entry in entries_until(folder, step):
        place = target / entry.parent.name
        place.mkdir(exist_ok=True)
        (shutil.copytree if entry.is_dir() else shutil.copy2)(entry, place / entry.name)
    if (note := fork_note(folder, step)) is not None:
        (target / NOTE).write_text(note)


def entries_until(folder: Path, step: int) -> Iterator[Path]:
    """What the folders BY_STEP hold of steps until `step`, and what they say of all steps."""
    for name in BY_STEP:
        for entry in (folder / name).glob("*"):
            number = re.search(r"-(\d{6,})$", entry.stem)
            if int(number[1]) <= step if number else entry.suffix == ".json":
                yield entry


def link_or_copy(source: str, target: str) -> None:
    """Checkpoints are written once, so two may share a file; other disks get a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
