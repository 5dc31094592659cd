"""What adapters cost: peft's modules and the fused ones side by side, and whole runs beside diffusers' own SDXL LoRA script.

    python experiments/benchmarks/adapters.py layers [--base tiny-sdxl] [--batch 8] [--rounds 15]
    python experiments/benchmarks/adapters.py launches [--layout sdxl]
    python experiments/benchmarks/adapters.py script [--rounds 3] [--steps 200]

`layers`: steps of the loop on the tiny SDXL, for each quantization of the base and each kind of adapter; the two take turns in every
round, and what is shown of time is the median of the rounds' ratios. Memory: of activations at the peak of a step, counted by
`t2ilib plan`'s trace. `launches`: operations that do work, on a layout's shapes alone, as torch's profiler counts them (views,
allocations and what only calls others left out): on a GPU each is a launch or more. `script`: 200 steps as processes of their own, with
nothing encoded before, in turns; see `sdxl_lora_script.py`. Where other work shares the processors, read processor time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from t2ilib.config import RunConfig
from t2ilib.memory import MIB
from t2ilib.models.files.layouts import build_layout
from t2ilib.models.files.locate import locate
from t2ilib.models.load import load_base
from t2ilib.planning.blank import encode_blank
from t2ilib.planning.ledger import materialize
from t2ilib.planning.trace import plan_memory
from t2ilib.runfile import build_run
from t2ilib.shapes import world
from t2ilib.training.loop import build_accelerator
from t2ilib.training.setups import learn_to_denoise, trained_modules
from t2ilib.training.state import TrainState
from t2ilib.training.step import take_gradients

KINDS = ("lora", "dora")
QUANTIZATIONS = ("none", "nf4", "int8")
IDLE = {
    f"aten::{name}"
    for name in (
        "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "lift_fresh", "new_empty", "new_empty_strided",
        "resize_", "result_type", "set_", "split", "split_with_sizes", "unbind", "unfold", "view", "_reshape_alias", "_unsafe_view",
        "expand", "permute", "t", "transpose", "unsqueeze", "squeeze", "slice", "select", "narrow", "chunk", "is_nonzero", "item",
        "_local_scalar_dense", "view_as", "real", "to", "diagonal",
    )
}  # fmt: skip
"""Operations that move no numbers."""


def run_of(base: str, quantization: str, kind: str, fused: bool, batch: int) -> RunConfig:
    return build_run(
        {
            "model": {"base": base, "quantization": quantization},
            "adapter": {"kind": kind, "rank": 8},
            "training": {"batch_size": batch, "steps": 10_000},
            "compute": {"fused_adapters": fused},
        }
    )


def stepper(run: RunConfig) -> Callable[[int], None]:
    """A step of the loop, from its batch to its optimizer, on pictures and captions of random numbers."""
    accelerator = build_accelerator(run)
    components = load_base(run.model, accelerator.device)
    modules = trained_modules(run, components)
    components.unet.train()
    with torch.no_grad():
        encoded = encode_blank(run, components)
    for tensor in (*encoded.latents.held.values(), *encoded.text.held.values()):
        tensor.normal_(generator=torch.Generator().manual_seed(0))
    setup = learn_to_denoise(run, components, modules, encoded, accelerator.device)
    state = TrainState(run, setup, accelerator, "")

    def step(number: int) -> None:
        ids = list(range(run.training.batch_size))
        losses, norm = take_gradients(run, setup, state.model, state.parameters, accelerator, number, ids)
        float(losses.mean()), float(norm)
        state.step()

    return step


def processor_seconds(work: Callable[[], None]) -> tuple[float, float]:
    """By the clock, and of processors."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - processor


def operations(work: Callable[[], None]) -> int:
    """How many operations that do work there are in it."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
    events = [event for event in profiler.events() if event.name.startswith(("aten::", "bitsandbytes::"))]
    calling = {id(event.cpu_parent) for event in events}
    return sum(id(event) not in calling and event.name not in IDLE for event in events)


def layers(base: str, batch: int, rounds: int) -> None:
    print(
        f"{base}, batch {batch}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}; peft's modules, fused, ratio"
    )
    print(
        f"{'base':>6}{'adapter':>9}{'ms, processor':>24}{'by the clock':>14}{'operations':>22}{'activations, MiB':>26}"
    )
    milliseconds = {}
    for quantization in QUANTIZATIONS:
        for kind in KINDS:
            runs = [run_of(base, quantization, kind, fused, batch) for fused in (False, True)]
            steps = [stepper(run) for run in runs]
            for step in steps:
                step(0), step(1)
            counts = [operations(partial(step, 2)) for step in steps]
            taken: list[list[tuple[float, float]]] = [[], []]
            for number in range(rounds):
                for i in (0, 1) if number % 2 else (1, 0):
                    taken[i].append(processor_seconds(partial(steps[i], 3 + number)))
            clock, processor = (
                statistics.median(before[n] / after[n] for before, after in zip(*taken, strict=True)) for n in (0, 1)
            )
            ms = [1e3 * statistics.median(part for _, part in each) for each in taken]
            milliseconds[quantization, kind] = ms
            held = [plan_memory(run, "cpu").phases["training"]["activations"] / MIB for run in runs]
            print(
                f"{quantization:>6}{kind:>9}{ms[0]:>9.1f}{ms[1]:>8.1f}{processor:>7.2f}{clock:>14.2f}"
                f"{counts[0]:>9,}{counts[1]:>7,}{counts[0] / counts[1]:>6.2f}{held[0]:>11.1f}{held[1]:>9.1f}{held[0] / held[1]:>6.2f}",
                flush=True,
            )
    for quantization in QUANTIZATIONS:
        before, after = (milliseconds[quantization, "dora"][i] / milliseconds[quantization, "lora"][i] for i in (0, 1))
        print(f"{quantization:>6}: a DoRA's step is {before:.2f} times a LoRA's by peft, {after:.2f} fused")


def launches(layout: str, batch: int) -> None:
    """Counted on fake tensors, of which nothing is computed."""
    print(f"{layout}, batch {batch}: operations of the UNet's forward and backward pass")
    for kind in ("none", *KINDS):
        found = []
        for fused in (False, True):
            components = build_layout(layout, torch.float32, "meta")
            with torch.device("meta"):
                if kind != "none":
                    trained_modules(run_of(layout, "none", kind, fused, batch), components)
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            materialize(components.unet, mode)
            with mode:
                found.append(operations(partial(there_and_back, components.unet.train(), batch)))
        print(f"{kind:>6}: {found[0]:,}" + (f" by peft, {found[1]:,} fused" if kind != "none" else ""), flush=True)


def there_and_back(unet: nn.Module, batch: int) -> None:
    """A forward and backward pass; without an adapter the gradient is that of the latents."""
    config, adapted = unet.config, any(parameter.requires_grad for parameter in unet.parameters())
    latents = torch.randn(batch, 4, config.sample_size, config.sample_size, requires_grad=not adapted)
    added = {"time_ids": torch.randn(batch, 6)}
    if config.addition_embed_type:
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added["text_embeds"] = torch.randn(batch, width)
    hidden = torch.randn(batch, 77, config.cross_attention_dim)
    unet(latents, torch.zeros(batch), hidden, added_cond_kwargs=added).sample.square().mean().backward()


TRAIN = """
import json, sys
from t2ilib.runfile import build_run
from t2ilib.training.loop import train

print(json.dumps(train(build_run(json.loads(sys.argv[1]))).metrics))
"""


def ours(folder: Path, pictures: Path, steps: int, fused: bool) -> list[str]:
    settings = {
        "output": str(folder / "run"),
        "adapter": {"rank": 8, "alpha": 8.0, "init": "gaussian"},
        "data": {"path": str(pictures), "validation_share": 0.01, "cache_path": str(folder / "encoded")},
        "training": {"steps": steps, "batch_size": 8, "checkpoint_every": steps},
        "compute": {"fused_adapters": fused},
        "evaluation": {"validate_every": 0, "sample_every": 0, "validation_pictures": 1, "validation_timesteps": 1,
                       "prompts": ["a red heart"], "num_inference_steps": 1, "guidance_scale": 1.0},
    }  # fmt: skip
    return [sys.executable, "-c", TRAIN, json.dumps(settings)]


def script(rounds: int, steps: int, count: int) -> None:
    """Whole processes, one after the other; of each the fastest round."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    with tempfile.TemporaryDirectory() as place:
        pictures = Path(place) / "pictures"
        world.write_folder(pictures, world.mixed_scenes(count, "train", 0, ("heart",)), 0)
        beside = Path(__file__).with_name("sdxl_lora_script.py")
        for number in range(rounds):
            folder = Path(place) / str(number)
            commands = {
                "diffusers": [sys.executable, beside, locate("tiny-sdxl"), pictures, "--steps", str(steps)],
                "peft": ours(folder / "peft", pictures, steps, fused=False),
                "fused": ours(folder / "fused", pictures, steps, fused=True),
            }
            for name in list(commands)[:: 1 if number % 2 else -1]:
                before, began = os.times(), time.perf_counter()
                done = subprocess.run(commands[name], capture_output=True, text=True, check=True, cwd=place)
                clock, after = time.perf_counter() - began, os.times()
                processor = after.children_user + after.children_system - before.children_user - before.children_system
                speed = json.loads(done.stdout.splitlines()[-1])["steps_per_second"]
                found.setdefault(name, []).append((speed, clock, processor))
                print(
                    f"{name:>10}: {speed:.1f} steps/s, {clock:.1f} s as a whole, {processor:.1f} of processors",
                    flush=True,
                )
    best = {
        name: (max(s for s, _, _ in each), *(min(r[i] for r in each) for i in (1, 2))) for name, each in found.items()
    }
    speed, clock, processor = best["diffusers"]
    for name, (own, whole, worked) in best.items():
        print(
            f"{name:>10}: {own / speed:.2f} times as fast in the loop, {clock / whole:.2f} as a whole, {processor / worked:.2f} of processors"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="what", required=True)
    part = kinds.add_parser("layers")
    part.add_argument("--base", default="tiny-sdxl")
    part.add_argument("--batch", type=int, default=8)
    part.add_argument("--rounds", type=int, default=15)
    part = kinds.add_parser("launches")
    part.add_argument("--layout", default="sdxl")
    part.add_argument("--batch", type=int, default=1)
    part = kinds.add_parser("script")
    part.add_argument("--rounds", type=int, default=3)
    part.add_argument("--steps", type=int, default=200)
    part.add_argument("--count", type=int, default=64, help="Pictures.")
    chosen = vars(parser.parse_args())
    {"layers": layers, "launches": launches, "script": script}[chosen.pop("what")](**chosen)


if __name__ == "__main__":
    main()
