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
    options = [
        run.model.quantization if run.model.quantization != "none" else "",
        f"accumulation {run.training.accumulation}" if run.training.accumulation > 1 else "",
        "gradient checkpointing" if run.training.gradient_checkpointing else "",
        run.optimizer.name if plan.phases.get("training") else "",
    ]
    side = run.data.resolution
    yield (
        f"{run.model.base} at {side}x{side}, batch {run.training.batch_size}, {', '.join(filter(None, [adapter, *options]))},"
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
