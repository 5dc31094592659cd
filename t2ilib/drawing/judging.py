"""Every checkpoint of a run, measured as its end is: the same prompts from the same noise, judged by the run's own measures.

    loaded = Loaded(choose_device(), Path("results"))
    measure_steps(Path("results/cat"), loaded)

What was measured stays in the run's folder and is not measured again: `rows.jsonl` has every picture with its step, `steps.json` the
metrics of each step, what they are, and how they were measured; `held_out/` the losses. A step whose weights, prompts, drawing or measures
are others now is measured anew; a kill costs the step that was going on. What the run measured at its end is taken as it stands.

Step 0 is the base without an adapter. Which step to keep, `statistics.choosing` says of these numbers. Leaves out runs that trained
something else than an adapter.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from t2ilib.adapters.load import FILE_NAME
from t2ilib.config import ConfigError, RunConfig
from t2ilib.drawing.checkpoints import adapter_steps, kept_adapter
from t2ilib.drawing.held_out import load_held_out, write_held_out
from t2ilib.drawing.loaded import Loaded
from t2ilib.drawing.settings import AdapterChoice, DrawSettings
from t2ilib.evaluation.measures import Judged, find_measures, judge, prompt_groups
from t2ilib.evaluation.metrics import as_written
from t2ilib.evaluation.rows import ROWS, read_rows, write_rows
from t2ilib.evaluation.steps import BASE, losses_file, read_steps, write_step
from t2ilib.locking import held
from t2ilib.models.components import Components
from t2ilib.runfile import load_run
from t2ilib.text import read_text
from t2ilib.training.checkpoint import MANIFEST, file_digest, step_name
from t2ilib.training.evaluation import prompts_of

MOST_STEPS = 20
"""Checkpoints of a run that are measured where none are named: of more, as many, evenly from the first to the last."""
OF_TRAINING = ("validate_every", "sample_every", "sample_every_epochs", "animation", "strip_steps", "prompts")
OF_LOSSES = ("validation_timesteps", "validation_pictures")
"""Fields of `evaluation` that say nothing of how pictures of a prompt are drawn and judged."""
Say = Callable[[str], None]


@dataclass
class Shared:
    """What runs of one command have in common. `bases`: how it was measured -> what the base alone measured."""

    bases: dict[str, Judged] = field(default_factory=dict)


def load_finished(folder: Path) -> RunConfig:
    """The config of the run in a folder, whose output is that folder, wherever it lay. Raises ConfigError for what is no run of an adapter."""
    if not (folder / "run.yaml").is_file():
        raise ConfigError(f"{folder} is no folder of a run: it holds no run.yaml")
    run = load_run(folder / "run.yaml").model_copy(update={"output": folder})
    if run.adapter is None:
        raise ConfigError(f"{folder} trained {run.trains}, not an adapter: it keeps no checkpoints to choose from")
    return run


def steps_to_measure(folder: Path, asked: Sequence[int] = (), most: int = MOST_STEPS) -> list[int]:
    """The checkpoints of a run that are measured: those that are asked for, or all; of more than `most` some, evenly.

    Raises ConfigError for one that is not there, and where there are none.
    """
    there = adapter_steps(folder)
    if not there:
        raise ConfigError(
            f"{folder} kept no checkpoint to choose from: train with training.keep_adapters: all, which keeps the adapter of every"
            " training.checkpoint_every steps"
        )
    if lacking := sorted(set(asked) - set(there)):
        raise ConfigError(
            f"{folder} has no checkpoint of step {', '.join(map(str, lacking))}; there are {', '.join(map(str, there))}"
        )
    return sorted(set(asked)) or spread(there, most)


def spread(steps: Sequence[int], most: int) -> list[int]:
    """At most so many of the steps, evenly, the first and the last among them."""
    if len(steps) <= most:
        return list(steps)
    return [steps[int(place)] for place in np.linspace(0, len(steps) - 1, most).round()]


def measure_steps(
    folder: Path, loaded: Loaded, steps: Sequence[int] = (), shared: Shared | None = None, say: Say = lambda line: None
) -> list[int]:
    """Measures what is lacking of the checkpoints `steps` of a run (`steps_to_measure` without any) and of its base; returns them.

    `say` is told what is being measured. Raises ConfigError for what is no run of an adapter, for checkpoints that are not there, and where
    another process holds the folder.
    """
    folder, shared = Path(folder), shared or Shared()
    run, wanted = load_finished(folder), list(steps) or steps_to_measure(folder)
    refusal = f"another process is training or measuring in {folder}: wait for it"
    with held(folder / ".lock", refusal):
        known, prompts = read_steps(folder), prompts_of(run)
        how = {step: how_measured(run, step, prompts) for step in (BASE, *wanted)}
        lacking = [step for step, digest in how.items() if known["steps"].get(str(step), {}).get("how") != digest]
        last = run.training.steps if run.training.steps in lacking else None
        memo: dict[str, Any] = {}
        for step in lacking:
            if step == last:
                continue
            say(
                f"{folder}: {'the base' if step == BASE else f'step {step}'}, {lacking.index(step) + 1} of {len(lacking)}"
            )
            keep(folder, known, step, how[step], judged_step(run, loaded, step, how[step], prompts, memo, shared))
        if last is not None:  # when others have told what is measured
            at_end = measured_at_end(run, last, prompts, known["about"])
            say(f"{folder}: step {last}, {'as the run measured it' if at_end else f'{len(lacking)} of {len(lacking)}'}")
            if at_end:
                write_step(folder, known, last, how[last], at_end)
            else:
                keep(folder, known, last, how[last], judged_step(run, loaded, last, how[last], prompts, memo, shared))
        measure_losses(run, loaded, wanted, say)
    return wanted


def judged_step(
    run: RunConfig, loaded: Loaded, step: int, how: str, prompts: Sequence[str], memo: dict[str, Any], shared: Shared
) -> Judged:
    """What a step measures; the base of several runs is measured once."""
    if step != BASE:
        return judge(run, take_step(run, loaded, step), prompts, step, memo)
    if how not in shared.bases:
        run = run.model_copy(update={"evaluation": run.evaluation_of_base})
        shared.bases[how] = judge(run, take_step(run, loaded, step), prompts, step, memo)
    return shared.bases[how]


def take_step(run: RunConfig, loaded: Loaded, step: int) -> Components:
    """The run's base with its adapter as it was at a step; without one at step 0."""
    adapters = () if step == BASE else (AdapterChoice(path=str(run.output), step=step),)
    return loaded.take(DrawSettings(model=run.model, adapters=adapters))


def keep(folder: Path, known: dict[str, Any], step: int, how: str, judged: Judged) -> None:
    """Writes what a step measured: first its rows, then that they are there."""
    known["about"] |= {name: as_written(metric) for name, metric in judged.declared.items()}
    write_rows(folder, judged.rows)
    write_step(folder, known, step, how, judged.metrics)


def how_measured(run: RunConfig, step: int, prompts: Sequence[str]) -> str:
    """A digest of all that decides what a step measures: weights, base, prompts, how pictures are drawn, and what judges them."""
    evaluation = run.evaluation.model_dump(mode="json", exclude={*OF_TRAINING, *OF_LOSSES})
    told = {
        "weights": weights_digest(run.output, step),
        "model": run.model.model_dump(mode="json"),
        "resolution": run.data.resolution,
        "prompts": {group: list(asked) for group, (asked, _) in prompt_groups(run, prompts).items()},
        "evaluation": evaluation,
        "measures": sorted(find_measures(run)),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def weights_digest(folder: Path, step: int | None) -> str:
    """Of the file of an adapter, or of a checkpoint's list of sums, as it lies in a run's folder; "" for the base. `step` None: the
    adapter as it is at the end."""
    if step == BASE:
        return ""
    if step is None:
        return file_digest(folder / "adapter" / FILE_NAME)
    return file_digest(kept_adapter(folder, step) or folder / "checkpoints" / step_name(step) / MANIFEST)


def measured_at_end(
    run: RunConfig, step: int, prompts: Sequence[str], about: Mapping[str, Any]
) -> dict[str, float] | None:
    """What the run measured of its last step by these metrics, if it did so as its config now says and kept its rows; None otherwise."""
    folder = run.output
    metrics, rows, config = folder / "metrics.json", folder / ROWS, folder / "run.yaml"
    if not (metrics.is_file() and rows.is_file() and about) or metrics.stat().st_mtime < config.stat().st_mtime:
        return None
    asked = {group: list(texts) for group, (texts, _) in prompt_groups(run, prompts).items()}
    told: dict[str, list[str]] = {}
    for row in read_rows(folder):
        if row.step == step:
            told.setdefault(row.group, []).append(row.prompt)
    found = json.loads(read_text(metrics))
    return {name: found[name] for name in about} if told == asked and about.keys() <= found.keys() else None


def measure_losses(run: RunConfig, loaded: Loaded, steps: Sequence[int], say: Say) -> None:
    """The held-out losses that training did not measure."""
    if not losses_file(run.output, BASE).is_file():
        return  # the run held nothing out
    lacking = [step for step in steps if not losses_file(run.output, step).is_file()]
    held_out = load_held_out(run) if lacking else None
    for number, step in enumerate(lacking, start=1):
        say(f"{run.output}: held-out loss of step {step}, {number} of {len(lacking)}")
        write_held_out(run, held_out, take_step(run, loaded, step), step)
