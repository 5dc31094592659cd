"""The state that a checkpoint holds, put together and put back: trainable weights, optimizer, schedule, EMA, step."""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator

from t2ilib.adapters.attach import attach_adapters
from t2ilib.config import ConfigError, RunConfig
from t2ilib.models.components import Components
from t2ilib.runfile import load_run
from t2ilib.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    load_latest,
    pack_optimizer,
    save_checkpoint,
    unpack_optimizer,
)
from t2ilib.training.optim import build_optimizer, build_schedule, parameter_groups, share_of_8bit_moments
from t2ilib.training.setups import Setup

log = logging.getLogger(__name__)


def require_same_run(run: RunConfig) -> None:
    """Raises CheckpointError, with the fields that differ, where `run.output` holds checkpoints of another run, or of more steps.

    Asked before anything is loaded, opened or written, so that a refused run leaves a finished one as it was.
    """
    found = list_checkpoints(run.output / "checkpoints")[-1:]
    if not found or not (found[0] / "meta.json").exists():
        return
    meta = json.loads((found[0] / "meta.json").read_text())
    if meta["digest"] != run.training_digest():
        raise CheckpointError(
            f"{run.output} holds a run with other settings{changes_of(run)}: choose another output folder, or delete this one to"
            " start again"
        )
    if meta["step"] > run.training.steps:
        raise CheckpointError(
            f"{run.output} holds a run that has taken {meta['step']} steps, and training.steps is {run.training.steps}: raise it,"
            " or choose another output folder"
        )


def changes_of(run: RunConfig) -> str:
    """How `run` differs from what its output folder says it was trained with; "" where that cannot be told."""
    try:
        before, now = load_run(run.output / "run.yaml").flat(), run.flat()
    except ConfigError:
        return ""
    differing = [name for name in now if before.get(name) != now[name] and not name.startswith("evaluation.")]
    told = ", ".join(f"{name} {before.get(name)!r} -> {now[name]!r}" for name in differing)
    laid_out = ""
    if "training.steps" in differing and run.optimizer.schedule != "constant":
        laid_out = f"; a {run.optimizer.schedule} schedule is laid out over all steps, so more of them would have been other steps"
    return f" ({told}{laid_out})" if told else ""


class TrainState:
    """What a checkpoint holds: trainable weights, optimizer, schedule, EMA and the step. `data`: digest of the pictures."""

    def __init__(self, run: RunConfig, setup: Setup, accelerator: Accelerator, data: str):
        self.run, self.accelerator, self.data = run, accelerator, data
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
        """Optimizer, schedule, average; gradients are gone afterwards."""
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.step(self.parameters)

    def due(self, step: int) -> bool:
        return step % self.run.training.checkpoint_every == 0 or step == self.run.training.steps

    def rates(self) -> dict[str, float]:
        """Learning rates as they are now, one for each group of parameters; of Prodigy also `d`, its estimate of the distance that
        there is to go, by which it multiplies them."""
        groups = self.raw_optimizer.param_groups
        estimates = {"prodigy_d": float(groups[0]["d"])} if "d" in groups[0] else {}
        return {f"learning_rate/{group['name']}": group["lr"] for group in groups} | estimates

    def save(self, step: int) -> None:
        tensors, optimizer = pack_optimizer(self.raw_optimizer)
        files = {"weights": dict(self.named), "optimizer": tensors}
        meta = {"digest": self.run.training_digest(), "data": self.data, "optimizer": optimizer}
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
        if checkpoint.meta["data"] != self.data:
            raise CheckpointError(
                f"the training pictures or captions have changed since {self.folder} was written, so the run cannot go on as it"
                " was: put them back, or choose another output folder"
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

    def keep_average(self) -> None:
        """At the end: the model in memory becomes what was saved."""
        if self.ema is not None:
            self.ema.copy_to(self.parameters)

    def checkpoint_bytes(self) -> int:
        """Upper estimate: weights, the optimizer's tensors (two moments; Prodigy keeps two more) and, with EMA, the average."""
        copies = 1 + {"prodigy": 4}.get(self.run.optimizer.name, 2) + (self.ema is not None)
        return copies * sum(p.numel() * p.element_size() for p in self.parameters)

    def artifacts(self, output: Path) -> list[tuple[Path, str | None]]:
        """What MLflow keeps of a run: its config, its adapter, its last checkpoint."""
        last = list_checkpoints(self.folder)[-1:]
        kept = [
            (output / "run.yaml", None),
            (output / "held_out", "held_out"),
            (output / "adapter", "adapter"),
            (output / "steps", "steps"),
            *((path, f"checkpoints/{path.name}") for path in last),
        ]
        return [(path, folder) for path, folder in kept if path.exists()]

    def sizes(self, output: Path) -> dict[str, float]:
        values = {"trainable_parameters": float(sum(p.numel() for p in self.parameters))}
        share = share_of_8bit_moments(self.raw_optimizer) if self.parameters else None
        values |= {} if share is None else {"moments_in_8bit": share}
        files = list((output / "adapter").glob("*.safetensors"))
        return values | ({"adapter_mib": sum(f.stat().st_size for f in files) / 2**20} if files else {})


def load_checkpoint_adapter(components: Components, folder: Path, step: int) -> None:
    """Attaches the adapter of a run's folder as it was at a checkpoint; raises ConfigError naming the steps there are."""
    paths = {int(path.name.removeprefix("step-")): path for path in list_checkpoints(folder / "checkpoints")}
    if step not in paths:
        raise ConfigError(
            f"{folder} has no checkpoint of step {step}; there are {', '.join(map(str, paths)) or 'none'}"
        )
    run = load_run(folder / "run.yaml")
    if run.adapter is None:
        raise ConfigError(f"{folder} trained {run.trains}, not an adapter: draw with --model {folder / 'model'}")
    if run.adapter.init in ("pissa", "olora") and components.path != run.model.base:
        raise ConfigError(
            f"{folder} took its start from {run.model.base} (init {run.adapter.init}): a checkpoint of it goes with that base alone;"
            " without --checkpoint its finished adapter goes with others"
        )
    weights = load_checkpoint(paths[step]).tensors["weights"]
    for name, module in attach_adapters(components, run.adapter, run.seed).items():
        with torch.no_grad():
            for key, parameter in module.named_parameters():
                if f"{name}.{key}" in weights:
                    parameter.copy_(weights[f"{name}.{key}"])
        module.requires_grad_(False)
