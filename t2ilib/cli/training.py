"""`t2ilib train`: one run."""

from pathlib import Path
from typing import Annotated

import typer

from t2ilib.cli.errors import readable_errors
from t2ilib.cli.launcher import launched_as


def train(
    config: Annotated[Path, typer.Argument(help="A run config in YAML.")],
    set: Annotated[
        list[str],
        typer.Option(
            "--set", help="section.field=value, e.g. model.base=model.safetensors; may be given several times."
        ),
    ] = [],
    resume: Annotated[
        str,
        typer.Option(
            help="latest: from the newest checkpoint in output. PATH: from a checkpoint's folder, or a run's, of the same settings. never: from"
            " step 0. What these leave behind in output is set aside, not deleted."
        ),
    ] = "latest",
) -> None:
    """Train one run, resuming if it was interrupted, then measure it."""
    with readable_errors():
        from t2ilib.runfile import load_run

        run = load_run(config, set)
        from accelerate import PartialState

        from t2ilib.evaluation.measures import measure
        from t2ilib.models.load import choose_device
        from t2ilib.planning.fit import check_fit
        from t2ilib.tracking.tracker import open_tracker
        from t2ilib.training.checkpoint import list_checkpoints
        from t2ilib.training.loop import train
        from t2ilib.training.processes import share_of

        number, processes = launched_as()
        begun = list_checkpoints(run.output / "checkpoints")  # one that has begun has shown that it fits
        if number == 0 and (resume == "never" or not begun) and not run.compute.shard:  # a trace knows of no slices
            check_fit(share_of(run, processes), choose_device())

        with open_tracker(run) as tracker:
            result = train(run, tracker, resume)
            metrics = result.metrics
            if not PartialState().is_main_process:
                return
            if run.trains not in ("vae", "clip"):
                metrics = measure(run, result.components, tracker, metrics, result.prompts)
        for name, value in sorted(metrics.items()):
            if not name.startswith(("memory/", "learning_rate/", "held_out_loss/")):
                print(f"{name:32s} {value:14.4f}")
        print(f"everything is in {run.output}")
