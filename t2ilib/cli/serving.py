"""`t2ilib app`: the page in the browser."""

from pathlib import Path
from typing import Annotated

import typer

from t2ilib.cli.errors import readable_errors


def app(
    model: Annotated[
        str | None,
        typer.Option(
            help="The base to begin with, as t2ilib generate takes it; without it that of the first adapter, or tiny-sdxl."
        ),
    ] = None,
    adapter: Annotated[
        list[str],
        typer.Option(
            help="An adapter to begin with, as t2ilib generate takes it; may be given several times. Without it the newest that goes with the base."
        ),
    ] = [],
    results: Annotated[Path, typer.Option(help="Whose runs are listed.")] = Path("results"),
    out: Annotated[
        Path | None, typer.Option(help="Folder for the pictures; without it app, under the results.")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where it is taken, the next that is free.")] = 7860,
    host: Annotated[
        str, typer.Option(help="Another than this machine alone, such as 0.0.0.0. There is no password.")
    ] = "127.0.0.1",
    share: Annotated[bool, typer.Option("--share", help="Make a public address too, over Gradio's servers.")] = False,
) -> None:
    """Open the app: draw with what was trained, look at checkpoints and grids, compare two variants blind."""
    with readable_errors():
        from t2ilib.app.serving import Options, serve

        serve(Options(model, tuple(adapter), results, out, host, port, share))
