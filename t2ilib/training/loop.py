"""`train`: the only training loop. What is trained, on what and how is decided before it starts, by functions it calls.

Every step is a function of the run config and the step's number: sample order, noise, timesteps, dropped captions and
dropout come from addresses, so a run that was killed and resumed is, bit for bit, the run that was not.
"""

import contextlib
import json
import logging
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from t2ilib.config import RunConfig, save_run
from t2ilib.data.loader import sample_ids
from t2ilib.data.manifest import load_datasets
from t2ilib.evaluation.sampling import load_pictures, make_grid, save_pictures
from t2ilib.memory import MemoryLog, Peak, require_disk
from t2ilib.models.components import Components, choose_device, choose_dtype, load_base
from t2ilib.seeds import seed_for
from t2ilib.tracking import NullTracker, Tracker
from t2ilib.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    list_checkpoints,
    load_latest,
    pack_optimizer,
    save_checkpoint,
    unpack_optimizer,
)
from t2ilib.training.optim import build_optimizer, build_schedule, parameter_groups
from t2ilib.training.pretraining import setup_clip, setup_vae
from t2ilib.training.progress import Progress
from t2ilib.training.setups import Setup, setup_diffusion

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
    """What a run leaves in memory. `metrics`: the final values, by name; `output`: the run's folder."""

    components: Components
    metrics: dict[str, float]
    output: Path
    resumed_from: int


def train(run: RunConfig, tracker: Tracker | None = None) -> TrainResult:
    """Trains as `run` says, resuming from the newest checkpoint in `run.output`, and saves what was trained there.

    Raises ConfigError before anything is written for what cannot work, NonFiniteLoss, AdapterError for adapters that do not
    train, and Interrupted after SIGTERM or Ctrl-C, with a checkpoint committed.
    """
    tracker = tracker or NullTracker()
    accelerator = build_accelerator(run)
    memory = MemoryLog(run.output)
    memory.note("start")
    training, held_out = load_datasets(run.data)
    components = load_base(run.model, accelerator.device)
    run.output.mkdir(parents=True, exist_ok=True)
    setup = SETUPS[run.training.trains](run, components, training, held_out, accelerator)
    state = TrainState(run, setup, accelerator)
    require_disk(run.output, state.checkpoint_bytes() * (run.training.keep_checkpoints + 1), "checkpoints")
    save_run(run, run.output / "run.yaml")
    memory.note("loaded")
    start = state.resume()
    tracker.log_datasets(training, held_out)
    history = History(run.output / "metrics.jsonl", start, tracker)
    evaluate = Evaluation(run, setup, state, history, tracker)
    evaluate(start) if start == 0 else evaluate.restore()
    peak, progress, steps = Peak(), Progress(run, start), run.training.steps

    with interruptible() as interrupt:
        for step in range(start, steps):
            peak.start()
            begun = time.perf_counter()
            ids = sample_ids(run.seed, step, run.training.batch_size, setup.num_samples)
            losses = []
            for micro, share in enumerate(shares(ids, run.training.accumulation, accelerator)):
                torch.manual_seed(seed_for(run.seed, "dropout", step, micro, accelerator.process_index))
                with synced_last(accelerator, state.model, micro, run.training.accumulation):
                    per_sample = setup.losses(state.model, share, step)
                    accelerator.backward(per_sample.mean() / run.training.accumulation)
                losses.append(per_sample.detach())
                require_finite(per_sample, step, share, training)
            norm = accelerator.clip_grad_norm_(state.parameters, run.optimizer.max_grad_norm)
            if setup.proof is not None:
                setup.proof.observe(step - start + 1)
            state.step()
            done = step + 1
            loss = float(accelerator.gather(torch.cat(losses)).mean())
            rate = {f"learning_rate/{group['name']}": group["lr"] for group in state.raw_optimizer.param_groups}
            history.add(done, {"loss": loss, "grad_norm": float(norm), **rate}, time.perf_counter() - begun)
            progress(done, loss, history.seconds)
            if step == start:
                memory.note("first_step")
            if evaluate.due(done) or state.due(done) or interrupt or done == steps:
                peak.stop()
            if evaluate.due(done) and done < steps:
                evaluate(done)
            if state.due(done) or interrupt or done == steps:
                state.save(done)
            if interrupt:
                raise Interrupted(128 + interrupt[0])

    metrics = setup.proof.finish() if setup.proof is not None else {}
    with state.averaged():
        setup.save(run.output)
    if steps:
        metrics |= evaluate(steps) | history.speed()
    else:
        metrics |= history.last
    memory.note("end")
    history.add(steps, metrics | peak.metrics() | state.sizes(run.output) | memory.metrics())
    for path, folder in state.artifacts(run.output):
        tracker.log_artifact(path, folder)
    tracker.flush()
    return TrainResult(components, history.last, run.output, start)


def build_accelerator(run: RunConfig) -> Accelerator:
    """Device and precision: autocast to bf16 only where the hardware has it, fp16 on other GPUs, none on a CPU unless asked."""
    from accelerate.state import AcceleratorState

    precision = run.training.mixed_precision
    if precision == "auto":
        precision = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}[
            choose_dtype("auto", choose_device())
        ]
    AcceleratorState._reset_state()  # one process may train twice, with different precisions
    return Accelerator(mixed_precision=precision)


def shares(ids: list[int], accumulation: int, accelerator: Accelerator) -> list[list[int]]:
    """This process's part of a batch, in micro-batches. Raises ValueError where the batch does not divide."""
    parts = accelerator.num_processes * accumulation
    if len(ids) % parts:
        raise ValueError(f"training.batch_size {len(ids)} does not divide among {parts} (processes x accumulation)")
    size = len(ids) // parts
    mine = ids[accelerator.process_index :: accelerator.num_processes]
    return [mine[i : i + size] for i in range(0, len(mine), size)]


def synced_last(accelerator: Accelerator, model: torch.nn.Module, micro: int, accumulation: int):
    """Processes exchange gradients in the last micro-batch only."""
    return contextlib.nullcontext() if micro == accumulation - 1 else accelerator.no_sync(model)


def require_finite(losses: Tensor, step: int, ids: list[int], training) -> None:
    bad = [sample for sample, finite in zip(ids, torch.isfinite(losses).tolist(), strict=True) if not finite]
    if bad:
        named = "\n  ".join(f"{training.records[i].path.name}: {training.records[i].caption}" for i in bad[:5])
        raise NonFiniteLoss(
            f"the loss of {len(bad)} sample(s) is not finite at step {step}:\n  {named}\n"
            "Lower optimizer.learning_rate, set training.mixed_precision to no, or look at these pictures."
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


class TrainState:
    """What a checkpoint holds: trainable weights, optimizer, schedule, EMA and the step."""

    def __init__(self, run: RunConfig, setup: Setup, accelerator: Accelerator):
        self.run, self.accelerator = run, accelerator
        self.named = {
            f"{module}.{name}": parameter
            for module, part in setup.modules.items()
            for name, parameter in part.named_parameters()
            if parameter.requires_grad
        }
        self.parameters = list(self.named.values())
        self.folder = run.output / "checkpoints"
        self.model, self.ema, self.raw_optimizer = setup.model, None, None
        setup.model.train(bool(self.parameters))
        if not self.parameters:
            return
        self.raw_optimizer = build_optimizer(parameter_groups(setup.modules, run.optimizer), run.optimizer)
        self.schedule = build_schedule(self.raw_optimizer, run.optimizer, run.training.steps)
        self.model, self.optimizer = accelerator.prepare(setup.model, self.raw_optimizer)
        if run.training.ema_decay:
            from diffusers.training_utils import EMAModel

            self.ema = EMAModel(self.parameters, decay=run.training.ema_decay, use_ema_warmup=True, power=0.75)

    def step(self) -> None:
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.step(self.parameters)

    def due(self, step: int) -> bool:
        return step % self.run.training.checkpoint_every == 0

    def save(self, step: int) -> None:
        if not self.accelerator.is_main_process:
            return
        tensors, optimizer = pack_optimizer(self.raw_optimizer)
        files = {"weights": dict(self.named), "optimizer": tensors}
        meta = {"digest": self.run.training_digest(), "optimizer": optimizer}
        if self.ema is not None:
            files["ema"] = {str(i): tensor for i, tensor in enumerate(self.ema.shadow_params)}
            meta["ema_steps"] = self.ema.optimization_step
        if self.accelerator.scaler is not None:
            meta["scaler"] = self.accelerator.scaler.state_dict()
        save_checkpoint(self.folder, Checkpoint(step, files, meta), self.run.training.keep_checkpoints)

    def resume(self) -> int:
        """Puts the newest checkpoint in place; returns its step, 0 without one. Raises CheckpointError if it is another run's."""
        checkpoint = load_latest(self.folder) if self.parameters else None
        if checkpoint is None:
            return 0
        if checkpoint.meta["digest"] != self.run.training_digest():
            raise CheckpointError(
                f"{self.folder} holds checkpoints of a run with other settings (compare {self.run.output / 'run.yaml'}):"
                " choose another output folder, or delete this one to start again"
            )
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(checkpoint.tensors["weights"][name])
        unpack_optimizer(self.raw_optimizer, checkpoint.tensors["optimizer"], checkpoint.meta["optimizer"])
        self.schedule.last_epoch = checkpoint.step  # the rates themselves are part of the optimizer's state
        if self.ema is not None:
            self.ema.shadow_params = [
                checkpoint.tensors["ema"][str(i)].to(p.device) for i, p in enumerate(self.parameters)
            ]
            self.ema.optimization_step = checkpoint.meta["ema_steps"]
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(checkpoint.meta["scaler"])
        log.info("resumed from step %d in %s", checkpoint.step, self.folder)
        return checkpoint.step

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The EMA weights in place of the trained ones, and eval mode, for as long as the scope lasts."""
        self.model.eval()
        if self.ema is not None:
            self.ema.store(self.parameters)
            self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            if self.ema is not None:
                self.ema.restore(self.parameters)
            self.model.train(bool(self.parameters))

    def checkpoint_bytes(self) -> int:
        """Upper estimate: weights, two moments and, with EMA, the average, in their own precision."""
        copies = 3 + (self.ema is not None)
        return copies * sum(p.numel() * p.element_size() for p in self.parameters)

    def artifacts(self, output: Path) -> list[tuple[Path, str | None]]:
        """What MLflow keeps of a run: its config, its adapter, its last checkpoint."""
        last = list_checkpoints(self.folder)[-1:]
        kept = [
            (output / "run.yaml", None),
            (output / "held_out_by_picture.json", None),
            (output / "adapter", "adapter"),
            *((path, f"checkpoints/{path.name}") for path in last),
        ]
        return [(path, folder) for path, folder in kept if path.exists()]

    def sizes(self, output: Path) -> dict[str, float]:
        values = {"trainable_parameters": float(sum(p.numel() for p in self.parameters))}
        files = list((output / "adapter").glob("*.safetensors"))
        return values | ({"adapter_mib": sum(f.stat().st_size for f in files) / 2**20} if files else {})


class History:
    """metrics.jsonl: one line a logged step, cut back to the checkpoint on resume; the same numbers go to the tracker."""

    def __init__(self, path: Path, start: int, tracker: Tracker):
        self.path, self.tracker, self.seconds, self.timed, self.last = path, tracker, 0.0, 0, {}
        kept = [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.exists() else []
        kept = [row for row in kept if row["step"] <= start] if start else []
        for row in kept:
            self.last |= {name: value for name, value in row.items() if name != "step"}
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self.first = start + 1

    def add(self, step: int, values: dict[str, float], seconds: float | None = None) -> None:
        if seconds is not None and step > self.first:  # the first step pays for what the others find warm
            self.seconds, self.timed = self.seconds + seconds, self.timed + 1
        self.last |= values
        with self.path.open("a") as lines:
            lines.write(json.dumps({"step": step, **values}) + "\n")
        self.tracker.log_metrics(values, step)

    def speed(self) -> dict[str, float]:
        return {"steps_per_second": self.timed / self.seconds} if self.timed else {}


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
                metrics = self.setup.validate()
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
        grid = make_grid(rows, labels, self.setup.prompts)
        grid.save(self.folder / f"grid-{step:06d}.png")
        self.tracker.log_image(grid, "samples", step)

    def restore(self) -> None:
        """After a resume: the base's pictures come from disk."""
        self.base_pictures = load_pictures(self.folder / "step-000000")
