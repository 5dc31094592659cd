"""`t2ilib plan`: the memory a run will need, as a table, and what would make it fit."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from t2ilib.cli.errors import readable_errors

if TYPE_CHECKING:
    from t2ilib.config import RunConfig
    from t2ilib.planning.trace import MemoryPlan


def plan(
    model: Annotated[str, typer.Argument(help="A run config in YAML, what model.base takes, or a layout: sd15, sdxl.")],
    set: Annotated[list[str], typer.Option("--set", help="section.field=value; may be given several times.")] = [],
    card: Annotated[
        float | None, typer.Option(min=1, help="GB of the card to fit; without it the GPU that is found here, if any.")
    ] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu: what the run will train on.")] = "cuda",
) -> None:
    """Predict the peak memory of a run by tracing it, without a GPU and without weights, and what would make it fit."""
    with readable_errors():
        from t2ilib.config import check_choice

        check_choice(device, ("cuda", "cpu"), "--device")
        from t2ilib.planning.fit import planned_run
        from t2ilib.planning.trace import plan_memory

        run = planned_run(model, set)
        for line in describe_plan(run, plan_memory(run, device), card):
            print(line, flush=True)


def describe_plan(run: "RunConfig", plan: "MemoryPlan", card: float | None = None) -> Iterator[str]:
    """Lines to print: the table in GiB at each phase's peak, the reserve, the cards it fits, and for a card (in GB; the one
    found here if None) the changes that make it fit."""
    import torch

    from t2ilib.memory import GIB
    from t2ilib.planning.fit import CARDS_GB, CHANGES, advise, needed_bytes, remedy
    from t2ilib.planning.trace import CATEGORIES
    from t2ilib.report import format_table

    adapter = f"{run.adapter.kind} of rank {run.adapter.rank}" if run.adapter else run.trains
    if run.student:
        adapter = f"a student without {' and '.join(run.student.leave_out)}"
    options = [
        run.model.quantization if run.model.quantization != "none" else "",
        f"accumulation {run.training.accumulation}" if run.training.accumulation > 1 else "",
        "gradient checkpointing" if run.training.gradient_checkpointing else "",
        f"attention {run.compute.attention}" if run.compute.attention != "sdpa" else "",
        *(f"{name} on the host" for name in run.compute.offload if plan.device_type == "cuda"),
        run.optimizer.name if plan.phases.get("training") else "",
    ]
    side = run.data.resolution
    scratch = f"{run.scratch.unet} from scratch in {run.scratch.space}, by parts of " if run.scratch else ""
    yield (
        f"{scratch}{run.model.base} at {side}x{side}, batch {run.training.batch_size}, {', '.join(filter(None, [adapter, *options]))},"
        f" on {plan.device_type}; traced in {plan.seconds:.0f} s\n"
    )
    rows = [
        {"GiB": name} | {phase: f"{values.get(name, 0) / GIB:.2f}" for phase, values in plan.phases.items()}
        for name in CATEGORIES
    ]
    rows.append({"GiB": "peak"} | {phase: f"{plan.bytes_of(phase) / GIB:.2f}" for phase in plan.phases})
    yield format_table(rows)
    needed = needed_bytes(plan)
    reserve = "CUDA context and fragmentation" if plan.device_type == "cuda" else "fragmentation"
    yield (
        f"\nneeded: {needed / GIB:.1f} GiB, while {plan.largest}: {plan.peak_bytes / GIB:.2f} traced and"
        f" {(needed - plan.peak_bytes) / GIB:.2f} assumed for {reserve}"
    )
    if plan.kept:
        yield from describe_cache(run, plan)
    fit = [str(size) for size in CARDS_GB if needed <= size * GIB]
    yield f"cards that hold it, in GB: {', '.join(fit) or 'none'} (of {', '.join(map(str, CARDS_GB))})"
    available = card and card * GIB
    if available is None and plan.device_type == "cuda" and torch.cuda.is_available():
        available = torch.cuda.get_device_properties(0).total_memory
    if available is None:
        yield "--card GB tells what makes it fit a card"
    elif needed <= available:
        yield f"it fits {available / GIB:.0f} GB"
    else:
        yield f"it does not fit {available / GIB:.0f} GB; tracing changes, cheapest first"
        advice = advise(run, plan, available)
        costs = {change(run): cost for cost, change in CHANGES.items()}
        for overrides, smaller in advice.fitting:
            cost = ", ".join(costs.get(override, "little time") for override in overrides)
            flags = " ".join(f"--set {override}" for override in overrides)
            yield f"  {needed_bytes(smaller) / GIB:5.1f} GiB with {flags} ({cost})"
        if not advice.fitting:
            yield f"  {remedy(advice)}"


def describe_cache(run: "RunConfig", plan: "MemoryPlan") -> Iterator[str]:
    """What `data.cache` keeps on disk, and what encoding it costs, in steps of this run: for its pictures where they can be listed, otherwise
    for a thousand."""
    from t2ilib.data.cache import encoded_folder
    from t2ilib.planning.fit import count_samples

    kept = {name: size for name, size in plan.kept.items() if size}
    if not kept:
        yield "nothing is kept on disk: pictures and captions are encoded in every step"
        return
    counted = count_samples(run)
    numbers = counted or {"picture": 1000, "caption": 1000}
    size = sum(numbers[name] * kept[name] for name in kept)
    told = " and ".join(f"{numbers[name]:,} {name}s ({bytes_told(kept[name])} each)" for name in kept)
    steps = ""
    if plan.flops.get("sample"):
        work = sum(numbers[name] * plan.flops[name] for name in kept)
        steps = f"; encoding them once takes about as long as {work / plan.flops['sample'] / run.training.batch_size:,.0f} steps of this run"
    yield f"kept on disk: {bytes_told(size)} for {told}, in {encoded_folder(run.data.cache_path)}{steps}"


def bytes_told(size: float) -> str:
    from tqdm import tqdm

    return f"{tqdm.format_sizeof(size)}B"
