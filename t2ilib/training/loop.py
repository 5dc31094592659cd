"""`train`: the only training loop. What is trained, on what and how is decided before it starts, by functions it calls.

Every step is a function of the run config and the step's number: sample order, noise, timesteps, dropped captions and
dropout come from addresses, so a run that was killed and resumed is, bit for bit, the run that was not.
"""

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from t2ilib.adapters.attach import AdapterError
from t2ilib.adapters.load import UNPROVEN, adapter_file
from t2ilib.config import ConfigError, RunConfig
from t2ilib.data.loader import sample_ids
from t2ilib.data.manifest import Dataset, load_datasets
from t2ilib.evaluation.measures import find_measures
from t2ilib.evaluation.metrics import PEAKS, declare
from t2ilib.memory import MemoryLog, Peaks, require_disk
from t2ilib.models.components import Components
from t2ilib.models.files.locate import locate
from t2ilib.models.load import choose_device, choose_dtype, load_base
from t2ilib.runfile import save_run
from t2ilib.shapes.pretraining import setup_clip, setup_vae
from t2ilib.text import shown
from t2ilib.tracking.tracker import NullTracker, Tracker
from t2ilib.training.checkpoint import owned, step_name
from t2ilib.training.evaluation import Evaluation
from t2ilib.training.history import COSTS, History
from t2ilib.training.progress import Progress
from t2ilib.training.setups import Setup, setup_diffusion, trained_precision
from t2ilib.training.state import TrainState, require_same_run
from t2ilib.training.step import take_gradients

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


class Interrupted(SystemExit):
    """A signal arrived; the state is in a checkpoint. The exit code is 128 + signal, as shells have it."""


@dataclass
class TrainResult:
    """What a run leaves in memory. `metrics`: the final values, by name; `output`: the run's folder; `prompts`: those of its sample
    grids, the run's own or captions of its pictures, held-out ones first."""

    components: Components
    metrics: dict[str, float]
    output: Path
    resumed_from: int
    prompts: tuple[str, ...] = ()


def train(run: RunConfig, tracker: Tracker | None = None) -> TrainResult:
    """Trains as `run` says, resuming from the newest checkpoint in `run.output`, and saves what was trained there.

    Raises ConfigError before anything is written for what cannot work, NonFiniteLoss, AdapterError for adapters that do not
    train, and Interrupted after SIGTERM or Ctrl-C, with a checkpoint committed.
    """
    tracker = tracker or NullTracker()
    choose_kernels(run)
    accelerator = build_accelerator(run)
    memory, peaks = MemoryLog(run.output), Peaks()
    memory.note("start")
    require_same_run(run)
    find_measures(run)  # told now, not after training
    training, held_out = load_datasets(run)
    if run.training.steps:
        sample_ids(run.seed, 0, run.training.batch_size, len(training))  # likewise a batch that cannot be filled
    require_scaled_gradients(run, accelerator)
    with peaks.during("loading"):
        components = load_base(trained_precision(run), accelerator.device)
    if run.objective.name != "auto":
        components.predict(run.objective.name)
    with peaks.during("encoding"):
        setup = SETUPS[run.trains](run, components, training, held_out, accelerator)
    state = TrainState(run, setup, accelerator, training.digest)
    require_disk(run.output, state.checkpoint_bytes() * (run.training.keep_checkpoints + 1), "checkpoints")

    with owned(run.output):
        start, steps = state.resume(), run.training.steps
        save_run(run, run.output / "run.yaml")
        memory.note("loaded")
        tracker.log_datasets(training, held_out)
        history = History(run.output, start, tracker, peaks)
        evaluate = Evaluation(run, setup, state, history, tracker)
        evaluate(start) if start == 0 else evaluate.restore()
        progress = Progress(run, start)

        with interruptible() as interrupt:
            for step in range(start, steps):
                history.begin()
                ids = sample_ids(run.seed, step, run.training.batch_size, setup.num_samples)
                losses, norm = take_gradients(run, setup, state.model, state.parameters, accelerator, step, ids)
                require_finite(losses, step, ids, training)
                if accelerator.scaler is None:  # with one, such a step is skipped and the scale lowered
                    require_finite(norm.expand(len(ids)), step, ids, training)
                if setup.proof is not None:
                    setup.proof.observe(step - start + 1)
                state.step()

                done, loss = step + 1, float(losses.mean())
                history.step(done, {"loss": loss, "grad_norm": float(norm), **state.rates()})
                progress(done, loss, history.seconds)
                if step == start:
                    memory.note("first_step")
                if evaluate.due(done):
                    evaluate(done)
                stop = bool(interrupt)  # a signal that comes from here on is looked at after the next step
                if state.due(done) or stop:
                    history.save_timing()
                    state.save(done)
                    if run.training.keep_adapters == "all":
                        setup.save(run.output / "steps" / step_name(done))
                if stop:
                    raise Interrupted(128 + interrupt[0])

        with state.averaged():
            setup.save(run.output)
        metrics = proven(setup, run.output / "adapter" / UNPROVEN)
        if steps:
            metrics |= evaluate(steps) | history.speed()
            state.keep_average()
        else:
            metrics |= history.last
        memory.note("end")
        history.add(steps, metrics | peaks.metrics() | state.sizes(run.output) | memory.metrics())
        declare(
            run.output,
            {name: about for name, about in {**setup.metrics, **COSTS}.items() if name in {**history.last, **PEAKS}},
        )
        for path, folder in state.artifacts(run.output):
            tracker.log_artifact(path, folder)
        if run.trains == "adapter":
            tracker.log_adapter(adapter_file(run.output), locate(run.model.base), run.data.resolution)
        tracker.flush()
        return TrainResult(components, history.last, run.output, start, setup.prompts)


def proven(setup: Setup, note: Path) -> dict[str, float]:
    """What the proof of training measured, {} without one. What was trained is saved before this is asked: where the proof fails,
    `note` says so beside it, and AdapterError is raised."""
    note.unlink(missing_ok=True)
    try:
        return setup.proof.finish() if setup.proof is not None else {}
    except AdapterError as error:
        note.write_text(f"{error}\n")
        raise AdapterError(f"{error}. What was trained is in {note.parent}, marked as unproven") from None


def build_accelerator(run: RunConfig) -> Accelerator:
    """Device and precision: autocast to bf16 only where the hardware has it, fp16 on other GPUs, none on a CPU unless asked."""
    from accelerate.state import AcceleratorState

    precision = run.training.mixed_precision
    if precision == "auto":
        precision = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}[
            choose_dtype("auto", choose_device())
        ]
    AcceleratorState._reset_state(
        reset_partial_state=True
    )  # one process may train twice, in other precisions or elsewhere
    accelerator = Accelerator(mixed_precision=precision, cpu=choose_device().type == "cpu")
    if accelerator.num_processes > 1:
        raise ConfigError(
            f"{accelerator.num_processes} processes were launched; a run trains in one. Start it without a launcher"
        )
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


@contextlib.contextmanager
def interruptible() -> Iterator[list[int]]:
    """A list that SIGTERM or Ctrl-C adds itself to, to be looked at between steps; a second signal exits at once."""
    received: list[int] = []

    def receive(number: int, frame) -> None:
        if received:
            raise Interrupted(128 + number)
        received.append(number)
        log.warning("%s: committing a checkpoint, then stopping (once more stops at once)", signal.Signals(number).name)

    before = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(ValueError):  # signals belong to the main thread; elsewhere there is nothing to catch
            before[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
