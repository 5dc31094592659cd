"""The state that a checkpoint holds, put together and put back: trainable weights, optimizer, schedule, EMA, step."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from t2ilib.adapters.attach import attach_adapters
from t2ilib.config import ConfigError, RunConfig
from t2ilib.models.components import Components
from t2ilib.runfile import load_run
from t2ilib.training.average import at_hand, build_average, rest_on_host, tell_average
from t2ilib.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    pack_optimizer,
    save_checkpoint,
    unpack_optimizer,
)
from t2ilib.training.optim import build_optimizer, build_schedule, parameter_groups, share_of_8bit_moments
from t2ilib.training.processes import meet
from t2ilib.training.resume import LOG, Beginning, digest_of
from t2ilib.training.setups import Setup
from t2ilib.training.sharding import become_whole, gathered, shard, spread_like, whole_network

log = logging.getLogger(__name__)


class TrainState:
    """What a checkpoint holds: trainable weights, optimizer, schedule, EMA and the step. `data`: digest of the pictures.

    `done`: how many steps weights, optimizer and average have taken; None while they take one, and are not of the same step. `saved`: the
    last of them of which a checkpoint was begun."""

    def __init__(self, run: RunConfig, setup: Setup, accelerator: Accelerator, data: str):
        self.run, self.accelerator, self.data, self.digest = run, accelerator, data, digest_of(run)
        self.setup, self.spread = setup, run.compute.shard and accelerator.num_processes > 1
        self.done: int | None = 0
        self.saved = 0
        if self.spread:
            shard(setup.components.unet, accelerator)
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
        if self.spread:  # it is prepared already, but for autocast
            self.model = accelerator.prepare_model(setup.model, evaluation_mode=True)
            self.optimizer = accelerator.prepare_optimizer(self.raw_optimizer)
        else:
            self.model, self.optimizer = accelerator.prepare(setup.model, self.raw_optimizer)
        if run.training.ema_horizon:
            self.ema = build_average(self.parameters, run.training)
            if "average" in run.compute.offload:
                rest_on_host(self.ema, accelerator.device)

    def step(self) -> None:
        """Optimizer, schedule, average; gradients are gone afterwards."""
        done, self.done = self.done, None
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            with at_hand(self.ema, self.parameters[0].device):
                self.ema.step(self.parameters)
        self.done = done + 1

    def due(self, step: int) -> bool:
        return step % self.run.training.checkpoint_every == 0 or step == self.run.training.steps

    def rates(self) -> dict[str, float]:
        """Learning rates as they are now, one for each group of parameters; of Prodigy also `d`, its estimate of the distance that
        there is to go, by which it multiplies them."""
        groups = self.raw_optimizer.param_groups
        estimates = {"prodigy_d": float(groups[0]["d"])} if "d" in groups[0] else {}
        return {f"learning_rate/{group['name']}": group["lr"] for group in groups} | estimates

    def save(self, step: int) -> None:
        """Commits a checkpoint. Raises OSError and NonFiniteState as `save_checkpoint` does."""
        self.saved = step
        tensors, optimizer = pack_optimizer(self.raw_optimizer)
        files = {"weights": dict(self.named), "optimizer": tensors}
        meta = {"digest": self.digest, "data": self.data, "optimizer": optimizer}
        if self.ema is not None:
            files["ema"] = dict(zip(self.named, self.ema.shadow_params, strict=True))
            meta["ema_steps"] = self.ema.optimization_step
        if self.accelerator.scaler is not None:
            meta["scaler"] = self.accelerator.scaler.state_dict()
        main = self.accelerator.is_main_process
        files = {stem: gathered(tensors, keep=main) for stem, tensors in files.items()}
        if not main:
            return
        save_checkpoint(self.folder, Checkpoint(step, files, meta), self.run.training.keep_checkpoints)

    def rescue(self) -> None:
        """Commits a checkpoint after an error, where it is worth something: of a step that is whole and not saved yet, by the main process,
        whose weights are whole too. Never raises an Exception: the error that came first is what is to be told."""
        step = self.done
        if step is None or step <= self.saved or self.spread or not self.accelerator.is_main_process:
            return
        try:
            self.optimizer.zero_grad()
            if self.accelerator.device.type == "cuda":
                torch.cuda.empty_cache()
            self.save(step)
        except Exception as error:
            log.warning("no emergency checkpoint of step %d: %s: %s", step, type(error).__name__, error)
        else:
            log.warning(
                "an emergency checkpoint of step %d is in %s: the same command goes on from it", step, self.folder
            )

    def resume(self, beginning: Beginning) -> int:
        """Puts the checkpoint that the run begins with in place; returns its step, 0 without one. Raises CheckpointError if it is
        damaged or of other data."""
        if self.ema is not None:
            tell_average(self.run.training)
        checkpoint = beginning.load() if self.parameters else None
        if checkpoint is not None and checkpoint.meta["data"] != self.data:
            raise CheckpointError(
                f"the training pictures or captions have changed since {beginning.checkpoint or self.folder} was written, so the run"
                " cannot go on as it was: put them back, or choose another output folder"
            )
        meet(self.accelerator)  # until all have read what may be moved
        if self.accelerator.is_main_process:
            beginning.make_room(checkpoint.step if checkpoint else 0)
        meet(self.accelerator)
        if checkpoint is None:
            return 0
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(spread_like(checkpoint.tensors["weights"][name], parameter))
        moments = {
            name: spread_like(tensor, self.parameters[int(name.split(".")[0])])
            for name, tensor in checkpoint.tensors["optimizer"].items()
        }
        unpack_optimizer(self.raw_optimizer, moments, checkpoint.meta["optimizer"])
        self.schedule.last_epoch = checkpoint.step  # the rates themselves are part of the optimizer's state
        if self.ema is not None:
            saved = checkpoint.tensors["ema"]
            for i, (name, average) in enumerate(zip(self.named, self.ema.shadow_params, strict=True)):
                kept = saved[name] if name in saved else saved[str(i)]  # as checkpoints of before number them
                average.copy_(spread_like(kept, self.named[name]))
            self.ema.optimization_step = checkpoint.meta["ema_steps"]
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(checkpoint.meta["scaler"])
        self.done = self.saved = checkpoint.step
        log.info("resumed from step %d in %s", checkpoint.step, beginning.checkpoint or self.folder)
        return checkpoint.step

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The EMA weights in place of the trained ones, and eval mode, for as long as the scope lasts."""
        self.model.eval()
        if self.ema is not None:
            self.ema.store(self.parameters)
            self.ema.copy_to(self.parameters)
        try:
            with whole_network(*self.whole_places()) if self.spread else contextlib.nullcontext():
                yield
        finally:
            if self.ema is not None:
                self.ema.restore(self.parameters)
            self.model.train(bool(self.parameters))

    def keep_average(self) -> None:
        """At the end: the model in memory becomes what was saved, and a student's teacher is given back."""
        if self.ema is not None:
            self.ema.copy_to(self.parameters)
        if self.spread:
            become_whole(*self.whole_places())
        self.setup.components.teacher = None

    def whole_places(self) -> tuple[Components, nn.Module, bool]:
        """Where a plain copy of a network that is spread goes, and whether this process gets one."""
        return self.setup.components, self.setup.model, self.accelerator.is_main_process

    def checkpoint_bytes(self) -> int:
        """Upper estimate: weights, the optimizer's tensors (two moments; Prodigy keeps two more) and, with EMA, the average."""
        copies = 1 + {"prodigy": 4}.get(self.run.optimizer.name, 2) + (self.ema is not None)
        return copies * sum(p.numel() * p.element_size() for p in self.parameters)

    def artifacts(self, output: Path) -> list[tuple[Path, str | None]]:
        """What MLflow keeps of a run: its config, its adapter, its last checkpoint."""
        last = list_checkpoints(self.folder)[-1:]
        kept = [
            (output / "run.yaml", None),
            (output / "manifest.csv", None),
            (output / "manifest.json", None),
            (output / LOG, None),
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


def load_checkpoint_adapter(components: Components, folder: Path, step: int) -> dict[str, torch.Tensor] | None:
    """Attaches the adapter of a run's folder as it was at a checkpoint, averaged where the run averages; raises ConfigError naming the
    steps there are.

    Returns A and B as they began (`component.parameter` -> tensor) where they were taken out of the base, which has changed by that (PiSSA,
    OLoRA): `save_adapter` wants them as `start`. None otherwise.
    """
    paths = {int(path.name.removeprefix("step-")): path for path in list_checkpoints(folder / "checkpoints")}
    if step not in paths:
        raise ConfigError(
            f"{folder} has no checkpoint of step {step}; there are {', '.join(map(str, paths)) or 'none'}"
        )
    run = load_run(folder / "run.yaml")
    if run.adapter is None:
        raise ConfigError(f"{folder} trained {run.trains}, not an adapter: draw with --model {folder / 'model'}")
    if changes_base(run) and components.path != run.model.base:
        raise ConfigError(
            f"{folder} took its start from {run.model.base} (init {run.adapter.init}): a checkpoint of it goes with that base alone;"
            " without --checkpoint its finished adapter goes with others"
        )
    components.noise_as(run.objective.name, run.objective.beta_schedule, run.objective.zero_terminal_snr)
    components.draw_as(run.drawn_by)
    tensors = load_checkpoint(paths[step]).tensors
    weights = tensors.get("ema", tensors["weights"])
    start, adapted = {}, attach_adapters(components, run.adapter, run.seed)
    named = {
        f"{name}.{key}" for name, module in adapted.items() for key, p in module.named_parameters() if p.requires_grad
    }
    if named != weights.keys():
        raise ConfigError(
            f"{folder} adapts other layers of {run.model.base} than {components.path} has: a checkpoint of it goes with that base alone;"
            " without --checkpoint its finished adapter goes with others"
        )
    for name, module in adapted.items():
        with torch.no_grad():
            for key, parameter in module.named_parameters():
                if f"{name}.{key}" in weights:
                    if changes_base(run):
                        start[f"{name}.{key}"] = parameter.detach().cpu().clone()
                    parameter.copy_(weights[f"{name}.{key}"])
        module.requires_grad_(False)
    return start or None


def changes_base(run: RunConfig) -> bool:
    """Whether attaching the run's adapter to be trained takes its start out of the base's own weights."""
    return run.adapter is not None and run.adapter.init in ("pissa", "olora")
