"""Rows about speed and memory: what a real layout takes while encoding, training and drawing, beside what was planned.

The weights are random, which costs what trained ones cost. A base is built once and serves all adapters and batch sizes; every
part of the work is the run's own: its encoding, its step, its drawing. Steps are timed with the two readings of the loop (loss
and norm) in them, and the median counts.
"""

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from gpu_background import Background
from gpu_record import Figures, NotHere, Row, tidy, told
from torch import nn

from t2ilib.config import RunConfig
from t2ilib.data.cache import CAPTIONS_AT_ONCE, EncodedDataset
from t2ilib.evaluation.sampling import draw
from t2ilib.memory import MIB, Peaks, pictures_at_once
from t2ilib.models.components import Components
from t2ilib.models.files.layouts import build_layout, is_layout
from t2ilib.models.load import choose_device, choose_dtype, load_base, quantize_parts
from t2ilib.planning.blank import BlankTokenizer, encode_blank
from t2ilib.planning.fit import available_bytes, needed_bytes
from t2ilib.planning.trace import MemoryPlan, plan_memory
from t2ilib.runfile import build_run, merge
from t2ilib.training.compute import computing, require_possible
from t2ilib.training.loop import build_accelerator
from t2ilib.training.methods import METHODS
from t2ilib.training.setups import (
    checkpoint_gradients,
    learn_to_denoise,
    needed_in_steps,
    trained_modules,
    trained_precision,
)
from t2ilib.training.state import TrainState
from t2ilib.training.step import take_gradients

KINDS = {("none", "lora"): "lora", ("nf4", "lora"): "qlora", ("none", "dora"): "dora", ("nf4", "dora"): "qdora"}
WARM_UP = 2
"""Steps that are not timed: kernels are chosen in the first, and it makes the optimizer's state."""
LEAST_TIMED = 3
SECONDS_TIMED = 5.0
PROMPTS = 4
SECTIONS = ("model", "adapter", "data", "objective", "optimizer", "training", "compute", "evaluation")
"""What of a run decides its speed and memory."""
PREFERENCES = {"data": {"source": "preferences", "path": "pairs"}}
"""Whose pictures are drawn here, as all are: nothing is read from there."""
OBJECTIVES: dict[str, Mapping[str, Any]] = {
    "dpo": PREFERENCES | {"objective": {"preferences": {"loss": "dpo"}}},
    "mapo": PREFERENCES | {"objective": {"preferences": {"loss": "mapo"}}},
    "consistency": {"objective": {"snr_gamma": None, "consistency": {}}},
}
"""What is learned beside denoising -> sections of a run config."""


@dataclass(frozen=True)
class Sizes:
    """`layouts`: name -> side of a picture, and the seconds that a base, a row of training and one of drawing are expected to
    take; most important first."""

    layouts: Mapping[str, tuple[int, tuple[float, float, float]]]
    quantizations: tuple[str, ...] = ("nf4", "none")
    kinds: tuple[str, ...] = ("lora", "dora")
    batches: tuple[int, ...] = (1, 4)
    checkpointing: tuple[bool, ...] = (True, False)
    objectives: tuple[str, ...] = tuple(OBJECTIVES)
    steps: int = 10


REAL = Sizes({"sdxl": (1024, (25, 12, 6)), "sd15": (512, (12, 7, 4))})
TINY = Sizes({"tiny-sdxl": (64, (5, 5, 5)), "tiny-sd15": (64, (5, 5, 5))}, steps=3)
"""Where there is no GPU: nothing that it measures says anything but that it can be measured."""


class WordlessTokenizer(BlankTokenizer):
    """With what a pipeline asks of a tokenizer besides ids: which words a prompt has. None."""

    def tokenize(self, prompt: str) -> list[str]:
        return []


@dataclass
class Base:
    """A base as it lies on the device. `encoded`: pictures and captions to train on, `pairs`: such of two pictures, once a row asked for them;
    `kind`: which adapter is attached now."""

    components: Components
    encoded: EncodedDataset
    pairs: EncodedDataset | None = None
    kind: str | None = None
    modules: dict[str, nn.Module] = field(default_factory=dict)


class Speed:
    """Keeps one base at a time, and the plans that other cores trace meanwhile."""

    group = "speed"

    def __init__(self, background: Background, sizes: Sizes):
        self.sizes, self.background = sizes, background
        self.device = choose_device()
        self.of: tuple[str, str, int] | None = None
        self.base: Base | None = None
        self.broken: set[tuple[str, str, int]] = set()
        self.plans: dict[str, Callable[[], MemoryPlan]] = {}

    def run(
        self, layout: str, quantization: str, kind: str, batch: int, checkpointing: bool, objective: str | None = None
    ) -> RunConfig:
        side = self.sizes.layouts[layout][0]
        sections = {
            "model": {"base": layout, "quantization": quantization},
            "adapter": {"kind": kind, "rank": 16, "alpha": 16.0},
            "data": {"resolution": side},
            "training": {"batch_size": batch, "gradient_checkpointing": checkpointing, "steps": 1000},
            "evaluation": {
                "prompts": [f"picture {i}" for i in range(pictures_at_once(side, PROMPTS))],
                "num_inference_steps": 2,
                "guidance_scale": 5.0,
            },
        }
        return build_run(merge(sections, OBJECTIVES[objective]) if objective else sections)

    def begin(self, run: RunConfig) -> None:
        """Has the run's memory planned."""
        key = key_of(run)
        if key not in self.plans:
            self.plans[key] = self.background.submit(plan_memory, run, self.device.type)

    def plan(self, run: RunConfig, figures: Figures) -> MemoryPlan | None:
        """A plan that fails fails the row, but not before that has measured what it can."""
        try:
            return self.plans[key_of(run)]()
        except Exception as error:
            figures.exceeded.append(f"no plan: {told(error)[-1]}")
            return None

    def ready(self, run: RunConfig) -> Base:
        """The base of `run`, encoded data included; whatever was there before is dropped first."""
        wanted = run.model.base, run.model.quantization, run.data.resolution
        if wanted in self.broken:
            raise NotHere("the base could not be built: see the row that failed first")
        if self.of != wanted or self.base is None:
            self.of, self.base = None, None
            tidy()
            self.broken.add(wanted)
            components = build_base(run, self.device)
            components.park(needed_in_steps(run, components))
            encoded = encode_filled(run, components)
            self.broken.remove(wanted)
            self.of, self.base = wanted, Base(components, encoded)
        return self.base

    def encoded(self, run: RunConfig) -> EncodedDataset:
        """What `run` is trained on."""
        base = self.ready(run)
        if not METHODS[run.objective.method].of_pairs:
            return base.encoded
        if base.pairs is None:
            base.pairs = encode_filled(run, base.components)
        return base.pairs

    def attached(self, run: RunConfig) -> Base:
        """The same with the adapter of `run`, in place of another one; without one the whole UNet is trained."""
        base = self.ready(run)
        unet, kind = base.components.unet, run.adapter.kind if run.adapter else run.trains
        if base.kind != kind:
            if base.kind is not None:
                base.kind, base.modules = None, {}
                unet.unload_lora()
                unet.requires_grad_(False).eval()
                tidy()
            self.base = None  # half an adapter must not stay, should this fail
            base.modules = trained_modules(run, base.components)
            self.base, base.kind = base, kind
        unet.disable_gradient_checkpointing()
        if run.training.gradient_checkpointing:
            checkpoint_gradients(base.components, base.modules)
        return base

    def encode(self, run: RunConfig, figures: Figures) -> None:
        """A picture as large as they are, and captions; the UNet waits on the host meanwhile."""
        started = time.perf_counter()
        base = self.ready(run)
        self.synchronize()
        figures["build_seconds"] = time.perf_counter() - started
        components = base.components
        measured = Measured("encoding", self.plan(run, figures), figures, self.device)
        with torch.no_grad():
            tidy()
            with measured:
                seconds = self.timed(lambda: encode_blank(run, components))
        figures |= {"pictures": 1, "captions": CAPTIONS_AT_ONCE, "encoding_seconds": seconds}

    def train(self, run: RunConfig, figures: Figures) -> None:
        self.ready(run)
        plan = self.plan(run, figures)
        self.require_room(plan)
        base, encoded = self.attached(run), self.encoded(run)
        tidy()
        accelerator = build_accelerator(run)
        require_possible(run, accelerator)
        with contextlib.ExitStack() as scope, Measured("training", plan, figures, self.device):
            setup = learn_to_denoise(run, base.components, base.modules, encoded, self.device)
            state = TrainState(run, setup, accelerator, "")
            setup = scope.enter_context(computing(run, setup, accelerator))
            figures["trained_parameters"] = sum(parameter.numel() for parameter in state.parameters)

            def step(number: int) -> None:
                ids = list(range(run.training.batch_size))
                losses, norm = take_gradients(run, setup, state.model, state.parameters, accelerator, number, ids)
                figures["loss"], figures["grad_norm"] = float(losses.mean()), float(norm)
                state.step()

            for number in range(WARM_UP):
                step(number)
            seconds: list[float] = []
            while len(seconds) < self.sizes.steps and (sum(seconds) < SECONDS_TIMED or len(seconds) < LEAST_TIMED):
                seconds.append(self.timed(partial(step, WARM_UP + len(seconds))))
        median = statistics.median(seconds)
        figures |= {
            "steps_per_second": 1 / median,
            "pictures_per_second": run.training.batch_size / median,
            "step_seconds": {"least": min(seconds), "median": median, "most": max(seconds), "steps": len(seconds)},
        }
        if not math.isfinite(figures["loss"] + figures["grad_norm"]):
            raise ArithmeticError(f"the loss is {figures['loss']} and the norm of the gradients {figures['grad_norm']}")

    def draw(self, run: RunConfig, figures: Figures) -> None:
        """The pipeline, with guidance, then decoding; adapters as they are after the rows before."""
        base = self.attached(run)
        prompts, steps = list(run.evaluation.prompts), run.evaluation.num_inference_steps
        tidy()
        with Measured("drawing", self.plan(run, figures), figures, self.device):
            seconds = self.timed(lambda: draw(base.components, prompts, run.evaluation, resolution=run.data.resolution))
        figures |= {"pictures": len(prompts), "inference_steps": steps, "drawing_seconds": seconds}

    def require_room(self, plan: MemoryPlan | None) -> None:
        """Raises NotHere for what is planned to need more than there is: it would only fail, and take what others need."""
        needed = needed_bytes(plan) / MIB if plan else 0.0
        held = torch.cuda.memory_allocated() / MIB if self.device.type == "cuda" else 0.0
        room = available_bytes(self.device) / MIB + held
        if needed > room:
            raise NotHere(f"memory: {needed:,.0f} MiB planned, {room:,.0f} MiB there")

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def timed(self, work: Callable[[], Any]) -> float:
        """Seconds, with what it left the device to do."""
        self.synchronize()
        started = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - started

    def rows(self) -> list[Row]:
        rows: list[Row] = []
        for layout, (side, expected) in self.sizes.layouts.items():
            for quantization in self.sizes.quantizations:
                rows += self.rows_of(f"{layout} {side}", layout, quantization, *expected)
        return rows

    def rows_of(
        self, label: str, layout: str, quantization: str, building: float, training: float, drawing: float
    ) -> list[Row]:
        """Of one base: encoding; then for each kind of adapter its training and its drawing."""
        first = self.run(layout, quantization, self.sizes.kinds[0], max(self.sizes.batches), True)
        held = "" if quantization == "none" else f" {quantization}"
        rows = [self.row(f"{label}{held}: encode", building, self.encode, first, "encoding")]
        for kind in self.sizes.kinds:
            name = f"{label} {KINDS[quantization, kind]}"
            settings = [(*pair, None) for pair in itertools.product(self.sizes.batches, self.sizes.checkpointing)]
            if (quantization, kind) == (self.sizes.quantizations[0], self.sizes.kinds[0]):
                settings += [(*settings[0][:2], objective) for objective in self.sizes.objectives]
            for batch, checkpointing, objective in settings:
                title = (
                    f"{name} batch {batch}{', checkpointing' * checkpointing}{f', {objective}' if objective else ''}"
                )
                run = self.run(layout, quantization, kind, batch, checkpointing, objective)
                rows.append(self.row(title, training, self.train, run, "training"))
            rows.append(self.row(f"{name}: draw", drawing, self.draw, run, "drawing"))
        return rows

    def row(
        self, name: str, expected: float, take: Callable[[RunConfig, Figures], None], run: RunConfig, phase: str
    ) -> Row:
        shown = (
            "steps_per_second",
            "pictures_per_second",
            f"{phase}_mib",
            f"{phase}_planned_mib",
            "measured_to_planned",
        )
        settings = run.model_dump(mode="json", include=set(SECTIONS))
        return Row(self.group, name, expected, partial(take, run), settings, shown, partial(self.begin, run))


class Measured:
    """A phase's peak in this scope, beside the planned one, and what of the device nothing planned speaks of."""

    def __init__(self, phase: str, plan: MemoryPlan | None, figures: Figures, device: torch.device):
        self.phase, self.plan, self.figures, self.device = phase, plan, figures, device
        self.peaks = Peaks()

    def __enter__(self) -> None:
        self.peaks.enter(self.phase)

    def __exit__(self, *_: Any) -> None:
        self.peaks.leave()
        phase, found = self.phase, self.peaks.found[self.phase]
        self.figures["peak_process_mib"] = found["peak_process_mib"]
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info()
            self.figures |= {
                f"{phase}_mib": found["peak_device_mib"],
                "reserved_mib": torch.cuda.max_memory_reserved() / MIB,  # with what the allocator could not reuse
                "outside_the_allocator_mib": (total - free - torch.cuda.memory_reserved()) / MIB,  # the CUDA context
            }
        if self.plan is not None:
            planned = self.plan.bytes_of(phase) / MIB
            self.figures |= {
                f"{phase}_planned_mib": planned,
                f"{phase}_planned_by_category_mib": {k: v / MIB for k, v in self.plan.phases[phase].items() if v},
                "needed_planned_mib": needed_bytes(self.plan) / MIB,
            }
            if f"{phase}_mib" in self.figures:
                self.figures["measured_to_planned"] = self.figures[f"{phase}_mib"] / planned


def key_of(run: RunConfig) -> str:
    return run.model_dump_json(include=set(SECTIONS))


def build_base(run: RunConfig, device: torch.device) -> Components:
    """The layout with random weights, made on the device; or, where `model.base` is none, the model of that name."""
    if not is_layout(run.model.base):
        return load_base(trained_precision(run), device)
    torch.manual_seed(run.seed)
    dtype = choose_dtype(trained_precision(run).dtype, device)
    components = build_layout(run.model.base, dtype, str(device))
    components.vae.float()
    components.tokenizers = {
        name.replace("text_encoder", "tokenizer"): WordlessTokenizer(encoder)
        for name, encoder in components.text_encoders.items()
    }
    if run.model.quantization != "none":
        quantize_parts(components, run.model, dtype, device)
    return components


def encode_filled(run: RunConfig, components: Components) -> EncodedDataset:
    """As `encode_blank`, with numbers in place of the zeros that it keeps: zeros can be faster to multiply than pictures are."""
    with torch.no_grad():
        encoded = encode_blank(run, components)
    generator = torch.Generator().manual_seed(0)
    for tensor in (*encoded.latents.held.values(), *encoded.text.held.values()):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return encoded
