"""Rows about correctness: what a GPU trains is what a CPU trains, what is resumed is what was not interrupted, and so on.

Every case is a small real `train()` of the tiny SDXL, here and in a process that sees no GPU, there always in float32. Order,
noise and adapters come from the CPU's generators, so the two differ by rounding alone, and a tolerance says by how much they may.
TF32 is off meanwhile, or float32 would not be float32.
"""

import contextlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_background import Background, in_fresh_process
from gpu_compare import apart, bytes_on, compare, last_state, learned, off, spread, tensors_at
from gpu_record import Figures, NotHere, Row
from torch import nn

from t2ilib.adapters.export import export_adapter
from t2ilib.adapters.load import UNPROVEN, adapter_file
from t2ilib.config import ModelConfig
from t2ilib.models.load import choose_device, load_base
from t2ilib.runfile import build_run, merge
from t2ilib.training.checkpoint import list_checkpoints
from t2ilib.training.loop import train

COMMON: dict[str, Any] = {
    "model": {"base": "tiny-sdxl", "dtype": "float32"},
    "adapter": {"rank": 8, "alpha": 8.0},
    "data": {"source": "shapes"},
    "shapes": {"scenes": ["heart"], "num_pictures": 8, "checked_prompts": 0},
    "training": {"steps": 4, "batch_size": 4, "mixed_precision": "no"},
    "evaluation": {
        "prompts": ["a red heart"],
        "num_inference_steps": 2,
        "validate_every": 0,
        "validation_timesteps": 2,
        "validation_pictures": 4,
        "sample_every": 0,
    },
}
FLOAT32 = {"model": {"dtype": "float32"}, "training": {"mixed_precision": "no"}}
"""How the CPU trains, whatever the precision here."""
AS_USERS_DO = {"model": {"dtype": "auto"}, "training": {"mixed_precision": "auto"}}
"""bfloat16 where the GPU has it."""


@dataclass(frozen=True)
class Case:
    """`run`: what it sets; `losses`, `weights`: how far these may be off (`compare`)."""

    losses: float
    weights: float
    run: Mapping[str, Any] = field(default_factory=dict)


CASES: dict[str, Case] = {
    "lora": Case(1e-4, 5e-3),
    "as users do": Case(2e-2, 0.3, AS_USERS_DO),
    "nf4": Case(2e-3, 5e-2, {"model": {"quantization": "nf4"}}),
    "dora": Case(1e-4, 5e-3, {"adapter": {"kind": "dora"}}),
    "dora over nf4, all layers": Case(
        2e-3,
        5e-2,
        {
            "model": {"quantization": "nf4", "quantize_convolutions": True},
            "adapter": {"kind": "dora", "targets": "many", "text_encoder_targets": "many"},
            "training": {"gradient_checkpointing": True, "accumulation": 2},
        },
    ),
    "int8": Case(2e-2, 0.3, {"model": {"quantization": "int8"}, "training": {"mixed_precision": "bf16"}}),
    "fp16 with a loss scale": Case(5e-3, 0.1, {"model": {"dtype": "float16"}, "training": {"mixed_precision": "fp16"}}),
    "adamw8bit": Case(1e-4, 2e-2, {"adapter": {"rank": 64}, "optimizer": {"name": "adamw8bit"}}),
    "prodigy": Case(1e-4, 5e-3, {"optimizer": {"name": "prodigy"}}),
}
"""Tolerances are some 100 times what relative errors of 1e-6 in all weights of the base do to the same runs on a CPU (losses 8e-6, B
5e-5; 6e-4 under adamw8bit), for NF4 more, as a weight between two codes may fall to either; and 3 to 6 times what bfloat16 does (losses
3e-3, B 0.1)."""
SAME_SEED = 0.1
"""How far B may be off between two runs of one seed, in bfloat16 and with kernels that add up in any order."""
RESUMED = ("adamw8bit", "fp16 with a loss scale", "prodigy")


def train_run(settings: Mapping[str, Any]) -> str:
    """Trains it in this process, without a word; returns the type of the device."""
    with contextlib.redirect_stdout(io.StringIO()):
        return train(build_run(settings)).components.device.type


@contextlib.contextmanager
def whole_float32() -> Iterator[None]:
    """Without TF32, which is what convolutions are computed in otherwise: it has 10 bits of mantissa."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


class Correctness:
    """Runs that later rows look at again, in a scratch folder, and what the CPU gives for them."""

    def __init__(self, scratch: Path, background: Background, common: Mapping[str, Any] = COMMON):
        self.scratch, self.background, self.common = scratch, background, common
        self.steps = common["training"]["steps"]
        self.device = choose_device()
        self.twins: dict[str, Callable[[], str]] = {}

    def settings(self, name: str, kind: str, *changes: Mapping[str, Any]) -> dict[str, Any]:
        """The run config of a case, into a folder for this `kind` of run: `changes` over its own, section by section."""
        return merge(self.common, CASES[name].run, *changes, {"output": str(self.output(name, kind))})

    def output(self, name: str, kind: str) -> Path:
        return self.scratch / f"{name.replace(' ', '-').replace(',', '')}-{kind}"

    def begin(self, name: str) -> None:
        """Has the CPU train the same."""
        self.twins[name] = self.background.submit(train_run, self.settings(name, "cpu", FLOAT32))

    def finished(self, name: str) -> Path:
        """The folder of a case that has run on this device."""
        output = self.output(name, "here")
        if not (output / "adapter").is_dir():
            raise NotHere(f"the row {name} has not been trained")
        return output

    def train_both(self, name: str, figures: Figures) -> None:
        ours, settings = self.output(name, "here"), self.settings(name, "here")
        if self.device.type == "cpu" and settings["model"]["dtype"] == "float16":
            raise NotHere("float16 is trained on a GPU alone")
        with whole_float32():
            figures["device"] = train_run(settings)
        if (ours / "adapter" / UNPROVEN).exists():
            raise AssertionError(f"{adapter_file(ours)} is marked as unproven")
        figures["twin_device"] = self.twins[name]()
        compare(figures, ours, self.output(name, "cpu"), CASES[name].losses, CASES[name].weights)
        state = last_state(ours)
        if name == "adamw8bit":
            kinds = {str(tensor.dtype) for key, tensor in state.items() if key.startswith("optimizer/")}
            figures["moments"] = sorted(kinds)
            if "torch.uint8" not in kinds:
                raise AssertionError("no moment is kept in 8 bits")
        if name == "fp16 with a loss scale":
            meta = json.loads((list_checkpoints(ours / "checkpoints")[-1] / "meta.json").read_text())
            figures["loss_scale"] = meta["scaler"]["scale"]

    def resume(self, figures: Figures) -> None:
        """Half the steps, then the rest from the checkpoint, against the run that went straight on; both in this process."""
        for name in RESUMED:
            straight, resumed = self.finished(name), self.output(name, "resumed")
            with whole_float32():
                for steps in (half(self.steps), self.steps):
                    train_run(self.settings(name, "resumed", {"training": {"steps": steps}}))
            found = off(learned(last_state(resumed)), learned(last_state(straight)))
            figures.within(f"{name}: weights_off", found, CASES[name].weights)

    def same_seed(self, figures: Figures) -> None:
        """The same run twice, as users have it: how far apart kernels alone take two runs."""
        outputs = self.finished("as users do"), self.output("as users do", "again")
        with whole_float32():  # as the first time
            train_run(self.settings("as users do", "again"))
        figures |= spread(*outputs)
        figures.within("weights_off", off(*(learned(last_state(output)) for output in outputs)), SAME_SEED)

    def deterministic(self, figures: Figures) -> None:
        """`training.deterministic` in a fresh process: twice, and interrupted half way, must be the same to the bit."""
        kinds = ("once", "again", "resumed")
        settings = [self.settings("nf4", kind, *DETERMINISTIC) for kind in kinds]
        if self.device.type == "cuda":  # whose libraries must be asked before they are used for the first time
            in_fresh_process(train_the_same, settings)
        else:
            train_the_same(settings)
        for kind in kinds[1:]:
            for name, value in spread(self.output("nf4", kinds[0]), self.output("nf4", kind)).items():
                figures.within(f"{kind}: {name}", value, 0.0)

    def export(self, figures: Figures) -> None:
        """What is written here for other programs is what is written on a CPU."""
        for name, kind, options, most in EXPORTS:
            source = self.finished(name)
            label = " ".join((name, kind, *map(str, options.values())))
            ours, theirs = (self.scratch / f"{label.replace(' ', '-')}-{place}" for place in ("here", "cpu"))
            there = self.background.submit(export_run, source, theirs, kind, options)
            own, other = tensors_at(export_run(source, ours, kind, options)), tensors_at(there())
            if own.keys() != other.keys():
                raise AssertionError(f"{label}: other names, {sorted(own.keys() ^ other.keys())[:4]}")
            figures[f"{label}: dtypes"] = sorted({str(tensor.dtype) for tensor in own.values()})
            figures.within(f"{label}: off", max(apart(own[key], other[key]) for key in own), most)

    def parked(self, figures: Figures) -> None:
        """What waits on the host is there whole, before the first pass too, and gives the same when it is back."""
        for quantization in ("none", "nf4", "int8"):
            config = ModelConfig(base=self.common["model"]["base"], dtype="float32", quantization=quantization)
            components = load_base(config, self.device)
            with components.awake("vae"):
                resting = [components.unet, *components.text_encoders.values()]
                self.none_left(figures, f"{quantization}: MiB left before the first pass", resting)
            with torch.no_grad():
                before = components.encode_text(["a red heart"])
            components.park(())
            self.none_left(figures, f"{quantization}: MiB left when parked", components.parked)
            with components.awake(), torch.no_grad():
                after = components.encode_text(["a red heart"])
            figures.within(f"{quantization}: text off", max(apart(before[key], after[key]) for key in before), 0.0)
            self.none_left(figures, f"{quantization}: MiB left when parked again", components.parked)

    def none_left(self, figures: Figures, name: str, modules: list[nn.Module]) -> None:
        if self.device.type == "cuda":
            figures.within(name, sum(bytes_on(module, self.device) for module in modules) / 2**20, 0.0)

    def rows(self) -> list[Row]:
        def row(name: str, expected: float, take: Callable[[Figures], None], settings: Mapping, *shown: str) -> Row:
            return Row("correctness", name, expected, take, settings, shown)

        shown = ("loss_off", "grad_norm_off", "weights_off", "steps_skipped")
        cases = [
            replace(
                row(name, 30 if name == "lora" else 8, partial(self.train_both, name), case.run, *shown),
                begin=partial(self.begin, name),
            )
            for name, case in CASES.items()
        ]
        return [
            *cases,
            row("parked parts leave the device", 6, self.parked, {}),
            row("resumed", 15, self.resume, {}),
            row("same seed twice", 8, self.same_seed, AS_USERS_DO, "weights_off", "loss apart"),
            row("deterministic", 40, self.deterministic, merge(*DETERMINISTIC)),
            row("exported", 10, self.export, {}),
        ]


DETERMINISTIC = (
    AS_USERS_DO,
    {"adapter": {"dropout": 0.1}, "optimizer": {"name": "adamw8bit"}, "training": {"deterministic": True}},
)
EXPORTS: list[tuple[str, str, dict[str, Any], float]] = [
    ("lora", "kohya", {}, 0.0),
    ("lora", "peft", {}, 0.0),
    ("dora", "kohya", {"program": "comfyui", "dtype": "float32"}, 1e-5),
    ("dora", "kohya", {"program": "lycoris", "dtype": "float32"}, 1e-5),
]
"""Case, format, options, and how far a value may be off, relative to the largest of its tensor."""


def half(steps: int) -> int:
    """Where a run is interrupted: after two steps at least, as after one A has not moved, which its proof would not let pass."""
    return max(2, steps // 2)


def train_the_same(settings: list[Mapping[str, Any]]) -> None:
    """All of them, the last one in two halves."""
    before = torch.are_deterministic_algorithms_enabled()
    try:
        for number, values in enumerate(settings, 1):
            steps = values["training"]["steps"]
            for count in (half(steps), steps) if number == len(settings) else (steps,):
                train_run(merge(values, {"training": {"steps": count}}))
    finally:
        torch.use_deterministic_algorithms(before)


def export_run(source: Path, target: Path, kind: str, options: Mapping[str, Any]) -> Path:
    target = target.with_suffix(".safetensors") if kind == "kohya" else target
    return export_adapter(source, target, kind, **options)
