"""A run's adapter as it was at a step: which steps there are, and each as an adapter file like any other.

With `training.keep_adapters: all` a run keeps such files itself. Otherwise a step has the checkpoint that training goes on from, and what it
holds of the adapter becomes a file through the base, which knows what belongs where.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from t2ilib.adapters.export import describe, export_adapter, save_adapter
from t2ilib.adapters.load import FILE_NAME, recorded_run
from t2ilib.adapters.weights import read_layers
from t2ilib.config import ConfigError, ModelConfig
from t2ilib.models.components import Components
from t2ilib.models.load import load_base
from t2ilib.runfile import load_run
from t2ilib.training.checkpoint import list_checkpoints, list_steps, step_name, step_of
from t2ilib.training.state import load_checkpoint_adapter


def adapter_steps(run: Path) -> list[int]:
    """The steps of a run's folder whose adapter can be had, rising; [] for a path that is none."""
    kept = [path for path in list_steps(run / "steps") if (path / "adapter" / FILE_NAME).is_file()]
    return sorted({step_of(path) for path in (*kept, *list_checkpoints(run / "checkpoints"))})


def require_step(run: Path, step: int) -> None:
    """Raises ConfigError, naming the steps there are, where the adapter of a run cannot be had as it was at `step`."""
    steps = adapter_steps(run)
    if step not in steps:
        told = f"there are {', '.join(map(str, steps))}" if steps else "there are none"
        more = "" if steps else ": give the folder of a run, whose checkpoints are still there"
        raise ConfigError(f"{run} has no checkpoint of step {step}; {told}{more}")


def kept_adapter(run: Path, step: int) -> Path | None:
    """The file that a run kept of its adapter at a step; None where it has a checkpoint alone."""
    file = run / "steps" / step_name(step) / "adapter" / FILE_NAME
    return file if file.is_file() else None


def write_step(components: Components, run: Path, step: int, folder: Path) -> Path:
    """Writes the adapter of a run's checkpoint into `folder`, as training would have kept it, and returns the file; leaves it attached.

    `components`: the run's base, without adapters. Where `training.state.changes_base` says so of the run, it has changed and must be loaded
    anew. Raises ConfigError as `load_checkpoint_adapter`, CheckpointError for a damaged checkpoint.
    """
    start = load_checkpoint_adapter(components, run, step)
    config = load_run(run / "run.yaml")
    config = config.model_copy(update={"training": config.training.model_copy(update={"steps": step})})
    metadata = describe(config, components, data_digest(run), read_layers(components, start))
    return save_adapter(components, folder, start, metadata)


def data_digest(run: Path) -> str:
    """What a run's manifest says that its pictures are; "" where there is none, as in runs of before."""
    try:
        return str(json.loads((run / "manifest.json").read_text())["digest"]["training"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def export_step(
    run: Path, step: int, target: Path, format: str = "diffusers", model: ModelConfig | None = None, **options: Any
) -> Path:
    """Writes the adapter of a run as it was at a step in a format of `adapters.export.FORMATS`; returns the file or folder.

    `model`: the base it goes with; without it the run's. `options`: of `export_adapter`, which raises ConfigError as it does there; so does
    a step that is not there.
    """
    run = Path(run)
    require_step(run, step)
    chosen = model or load_run(recorded_run(run)).model
    kept = kept_adapter(run, step)
    if kept is not None:
        return export_adapter(kept, target, format, chosen, **options)
    with tempfile.TemporaryDirectory(prefix="t2ilib-") as scratch:
        components = load_base(chosen.in_full())
        file = write_step(components, run, step, Path(scratch))
        del components
        return export_adapter(file, target, format, chosen, **options)
