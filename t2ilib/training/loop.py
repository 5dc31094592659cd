"""`train`: the only training loop. What is trained, on what and how is decided before it starts, by functions it calls.

Every step is a function of the run config and the step's number: sample order, noise, timesteps, dropped captions and
dropout come from addresses, so a run that was killed and resumed is, bit for bit, the run that was not.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from t2ilib.adapters.attach import AdapterError
from t2ilib.adapters.load import UNPROVEN, adapter_file
from t2ilib.config import ConfigError, RunConfig
from t2ilib.data.dataset import Dataset, load_datasets, save_manifest
from t2ilib.data.prior import build_order, given_pictures, joined, num_class
from t2ilib.environment import note_environment
from t2ilib.evaluation.measures import find_measures
from t2ilib.evaluation.metrics import PEAKS, declare
from t2ilib.memory import MIB, MemoryLog, Peaks, require_disk
from t2ilib.models.components import Components
from t2ilib.models.files.locate import locate
from t2ilib.models.load import choose_device, choose_dtype, load_base, name_of_device
from t2ilib.runfile import save_run
from t2ilib.runlog import RunLog
from t2ilib.shapes.pretraining import setup_clip, setup_vae
from t2ilib.text import shown
from t2ilib.tracking.tracker import NullTracker, Tracker
from t2ilib.training.checkpoint import owned, step_name
from t2ilib.training.compute import computing, require_possible
from t2ilib.training.evaluation import Evaluation
from t2ilib.training.history import COSTS, History
from t2ilib.training.prior import drawn_pictures
from t2ilib.training.processes import (
    alike,
    ending_together,
    exchange,
    handlers,
    main_first,
    meet,
    require_one_step,
    require_parts,
    tell_once,
    together,
)
from t2ilib.training.progress import Progress, shown_in_notebook
from t2ilib.training.resume import LATEST, LOG, Beginning, find_beginning
from t2ilib.training.setups import Setup, begin_base, setup_diffusion, trained_precision
from t2ilib.training.sharding import require_no_plugin, require_shardable
from t2ilib.training.state import TrainState
from t2ilib.training.step import take_gradients
from t2ilib.training.stopping import Stops, rescued

log = logging.getLogger(__name__)

SETUPS: dict[str, Callable[..., Setup]] = {
    "adapter": setup_diffusion,
    "unet": setup_diffusion,
    "nothing": setup_diffusion,
    "vae": setup_vae,
    "clip": setup_clip,
}


class NonFiniteLoss(ValueError):
    """A loss that is NaN or infinite, with the step and the samples that gave it."""


@dataclass
class TrainResult:
    """What a run leaves in memory. `metrics`: the final values, by name; `output`: the run's folder; `prompts`: those of its sample
    grids, the run's own or captions of its pictures, held-out ones first."""

    components: Components
    metrics: dict[str, float]
    output: Path
    resumed_from: int
    prompts: tuple[str, ...] = ()


@ending_together()
def train(run: RunConfig, tracker: Tracker | None = None, resume: str | Path = LATEST) -> TrainResult:
    """Trains as `run` says, and saves what was trained in `run.output`.

    `resume`: `latest`, from the newest checkpoint in `run.output`, if there is one; `never`, from step 0; or the folder of a checkpoint
    or of a run of the same settings. Where these leave something in `run.output` behind, it is set aside (`training.resume`).
    Raises ConfigError before anything is written for what cannot work, NonFiniteLoss, AdapterError for adapters that do not
    train, and Stopped (`training.stopping`) after SIGTERM or Ctrl-C, when its time is spent, and where disk or memory are nearly full, with
    a checkpoint committed. An error in the middle leaves one too. Of several processes (`processes`) the main one writes, and has all metrics.
    """
    began, memory, peaks = time.monotonic(), MemoryLog(run.output), Peaks()
    choose_kernels(run)
    accelerator = build_accelerator(run)
    main = accelerator.is_main_process
    tracker = tracker if tracker and main else NullTracker()
    with RunLog() as said, shown_in_notebook(run, tracker, main) as (tracker, panel):
        memory.note("start")
        with main_first(accelerator):
            beginning, training, held_out, of_class = check(run, accelerator, resume)
        with together(accelerator), peaks.during("loading"):
            components = begin(run, accelerator.device)
        if run.prior is not None:
            with main_first(accelerator), peaks.during("drawing"):
                training = joined(run, training, held_out, of_class or drawn_pictures(run, components))
        with together(accelerator), peaks.during("encoding"):
            setup = SETUPS[run.trains](run, components, training, held_out, accelerator)
        with together(accelerator):
            state = TrainState(run, setup, accelerator, training.digest)
            require_room(run, state)

        folder = owned(run.output) if main else contextlib.nullcontext()
        with folder, contextlib.closing(training), computing(run, setup, accelerator) as setup:
            with together(accelerator):
                start, steps = state.resume(beginning), run.training.steps
                if main:
                    said.open(run.output / LOG)
                    save_run(run, run.output / "run.yaml")
                    note_environment(run.output, name_of_device(accelerator.device), anew=start == 0)
                    save_manifest(training, held_out, run.output / "manifest.csv")
            memory.note("loaded")
            tracker.log_datasets(training, held_out)
            history = History(run.output if main else None, start, tracker, peaks)
            with alike(accelerator):
                require_one_step(accelerator, start, run)
                evaluate = Evaluation(run, setup, state, history, tracker)
            evaluate(start) if start == 0 else evaluate.restore(start)
            progress = Progress(run, start, panel)
            stops = Stops(run, state, history, evaluate, memory, began, said.write if main else log.debug)

            with stops.catching(), rescued(state, history):
                for step in range(start, steps):
                    history.begin()
                    ids, done = setup.order(step), step + 1
                    own, norm = take_gradients(run, setup, state.model, state.parameters, accelerator, step, ids)
                    losses, reasons, waited = exchange(run, accelerator, own, stops(done), setup.waited())
                    with alike(accelerator):
                        require_finite(losses, step, ids, training)
                        if accelerator.scaler is None:  # with one, such a step is skipped and the scale lowered
                            require_finite(norm.expand(len(ids)), step, ids, training)
                        if setup.proof is not None:
                            setup.proof.observe(done - start)
                    state.step()

                    loss = float(losses.mean())
                    values = {"loss": loss, **setup.terms(ids, losses), "grad_norm": float(norm), **state.rates()}
                    history.step(done, values | stops.readings, waited)
                    if main:
                        progress(done, loss, history.seconds)
                    if step == start:
                        memory.note("first_step")
                    if evaluate.due(done):
                        evaluate(done)
                    stop = bool(reasons)  # one that comes from here on is looked at after the next step
                    if state.due(done) or stop:
                        keep(run, setup, state, history, done)
                    if stop:
                        meet(accelerator)  # a launcher that sees one end ends the others, which may be writing still
                        raise stops.ending(reasons[0], done)

            with state.averaged():
                if main:
                    setup.save(run.output)
            with alike(accelerator):
                metrics = proven(setup, run.output / "adapter" / UNPROVEN, main)
            if steps:
                metrics |= evaluate(steps) | history.speed()
                state.keep_average()
            else:
                metrics |= history.last
            memory.note("end")
            history.add(steps, metrics | peaks.metrics() | state.sizes(run.output) | memory.metrics())
            if main:
                hand_over(run, setup, state, history, tracker)
            return TrainResult(components, history.last, run.output, start, setup.prompts)


def check(
    run: RunConfig, accelerator: Accelerator, resume: str | Path
) -> tuple[Beginning, Dataset, Dataset, Dataset | None]:
    """What can be told before the base is loaded: where the run begins, its pictures, those held out, and those of the class that are
    given. Raises what `train` does."""
    require_parts(run, accelerator)
    require_shardable(run, accelerator)
    beginning = find_beginning(run, resume)
    find_measures(run)  # told now, not after training
    training, held_out = load_datasets(run)
    of_class = given_pictures(run)
    if run.training.steps:
        build_order(run, len(training), num_class(run, of_class))  # likewise a batch that cannot be filled
    require_scaled_gradients(run, accelerator)
    require_possible(run, accelerator)
    return beginning, training, held_out, of_class


def begin(run: RunConfig, device: torch.device) -> Components:
    """The base, or parts of it with a network that begins with fresh weights, with the noise that the run trains by."""
    components = begin_base(run, device) if run.scratch else load_base(trained_precision(run), device)
    components.noise_as(run.objective.name, run.objective.beta_schedule, run.objective.zero_terminal_snr)
    components.draw_as(run.drawn_by)
    return components


def require_room(run: RunConfig, state: TrainState) -> None:
    """Raises ConfigError where the disk cannot hold the run's checkpoints, and what is to stay free."""
    if run.training.steps:
        kept = state.checkpoint_bytes() * (run.training.keep_checkpoints + 1)
        least = run.training.least_free_disk_mib
        what = f"checkpoints, and training.least_free_disk_mib {least} beside them,"
        remedy = "free some, set output to another disk, or lower training.keep_checkpoints or least_free_disk_mib"
        require_disk(run.output, kept + least * MIB, what, remedy)


def keep(run: RunConfig, setup: Setup, state: TrainState, history: History, done: int) -> None:
    """Commits a checkpoint of step `done`, and where each is to be chosen from, its adapter as a file."""
    history.save_timing()
    with history.lasting("saving"):
        state.save(done)
    if run.training.keep_adapters == "all":
        with state.averaged():
            if state.accelerator.is_main_process:
                setup.save(run.output / "steps" / step_name(done))


def hand_over(run: RunConfig, setup: Setup, state: TrainState, history: History, tracker: Tracker) -> None:
    """At the end: says what the numbers mean, and gives the tracker what the run leaves."""
    shown_names = {*history.last, *PEAKS}
    declare(run.output, {name: about for name, about in {**setup.metrics, **COSTS}.items() if name in shown_names})
    for path, folder in state.artifacts(run.output):
        tracker.log_artifact(path, folder)
    if run.trains == "adapter":
        tracker.log_adapter(adapter_file(run.output), locate(run.model.base), run.data.resolution)
    tracker.flush()


def proven(setup: Setup, note: Path, writes: bool) -> dict[str, float]:
    """What the proof of training measured, {} without one. What was trained is saved before this is asked: where the proof fails,
    `note` says so beside it, in the process that `writes`, and AdapterError is raised."""
    if writes:
        note.unlink(missing_ok=True)
    try:
        return setup.proof.finish() if setup.proof is not None else {}
    except AdapterError as error:
        if writes:
            note.write_text(f"{error}\n")
        raise AdapterError(f"{error}. What was trained is in {note.parent}, marked as unproven") from None


def build_accelerator(run: RunConfig) -> Accelerator:
    """Device and precision: autocast to bf16 only where the hardware has it, fp16 on other GPUs, none on a CPU unless asked."""
    from accelerate.state import AcceleratorState

    require_no_plugin()
    precision = run.training.mixed_precision
    if precision == "auto":
        precision = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}[
            choose_dtype("auto", choose_device())
        ]
    AcceleratorState._reset_state(
        reset_partial_state=True
    )  # one process may train twice, in other precisions or elsewhere
    accelerator = Accelerator(mixed_precision=precision, cpu=choose_device().type == "cpu", kwargs_handlers=handlers())
    tell_once(accelerator)
    return accelerator


def choose_kernels(run: RunConfig) -> None:
    """With `training.deterministic`, for the rest of the process: kernels that give the same bits every time, or an error."""
    if run.training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS may sum in another order
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)


def require_scaled_gradients(run: RunConfig, accelerator: Accelerator) -> None:
    """Raises ConfigError where gradients would pass through a float16 base without a loss scale: small ones become zeros."""
    dtype = choose_dtype(trained_precision(run).dtype, accelerator.device)
    if dtype == torch.float16 and run.training.steps and accelerator.scaler is None:
        raise ConfigError(
            f"model.dtype is float16 and training.mixed_precision {accelerator.mixed_precision}, so gradients would pass through"
            " float16 without a loss scale and vanish: set training.mixed_precision to fp16 (on a GPU), or model.dtype to"
            " bfloat16 or float32"
        )


def require_finite(losses: Tensor, step: int, ids: list[int], training: Dataset) -> None:
    """Raises NonFiniteLoss naming the step and the samples whose loss is NaN or infinite."""
    bad = [sample for sample, finite in zip(ids, torch.isfinite(losses).tolist(), strict=True) if not finite]
    if bad:
        named = "\n  ".join(f"{shown(training.records[i].path.name)}: {training.records[i].caption}" for i in bad[:5])
        raise NonFiniteLoss(
            f"the loss of {len(bad)} sample(s) is not finite at step {step}:\n  {named}\n"
            + ("The base itself may not be finite, or not in this precision: " if step == 0 else "")
            + "Lower optimizer.learning_rate, set training.mixed_precision to no, or look at these pictures."
            " The last checkpoint is from before this step"
        )
