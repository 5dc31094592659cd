"""`t2ilib ui` and `t2ilib send`: what was logged, and what could not be."""

from pathlib import Path
from typing import Annotated

import typer

from t2ilib.cli.errors import readable_errors


def ui(
    results: Annotated[Path, typer.Option(help="Where results and the default MLflow store lie.")] = Path("results"),
    uri: Annotated[
        str | None, typer.Option(help="Another store, as MLFLOW_TRACKING_URI has it; of a server the address is told.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Without it 5000, or a free one where that is taken.")
    ] = None,
) -> None:
    """Open the MLflow UI on what was logged (on this machine only)."""
    with readable_errors():
        from t2ilib.tracking.ui import open_ui

        raise SystemExit(open_ui(results, uri, port, lambda line: print(line, flush=True)))


def send(
    folder: Annotated[Path, typer.Argument(help="A run's folder, or one with several runs.")] = Path("results"),
) -> None:
    """Send what runs kept in their folders while the MLflow store did not answer."""
    with readable_errors():
        from t2ilib.config import ConfigError
        from t2ilib.tracking.outbox import send_kept

        if not folder.exists():
            raise ConfigError(f"{folder} does not exist: give the folder of a run, or one with several")
        told = send_kept(folder)
        for place, trouble in told.items():
            print(trouble or f"{place}: all is sent")
        if not told:
            print(f"nothing waits in {folder}")
        raise SystemExit(any(told.values()))
