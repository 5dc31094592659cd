"""What metrics and settings of a run are called where it is logged: the same in every tracker."""

from typing import Any

from t2ilib.config import RunConfig

ALWAYS = (
    "seed",
    "model.base",
    "model.quantization",
    "adapter.kind",
    "adapter.rank",
    "adapter.targets",
    "data.resolution",
    "optimizer.name",
    "optimizer.learning_rate",
    "prior.share",
    "prior.weight",
    "training.trains",
    "training.steps",
    "training.batch_size",
)
"""Parameters that are logged also where they are RunConfig's defaults, of sections that the run has: what runs are compared by."""

FIRST = "A first look"
FIRST_METRICS = (
    "loss",
    "held_out_loss",
    "world/all",
    "concept/all",
    "base_kept/all",
    "clip_score/concept",
    "clip_score/prompts",
    "steps_per_second",
    "peak_device_mib",
    "peak_process_mib",
    "adapter_mib",
    "trainable_parameters",
)
"""Metrics that stand first in MLflow's charts, in a section that is called so.

A section is what stands before the last slash of a name. The charts sort sections by name, whatever its letters' case, and put
metrics without a slash behind them all (MLflow 3.17), so what should come first needs a name that does.
"""


def shown_name(metric: str) -> str:
    """A metric's name in MLflow, by which it has its place in the charts."""
    return f"{FIRST}/{metric.replace('/', '_')}" if metric in FIRST_METRICS else metric


def run_tags(run: RunConfig) -> dict[str, str]:
    """What the UI groups by, in the order in which it is shown: what the study says (variant, ...), then seed, base, method."""
    adapter = run.adapter
    tags = {
        "seed": str(run.seed),
        "base": run.model.base,
        "quantization": run.model.quantization,
        "method": adapter.kind if adapter else run.trains,
        "optimizer": run.optimizer.name,
    }
    parent = {"mlflow.parentRunId": run.tracking.parent_run_id} if run.tracking.parent_run_id else {}
    return run.tracking.tags | {name: value for name, value in (tags | parent).items() if name not in run.tracking.tags}


def telling_fields(run: RunConfig) -> dict[str, Any]:
    """`section.field` -> value of those that are not RunConfig's default, and of ALWAYS; none of sections that the run has not."""
    fields = {}
    for name, value in run.flat().items():
        section, _, field = name.partition(".")
        part = getattr(run, section)
        if part is None:
            continue
        default = (
            type(part).model_construct().model_dump(mode="json").get(field)
            if field
            else RunConfig.model_fields[section].default
        )
        if name in ALWAYS or value != default:
            fields[name] = value
    return fields
