"""The adapters there are: those of runs in a results folder, files, and those of MLflow's registry; and the bases they go with.

Reads what lies on disk and loads nothing. A folder that is being trained into is listed as soon as it has a checkpoint.
"""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from t2ilib.adapters.load import FILE_NAME, adapter_file, recorded_run
from t2ilib.cachefolder import cache_folder
from t2ilib.config import ConfigError, ModelConfig, RunConfig
from t2ilib.drawing.checkpoints import adapter_steps, kept_adapter, require_step
from t2ilib.drawing.settings import AdapterChoice
from t2ilib.runfile import build_run, load_run
from t2ilib.text import shown
from t2ilib.tracking.models import find_adapter
from t2ilib.tracking.store import tracking_uri

log = logging.getLogger(__name__)

REGISTERED = "models:/"
DEPTH = 4
"""Folders below a results folder in which runs are looked for: results/<study>-<preset>/<variant>/seed<k> has three."""


@dataclass(frozen=True)
class Found:
    """An adapter that a run trained. `name`: of its folder, below the results folder. `steps`: those whose adapter can be had
    (`AdapterChoice.step`), rising. `when`: it was last written, in local time. `finished`: whether the run has written its adapter; until then
    it has steps alone."""

    path: Path
    name: str
    base: str
    kind: str
    rank: int
    steps: tuple[int, ...]
    when: datetime
    finished: bool
    run: RunConfig


def list_adapters(results: Path) -> list[Found]:
    """The adapters of all runs below a results folder, newest first; [] where there is no such folder. Runs whose config cannot be read any
    more are left out, and named in the log."""
    found = []
    for folder in run_folders(Path(results)):
        try:
            run = load_run(folder / "run.yaml")
        except (ConfigError, OSError) as error:
            log.warning("%s is left out: %s", shown(folder), str(error).splitlines()[0])
            continue
        file, steps = folder / "adapter" / FILE_NAME, tuple(adapter_steps(folder))
        if run.adapter is None or not (file.is_file() or steps):
            continue
        last = next(place for place in (file, folder / "checkpoints", folder / "steps") if place.exists())
        found.append(
            Found(
                folder,
                str(folder.relative_to(results)) if folder != Path(results) else folder.name,
                run.model.base,
                run.adapter.kind,
                run.adapter.rank,
                steps,
                datetime.fromtimestamp(last.stat().st_mtime),
                file.is_file(),
                run,
            )
        )
    return sorted(found, key=lambda adapter: (adapter.when, adapter.name), reverse=True)


def run_folders(results: Path) -> Iterator[Path]:
    """Folders with a run.yaml, at most DEPTH below; not what a run keeps within, hidden ones, and MLflow's artifacts."""
    for place, folders, files in os.walk(results):
        here = Path(place)
        if "run.yaml" in files:
            yield here
            folders.clear()
        depth = len(here.relative_to(results).parts)
        folders[:] = sorted(
            f for f in folders if depth < DEPTH and not f.startswith((".", "mlflow-artifacts", "mlruns"))
        )


def resolve(choice: AdapterChoice, results: Path = Path("results"), uri: str | None = None) -> Path:
    """Where the adapter of a choice lies: its file; or, of a step that is in a checkpoint alone, the run's folder, for
    `checkpoints.write_step`.

    `results`: where MLflow's default store is; `uri`: another store. Raises ConfigError where there is no such adapter or step.
    """
    if choice.path.startswith(REGISTERED):
        if choice.step is not None:
            raise ConfigError(
                f"{choice.path} is one adapter, without steps: leave the step out, or name the run's folder"
            )
        return find_adapter(choice.path, tracking_uri(uri, Path(results)), cache_folder() / "mlflow")
    path = Path(choice.path)
    if choice.step is None:
        return adapter_file(path)
    require_step(path, choice.step)
    return kept_adapter(path, choice.step) or path


def base_of(choice: AdapterChoice, results: Path = Path("results"), uri: str | None = None) -> ModelConfig | None:
    """The base that an adapter was trained over, as its run had it; None where nothing says so. Raises ConfigError as `resolve`."""
    recorded = recorded_run(resolve(choice, results, uri))
    return load_run(recorded).model if recorded else None


def change_base(model: ModelConfig, **changes: str | int | None) -> ModelConfig:
    """A base with other values of some fields; None leaves a field as it is. Another `base` takes along nothing that belongs to the first:
    `config`, `vae`, `revision`, `variant`, what is spared of quantization. Raises ConfigError for what does not go together."""
    asked = {name: value for name, value in changes.items() if value is not None}
    if asked.get("base") not in (None, model.base):
        asked = {"config": None, "vae": None, "revision": None, "variant": None, "quantization_skip": ()} | asked
    if asked.get("quantization") == "none":
        asked |= {"quantize_convolutions": False, "quantization_skip": ()}
    return build_run({"adapter": {}, "model": model.model_dump() | asked}, "the base").model
