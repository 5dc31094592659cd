"""What each lever of speed and memory does alone: a step with it beside a step without it, in turns, in one process.

    python experiments/benchmarks/levers.py [--bases "sdxl lora" "sd15 whole"] [--levers bf16 "channels last"]
    python experiments/benchmarks/levers.py --levers compile --bases "sdxl lora" "sdxl whole" "sd15 lora" "sd15 whole"

On a GPU the layouts of SD1.5 at 512 and SDXL at 1024 with random weights, otherwise the tiny models at 64. Both twins begin with the same
weights and take the same steps, so their losses can be compared. A ratio is the median over the rounds, with the least and the most
beside it, of seconds by the clock and, on a CPU, of processor time. Memory is what UNet, optimizer and average hold, and what the largest
moment of a step adds: of tensors, by torch's allocator on a GPU, by `planning.ledger` on a CPU, which cannot see into compiled blocks.
Left out on a CPU, unless asked for by name: `compile`, whose compiler takes minutes.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from gpu_speed import build_base, encode_filled
from torch import Tensor

from t2ilib.config import ConfigError, RunConfig
from t2ilib.memory import MIB
from t2ilib.models.load import choose_device
from t2ilib.planning.ledger import Ledger
from t2ilib.runfile import build_run, merge
from t2ilib.training.compute import computing, require_possible
from t2ilib.training.loop import build_accelerator
from t2ilib.training.setups import checkpoint_gradients, learn_to_denoise, needed_in_steps, trained_modules
from t2ilib.training.state import TrainState
from t2ilib.training.step import take_gradients

Sections = Mapping[str, Any]

LORA: Sections = {"adapter": {"rank": 8, "alpha": 8.0}}
WHOLE: Sections = {"adapter": None, "training": {"trains": "unet"}}
ON_GPU: dict[str, Sections] = {
    "sdxl lora": merge(LORA, {"model": {"base": "sdxl"}, "data": {"resolution": 1024}, "training": {"batch_size": 2}}),
    "sd15 whole": merge(WHOLE, {"model": {"base": "sd15"}, "data": {"resolution": 512}, "training": {"batch_size": 8}}),
}
ON_CPU: dict[str, Sections] = {
    f"{family} {kind}": merge(trained, {"model": {"base": f"tiny-{family}"}, "training": {"batch_size": 4}})
    for family in ("sdxl", "sd15")
    for kind, trained in (("lora", LORA), ("whole", WHOLE))
}
USUAL = ("sdxl lora", "sd15 whole")


@dataclass(frozen=True)
class Lever:
    """`sections`: what it sets; `beside`: what both twins have; `on`: the device it is for, None for any; `whole`: whether it is about
    training a whole UNet; `pull`: what it does to the twin that has it instead."""

    sections: Sections = field(default_factory=dict)
    beside: Sections = field(default_factory=dict)
    on: str | None = None
    whole: bool = False
    pull: Callable[["Twin"], None] = lambda twin: None


def unfuse(twin: "Twin") -> None:
    for group in twin.state.raw_optimizer.param_groups:
        group["fused"] = False


FLOAT32 = {"model": {"dtype": "float32"}, "training": {"mixed_precision": "no"}}
LEVERS: dict[str, Lever] = {
    "attention math": Lever({"compute": {"attention": "math"}}),
    "attention flash": Lever({"compute": {"attention": "flash"}}),
    "attention xformers": Lever({"compute": {"attention": "xformers"}}),
    "channels last": Lever({"compute": {"channels_last": True}}),
    "bf16": Lever({"training": {"mixed_precision": "bf16"}}, FLOAT32),
    "fp16": Lever({"training": {"mixed_precision": "fp16"}}, FLOAT32, "cuda"),
    "tf32": Lever({"compute": {"tf32": True}}, FLOAT32, "cuda"),
    "cudnn benchmark": Lever({"compute": {"cudnn_benchmark": True}}, on="cuda"),
    "AdamW not fused": Lever(pull=unfuse),
    "8-bit AdamW": Lever({"optimizer": {"name": "adamw8bit"}}),
    "checkpointing": Lever({"training": {"gradient_checkpointing": True}}),
    "activations on the host": Lever({"compute": {"offload": ["activations"]}}, on="cuda"),
    "average on the host": Lever({"compute": {"offload": ["average"]}}, {"training": {"ema_horizon": 100}}, "cuda", True),
    "compile": Lever({"compute": {"compile": True}}),
}  # fmt: skip


class Twin:
    """A model that trains as `sections` say."""

    def __init__(self, sections: Sections):
        self.run: RunConfig = build_run(
            merge({"training": {"steps": 1000}, "optimizer": {"learning_rate": 1e-5}}, sections)
        )
        self.device = choose_device()
        self.accelerator = build_accelerator(self.run)
        require_possible(self.run, self.accelerator)
        before = allocated(self.device)
        components = build_base(self.run, self.device)
        components.park(needed_in_steps(self.run, components))
        encoded = encode_filled(self.run, components)
        modules = trained_modules(self.run, components)
        if self.run.training.gradient_checkpointing:
            checkpoint_gradients(components, modules)
        self.setup = learn_to_denoise(self.run, components, modules, encoded, self.device)
        self.state = TrainState(self.run, self.setup, self.accelerator, "")
        self.losses: list[float] = []
        self.warm_up_seconds, self.rounds = self.take(1)[0], []
        self.holds = allocated(self.device) - before if self.device.type == "cuda" else held_by(self)

    def step(self, setup: Any) -> None:
        ids, number = list(range(self.run.training.batch_size)), len(self.losses)
        losses, _ = take_gradients(
            self.run, setup, self.state.model, self.state.parameters, self.accelerator, number, ids
        )
        self.losses.append(float(losses.mean()))
        self.state.step()

    def take(self, count: int) -> tuple[float, float]:
        """So many steps: seconds of one, by the clock and of the processor."""
        with computing(self.run, self.setup, self.accelerator) as setup:
            synchronize(self.device)
            clock, processor = time.perf_counter(), time.process_time()
            for _ in range(count):
                self.step(setup)
            synchronize(self.device)
            return (time.perf_counter() - clock) / count, (time.process_time() - processor) / count

    def peak_mib(self) -> float:
        """What it holds, and what the largest moment of one more step adds."""
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.take(1)
            return (self.holds + torch.cuda.max_memory_allocated() - before) / MIB
        ledger = Ledger()
        with computing(self.run, self.setup, self.accelerator) as setup, ledger.measuring():
            self.step(setup)
        return (self.holds + ledger.most) / MIB


def held_by(twin: Twin) -> int:
    """Bytes of UNet, optimizer and average."""
    state = twin.state.raw_optimizer.state.values()
    moments = [value for entries in state for value in entries.values() if isinstance(value, Tensor)]
    average = twin.state.ema.shadow_params if twin.state.ema is not None else []
    unet = twin.setup.components.unet
    return sum(tensor.nbytes for tensor in chain(unet.parameters(), unet.buffers(), moments, average))


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def compare(name: str, base: Sections, rounds: int, steps: int) -> str:
    """One row: time, memory and losses of the lever `name` over `base`."""
    from torch._dynamo.utils import counters

    lever = LEVERS[name]
    try:
        ours = Twin(merge(base, lever.beside, lever.sections))
    except ConfigError as error:
        return f"not here: {str(error)[:150]}"
    lever.pull(ours)
    plain = Twin(merge(base, lever.beside))
    graphs = counters["stats"]["unique_graphs"]  # after the first step
    ratios = []
    for _ in range(rounds):
        pairs = zip(ours.take(steps), plain.take(steps), strict=True)
        ratios.append([(mine, others) for mine, others in pairs])
    found = [[mine / others for mine, others in by] for by in zip(*ratios, strict=True)]
    clock = f"{1e3 * statistics.median(by[0][1] for by in ratios):8.1f} ms{told(found[0])}"
    clock += told(found[1]) if ours.device.type == "cpu" else ""
    apart = max(abs(a - b) / b for a, b in zip(ours.losses, plain.losses, strict=True))
    notes = f"  losses {apart:.0e} apart in {len(plain.losses)} steps"
    if ours.run.compute.compile:
        notes += (
            f", first step {ours.warm_up_seconds:.0f} s, then {counters['stats']['unique_graphs'] - graphs} graphs more"
        )
        if ours.device.type == "cpu":
            return f"{clock}{'':22}{notes}"
    before, after = plain.peak_mib(), ours.peak_mib()
    return f"{clock}{before:8.0f} MiB {after / before:8.2f} {notes}"


def told(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):8.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def main() -> None:
    device = choose_device().type
    bases = ON_GPU if device == "cuda" else ON_CPU
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bases", nargs="+", choices=bases, default=USUAL)
    parser.add_argument("--levers", nargs="+", choices=LEVERS, help="without it all, but on a CPU compile")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=5, help="of a round")
    arguments = parser.parse_args()
    torch.set_num_threads(1) if device == "cpu" else None
    processor = "  by processor time" if device == "cpu" else ""
    print(f"{'':24}{'a step without':>14}  with, by the clock{processor}  memory without, with", flush=True)
    for base in arguments.bases:
        print(base, flush=True)
        for name in arguments.levers or [name for name in LEVERS if device == "cuda" or name != "compile"]:
            lever = LEVERS[name]
            if lever.on in (None, device) and (base.endswith("whole") or not lever.whole):
                print(f"  {name:22}{compare(name, bases[base], arguments.rounds, arguments.steps)}", flush=True)


if __name__ == "__main__":
    main()
