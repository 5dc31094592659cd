"""What a run will need in memory, traced on a machine that need not have it.

The model is laid out on the meta device from its config files, quantized and given its adapter there, turned into fake
tensors, and taken through what a run does: encoding pictures and captions, one optimizer step in its steady state (the
optimizer's state is there already, as it is from the second step on), and drawing sample pictures. The run's own functions do
it, the loop's step among them; a `Ledger` counts. No size is written down here: what another layout or another version of a
library needs is found out by the same trace.

Leaves out: training the VAE and CLIP; measures of the pictures; what only the GPU knows (see `fit.RESERVE_BYTES`).
"""

import contextlib
import logging
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from t2ilib.config import ConfigError, RunConfig
from t2ilib.data.dataset import GRID_PROMPTS
from t2ilib.memory import pictures_at_once
from t2ilib.models.components import Components
from t2ilib.models.denoiser import Denoiser
from t2ilib.models.load import quantize_parts
from t2ilib.models.pipeline import quiet_libraries
from t2ilib.planning.blank import BlankTokenizer, counting_flops, encode_blank, kept_on_disk
from t2ilib.planning.ledger import CUDA_BLOCK, Ledger, autocast, checkpoint_options, materialize, state_tensors
from t2ilib.planning.unloaded import begin_unloaded, build_unloaded
from t2ilib.training.compute import activations_elsewhere, attending
from t2ilib.training.methods import METHODS
from t2ilib.training.others import Frozen
from t2ilib.training.setups import (
    Setup,
    checkpoint_gradients,
    learn_to_denoise,
    needed_in_steps,
    trained_modules,
    trained_precision,
    with_its_cache,
)
from t2ilib.training.state import TrainState
from t2ilib.training.step import take_gradients

CPU = torch.device("cpu")
CATEGORIES = ("weights", "quantization state", "adapters", "gradients", "optimizer", "activations", "caches")
"""Adapters: their float32 weights. Optimizer: its state, and with EMA the averaged weights. Caches: the batch, and on a CPU the
few pictures and captions that are being encoded."""


@dataclass(frozen=True)
class MemoryPlan:
    """`phases`: encoding, training, drawing -> category -> bytes at the moment of that phase's peak. `seconds`: of tracing. `kept`: bytes
    on disk of a picture's view and of a caption, 0 for what is encoded in the steps. `flops`: of encoding a picture and a caption
    for that, and of training on one sample, forward and backward; the products of int8 layers are not counted."""

    phases: dict[str, dict[str, int]]
    device_type: str
    seconds: float
    kept: dict[str, int] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)

    def bytes_of(self, phase: str) -> int:
        return sum(self.phases[phase].values())

    @property
    def largest(self) -> str:
        """The phase that decides whether the run fits."""
        return max(self.phases, key=self.bytes_of)

    @property
    def peak_bytes(self) -> int:
        return self.bytes_of(self.largest)


def plan_memory(run: RunConfig, device_type: str = "cuda") -> MemoryPlan:
    """Traces `run` for a GPU ("cuda": parked parts are on the host and do not count) or for "cpu". How many pictures there are does not
    matter: what is encoded of them is on disk.

    Raises ConfigError for what the run itself would refuse: an unknown base, targets that match nothing, an unknown optimizer.
    """
    begun, run = time.perf_counter(), with_its_cache(run)
    if run.trains in ("vae", "clip"):
        raise ConfigError(f"this run trains {run.trains}: only adapter, unet and nothing can be planned")
    dtype = planned_dtype(trained_precision(run).dtype, device_type) or torch.float32
    with undisturbed():
        components = begin_unloaded(run, dtype) if run.scratch else build_unloaded(trained_precision(run), dtype)
        components.tokenizers = {
            name.replace("text_encoder", "tokenizer"): BlankTokenizer(encoder)
            for name, encoder in components.text_encoders.items()
        }
        with torch.device("meta"):
            if run.model.quantization != "none":
                from t2ilib.planning.quantized import hold_quantized

                quantize_parts(components, run.model, dtype, torch.device("meta"), hold_quantized)
            modules = trained_modules(without_init(run), components)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        for module in components.networks():
            materialize(module, mode)
        with mode:
            phases, kept, flops = trace_run(run, components, modules, device_type)
    return MemoryPlan(phases, device_type, time.perf_counter() - begun, kept, flops)


def without_init(run: RunConfig) -> RunConfig:
    """The run with the default initialisation: others take decompositions of real weights or those of a file, and nothing after them."""
    return (
        run
        if run.adapter is None
        else run.model_copy(update={"adapter": run.adapter.model_copy(update={"init": "default", "start": None})})
    )


def planned_dtype(name: str, device_type: str) -> torch.dtype | None:
    """Of the frozen base, or of autocast, where "no" means none. "auto" on a GPU is half precision; which half changes no size."""
    names = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name == "auto":
        return torch.bfloat16 if device_type == "cuda" else None
    return names[name] if name in names else getattr(torch, name)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Leaves random numbers, warnings and the log of the process as they would be without a trace."""
    level = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with torch.random.fork_rng(devices=[]), quiet_libraries(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


class Foreseen:
    """What the loop asks of an `Accelerator`, on tensors that are on the CPU, by the rules of the device that is planned for."""

    device, scaler, num_processes, process_index = CPU, None, 1, 0

    def __init__(self, precision: torch.dtype | None, device_type: str):
        self.precision, self.device_type = precision, device_type

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        return UnderAutocast(model, self), optimizer

    def autocast(self) -> contextlib.AbstractContextManager:
        return autocast(self.precision, self.device_type)

    def no_sync(self, model: nn.Module) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip_grad_norm_(self, parameters: Iterable[nn.Parameter], most: float) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, most)


class UnderAutocast(nn.Module):
    def __init__(self, model: nn.Module, accelerator: Foreseen):
        super().__init__()
        self.model, self.accelerator = model, accelerator

    def forward(self, *inputs: Any) -> Tensor:
        with self.accelerator.autocast():
            return self.model(*inputs)


@dataclass
class Watched(Components):
    """Components whose moves between device and host a ledger writes down, instead of making them."""

    ledger: Ledger | None = None
    trained: str = "adapters"

    def place(self, module: nn.Module, at_work: bool) -> None:
        if self.ledger is None:  # planned for a CPU, where there is nowhere to go
            return
        if at_work:
            hold_weights(self.ledger, [module])
            self.ledger.hold([p for p in module.parameters() if p.requires_grad], self.trained)
        else:
            self.ledger.release(stored(module))


def trace_run(
    run: RunConfig,
    components: Components,
    modules: dict[str, nn.Module],
    device_type: str,
) -> tuple[dict[str, dict[str, int]], dict[str, int], dict[str, float]]:
    """Phase -> category -> bytes; bytes that are kept on disk; and what encoding and training cost. `modules`: what `trained_modules` gave. Works on fake tensors and on
    real ones alike."""
    ledger = Ledger(CUDA_BLOCK if device_type == "cuda" else 1)
    components = Watched(
        **vars(components),
        ledger=ledger if device_type == "cuda" else None,
        trained="adapters" if run.trains == "adapter" else "weights",
    )
    trained = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
    accelerator = Foreseen(planned_dtype(run.training.mixed_precision, device_type), device_type)
    phases, flops = {}, {}

    hold_weights(ledger, components.networks())
    if run.trains == "adapter":
        ledger.hold(trained, "adapters")
    components.park(needed_in_steps(run, components))
    with ledger.measuring(), torch.no_grad():
        encoded = encode_blank(run, components)
    phases["encoding"] = ledger.peak
    host = [tensor for part in (encoded.latents, encoded.text) for tensor in getattr(part, "held", {}).values()]
    if device_type == "cuda":
        ledger.release(host)
    else:
        ledger.hold(host, "caches")

    outlives = None
    with unset_fake_temporarily():  # the schedule's tables are looked into
        setup = learn_to_denoise(run, components, modules, encoded, CPU)
    if isinstance(setup.base, Frozen):
        hold_weights(ledger, [setup.base.unet])
    if modules:
        if run.training.gradient_checkpointing:
            checkpoint_gradients(components, modules, **checkpoint_options(device_type))
        with ledger.measuring(), as_computed(run, setup, device_type) as computed:
            outlives = second_step(run, computed, accelerator, ledger)
        phases["training"] = ledger.peak
    with ledger.measuring(), torch.no_grad():
        forward = draw_blank(run, components, setup)
    phases["drawing"] = ledger.peak
    if modules:
        learning, beside = passes_of_a_step(run)
        of_base = forward if components.teacher is None else taught(components, setup)
        flops["sample"] = forward * learning + of_base * beside
    del outlives
    for name, part in (("picture", encoded.latents), ("caption", encoded.text)):
        flops[name] = getattr(part, "flops", 0.0)
    return phases, kept_on_disk(run, encoded), flops


@contextlib.contextmanager
def as_computed(run: RunConfig, setup: Setup, device_type: str) -> Iterator[Setup]:
    """What section `compute` changes of memory: attention by plain matrix products keeps its weights, and what waits on the host is not
    there. Kernels of xFormers and flash take what torch's own does; what the compiler saves is not foreseen."""
    plain = run.compute.attention == "math"
    with attending(setup.components.unet, "math") if plain else contextlib.nullcontext():
        if waits(run, "activations", device_type):
            setup = activations_elsewhere(
                setup,
                put=lambda tensor: partial(torch.empty_strided, tensor.size(), tensor.stride(), dtype=tensor.dtype),
                fetch=lambda make: make(),
            )
        yield setup


def waits(run: RunConfig, what: str, device_type: str) -> bool:
    """Whether activations, or the average, wait in host memory, which then counts as elsewhere."""
    return device_type == "cuda" and what in run.compute.offload


def stored(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers(), *state_tensors(module)]


def hold_weights(ledger: Ledger, modules: Iterable[nn.Module]) -> None:
    for module in modules:
        ledger.hold((*module.parameters(), *module.buffers()), "weights")
        ledger.hold(state_tensors(module), "quantization state")


def second_step(run: RunConfig, setup: Setup, accelerator: Foreseen, ledger: Ledger) -> TrainState:
    """A step as the loop takes it, on top of what the first one leaves: the optimizer's state, with EMA the average, and between
    micro-batches the gradients. Of many micro-batches two show what all do. Returns what outlives a step."""
    size, parts = run.training.batch_size // run.training.accumulation, min(run.training.accumulation, 2)
    training = run.training.model_copy(update={"accumulation": parts, "batch_size": parts * size})
    run = run.model_copy(update={"training": training})
    with ledger.counting_as("optimizer"):
        state = TrainState(run, setup, accelerator, "")
    with ledger.counting_as("gradients"):
        for parameter in state.parameters:
            parameter.grad = torch.zeros_like(parameter)
    with ledger.counting_as("optimizer"):
        state.step()
    ledger.most = 0  # the first step is not what is looked at
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda p: ledger.hold([p.grad], "gradients"))
        for parameter in state.parameters
    ]

    def batch(ids: list[int], step: int) -> dict[str, Any]:
        with ledger.counting_as("caches"):
            return setup.batch(ids, step)

    pool = setup.order(0)
    ids = [pool[i % len(pool)] for i in range(parts * size)]
    average = state.ema.shadow_params if waits(run, "average", accelerator.device_type) else []
    ledger.release(average)
    take_gradients(run, replace(setup, batch=batch), state.model, state.parameters, accelerator, 1, ids)
    with ledger.counting_as("optimizer"):
        ledger.hold(average, "optimizer")
        state.step()
    for hook in hooks:
        hook.remove()
    return state


def passes_of_a_step(run: RunConfig) -> tuple[int, int]:
    """What a training step costs of each sample, in forward passes of what is trained: of those that learn one, one for the gradients of what
    goes in, one for those of weights where all are trained, and one more where activations are computed again; and in those of the base
    beside it, without gradients."""
    learning, beside = METHODS[run.objective.method].passes(run)
    return learning * (2 + (run.trains == "unet") + run.training.gradient_checkpointing), beside


def taught(components: Components, setup: Setup) -> float:
    """The operations of the teacher's pass for one picture."""
    with components.awake():
        batch = setup.batch([0], 0)
    with counting_flops() as counter:
        setup.base(torch.zeros_like(batch["latents"]), torch.zeros(1, dtype=torch.long), batch)
    return counter.get_total_flops()


def draw_blank(run: RunConfig, components: Components, setup: Setup) -> float:
    """One pass of the UNet with and without caption, as guidance takes it, then decoding: both halves of `draw`, which like it are
    not under autocast. Returns the operations of the UNet's pass for one picture."""
    at_once = pictures_at_once(run.data.resolution, len(run.evaluation.prompts) or GRID_PROMPTS)
    with components.awake():
        batch = setup.batch([0] * at_once * 2, 0)
        if "captions" in batch:
            batch |= components.encode_text(batch["captions"])
        latents = torch.zeros_like(batch["latents"])
        with counting_flops() as counter:
            Denoiser(components, False)(latents, torch.zeros(len(latents), dtype=torch.long), batch)
    flops = counter.get_total_flops() / len(latents)
    latents = latents[:at_once].clone()
    del batch
    with components.awake("unet", "vae"):
        pictures = components.decode_latents(latents, run.evaluation.vae_tiling)
        (pictures * 0.5 + 0.5).clamp(0, 1)
    return flops
