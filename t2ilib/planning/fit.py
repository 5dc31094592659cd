"""Does a planned run fit a card, and what is the cheapest change that makes it fit?

Every change is a `--set` override, and every run that is said to fit was traced with it: memory does not add up, since
what one change saves another may have saved already. `check_fit` is what the command line asks before anything is loaded.
"""

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from t2ilib.config import ConfigError, RunConfig
from t2ilib.data.manifest import load_listings
from t2ilib.memory import GIB, available_memory
from t2ilib.models.load import choose_device
from t2ilib.planning.bound import surely_fits
from t2ilib.planning.trace import MemoryPlan, plan_memory
from t2ilib.planning.unloaded import native_resolution
from t2ilib.runfile import build_run, load_run, override_values
from t2ilib.shapes import source as shapes

log = logging.getLogger(__name__)

CARDS_GB = (8, 11, 12, 15, 16, 24, 40, 80, 141)
"""Common memory sizes of GPUs: from the RTX 3060's 8 and 12 and the T4's 15 to the H200's 141. Their makers' GB are close to GiB."""

RESERVE_BYTES, RESERVE_SHARE = GIB // 2, 0.05
"""What a trace cannot see, and is assumed: half a GiB for the CUDA context with its libraries' kernels and workspaces, and a
twentieth of the peak for what the allocator cannot reuse. Checked against two published figures for SDXL at 1024, batch 1,
LoRA on an H100, 13.0 and with checkpointing 6.5 GiB: the step's traced 12.3 and 5.7 GiB become 13.4 and 6.5."""


def needed_bytes(plan: MemoryPlan) -> int:
    """The peak with the reserve; on a CPU nothing is reserved for a CUDA context."""
    return round(plan.peak_bytes * (1 + RESERVE_SHARE)) + (RESERVE_BYTES if plan.device_type == "cuda" else 0)


def eight_bit_optimizer(run: RunConfig) -> str | None:
    return "optimizer.name=adamw8bit" if run.optimizer.name == "adamw" else None


def split_batch(run: RunConfig) -> str | None:
    whole = run.training.batch_size
    return f"training.accumulation={whole}" if run.training.accumulation < whole else None


def checkpoint_activations(run: RunConfig) -> str | None:
    return None if run.training.gradient_checkpointing else "training.gradient_checkpointing=true"


def quantize_base(run: RunConfig) -> str | None:
    trains_base = run.trains not in ("adapter", "nothing")
    takes_from_base = run.adapter is not None and run.adapter.init in ("pissa", "olora")
    settled = trains_base or takes_from_base or run.model.quantization != "none"
    return None if settled else "model.quantization=nf4"


def quantize_convolutions(run: RunConfig) -> str | None:
    offered = run.model.quantization == "nf4" and not run.model.quantize_convolutions
    return "model.quantize_convolutions=true" if offered else None


def tile_the_vae(run: RunConfig) -> str | None:
    return None if run.evaluation.vae_tiling else "evaluation.vae_tiling=true"


CHANGES: dict[str, Callable[[RunConfig], str | None]] = {
    "no time, moments rounded to 8 bits": eight_bit_optimizer,
    "little time, the same gradient": split_batch,
    "some time in drawing, tones may differ from tile to tile": tile_the_vae,
    "1.7 times the time, the same gradient": checkpoint_activations,
    "some time, the base rounded to 4 bits": quantize_base,
    "some time, its convolutions rounded to 4 bits": quantize_convolutions,
}
"""What it costs -> the override, or None where there is nothing to change; cheapest first."""


@dataclass(frozen=True)
class Advice:
    """`fitting`: overrides that make the run fit, cheapest first, with their plans. `offered`: all that could be changed, and
    `least` the plan of the run with all of it, where that had to be looked at."""

    fitting: list[tuple[tuple[str, ...], MemoryPlan]]
    offered: tuple[str, ...]
    least: MemoryPlan


def advise(run: RunConfig, plan: MemoryPlan, available: float, most: int = 4) -> Advice:
    """Up to `most` ways of making `run` (whose `plan` needs too much) fit into `available` bytes: single changes, or if
    none is enough the smallest combination of them.

    Combinations are tried in the order of what their parts saved alone, so that few need be traced.
    """
    offered = (
        [override for change in CHANGES.values() if (override := change(run))] if plan.phases.get("training") else []
    )
    offered = offered or [override for override in [quantize_base(run)] if override]
    traced: dict[tuple[str, ...], MemoryPlan] = {(): plan}

    def fits(overrides: tuple[str, ...]) -> bool:
        if overrides not in traced:
            traced[overrides] = plan_memory(changed(run, overrides), plan.device_type)
        return needed_bytes(traced[overrides]) <= available

    found: list[tuple[str, ...]] = []
    for override in offered:
        if len(found) < most and fits((override,)):
            found.append((override,))
    everything = tuple(offered)
    if not found and fits(everything):
        found = [next(combination for combination in combinations(offered, traced) if fits(combination))]
    found = [smallest_split(run, overrides, fits) for overrides in found]
    return Advice([(overrides, traced[overrides]) for overrides in found], everything, traced.get(everything, plan))


def combinations(offered: list[str], traced: dict[tuple[str, ...], MemoryPlan]) -> list[tuple[str, ...]]:
    """Two or more of `offered`, smallest first; of one size, those that saved most alone."""
    saved = {override: traced[()].peak_bytes - traced[override,].peak_bytes for override in offered}
    return [
        combination
        for size in range(2, len(offered) + 1)
        for combination in sorted(
            itertools.combinations(offered, size), key=lambda overrides: -sum(map(saved.get, overrides))
        )
    ]


def smallest_split(
    run: RunConfig, overrides: tuple[str, ...], fits: Callable[[tuple[str, ...]], bool]
) -> tuple[str, ...]:
    """These overrides with the fewest micro-batches that fit, where they split the batch."""
    finest = split_batch(run)
    if finest not in overrides:
        return overrides
    sizes = [
        n for n in range(run.training.accumulation + 1, run.training.batch_size) if run.training.batch_size % n == 0
    ]
    splits = (
        tuple(f"training.accumulation={n}" if override == finest else override for override in overrides) for n in sizes
    )
    return next(filter(fits, splits), overrides)


def changed(run: RunConfig, overrides: Sequence[str]) -> RunConfig:
    return build_run(override_values(run.model_dump(mode="json"), overrides))


def available_bytes(device: torch.device) -> int:
    """Free memory of the GPU, with what this process holds there and does not use, or of the host."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return available_memory()


def misfit(run: RunConfig, device: torch.device, sharing: int = 1) -> str | None:
    """Why `run` will probably not fit `device`: what is needed, what is available and the cheapest change; None where it fits.

    `sharing`: how many such runs go on at a time. A run whose bound is far below what is available is not traced, and
    training a VAE or a CLIP cannot be. A trace that fails says so and is no reason: it is an estimate that no run must die of.
    """
    available = available_bytes(device) / sharing
    if run.trains in ("vae", "clip") or surely_fits(run, available):
        return None
    try:
        plan = plan_memory(run, device.type)
        log.info(
            "planned: %.1f GiB at the peak, while %s; %.1f GiB needed, %.1f available (%.0f s)",
            plan.peak_bytes / GIB,
            plan.largest,
            needed_bytes(plan) / GIB,
            available / GIB,
            plan.seconds,
        )
        if needed_bytes(plan) <= available:
            return None
        advice = remedy(advise(run, plan, available, most=1))
    except ConfigError:
        raise
    except Exception as error:
        log.warning("how much memory this run needs could not be foreseen (%s: %s)", type(error).__name__, error)
        return None
    return (
        f"this run needs {needed_bytes(plan) / GIB:.1f} GiB of {device.type} memory while {plan.largest}, and"
        f" {available / GIB:.1f} GiB are available{' to each' if sharing > 1 else ''}: {advice}"
    )


def check_fit(run: RunConfig, device: torch.device) -> None:
    """Warns of a run that will probably not fit `device`; with `training.require_fit` raises ConfigError instead."""
    reason = misfit(run, device)
    if reason and run.training.require_fit:
        raise ConfigError(f"{reason}. To try all the same, set training.require_fit to false")
    if reason:
        log.warning("%s. It is tried all the same; training.require_fit: true would refuse it", reason)


def misfits(runs: Sequence[tuple[str, RunConfig]], sharing: int) -> list[tuple[bool, str]]:
    """For each of these named runs that will probably not fit the device found here, whether it wants to be refused, and a line."""
    device = choose_device()
    found = [(label, run, misfit(run, device, sharing=sharing)) for label, run in runs]
    return [(run.training.require_fit, f"{label}: {reason}") for label, run, reason in found if reason]


def remedy(advice: Advice) -> str:
    """The cheapest change, or that there is none, in half a sentence."""
    if advice.fitting:
        overrides, plan = advice.fitting[0]
        return f"set {' and '.join(overrides)} (then {needed_bytes(plan) / GIB:.1f} GiB)"
    least = advice.least
    settings = f"even with {', '.join(advice.offered)}" if advice.offered else "there is nothing left to set, and"
    return (
        f"{settings} it is {needed_bytes(least) / GIB:.1f} GiB while {least.largest}: lower data.resolution, take a smaller"
        " base or more memory"
    )


def planned_run(model: str, overrides: Sequence[str]) -> RunConfig:
    """The run config in a YAML file, or for a bare model a LoRA of the default rank at the model's own resolution; `overrides`
    as `--set` gives them. Raises ConfigError for mistakes in either."""
    if Path(model).suffix in (".yaml", ".yml"):
        return load_run(Path(model), overrides)
    run = build_run(override_values({"model": {"base": model}, "adapter": {}}, overrides), "the command")
    if "resolution" in run.data.model_fields_set:
        return run
    return changed(run, [f"data.resolution={native_resolution(run.model)}"])


def count_samples(run: RunConfig) -> dict[str, int] | None:
    """How many views of pictures and how many different captions a run encodes, as they are listed; None where that would fetch something,
    or there is nothing to list."""
    data = run.data
    if data.source == "shapes":
        listing = shapes.load(run.shapes, data.part)[0]
    elif data.path is None or data.streaming or not Path(data.path).exists():
        return None
    else:
        listing = load_listings(data)[0]
    captions = {caption for record in listing for caption in record.captions}
    pictures = len(listing) + sum(record.rejected is not None for record in listing)
    return {"picture": pictures * data.views, "caption": len(captions) + 1}
