"""`t2ilib pipeline`: the whole way from a data set's server to pictures, by one file."""

from pathlib import Path
from typing import Annotated

import typer

from t2ilib.cli.errors import readable_errors
from t2ilib.cli.options import ForceExtract, SkipDownload


def pipeline(
    file: Annotated[Path, typer.Argument(help="A pipeline file in YAML, such as experiments/coco-adverbs.yaml.")],
    only: Annotated[
        str | None, typer.Option(help="This step alone: download, process, train, measure or draw.")
    ] = None,
    begin: Annotated[str | None, typer.Option("--from", help="This step and those that follow it.")] = None,
    skip_download: SkipDownload = False,
    force_extract: ForceExtract = False,
    checkpoint: Annotated[
        int | None, typer.Option(min=1, help="Draw with the adapters as they were at this step.")
    ] = None,
    prompt: Annotated[
        list[str], typer.Option(help="Draw this instead of what the file says; may be given several times.")
    ] = [],
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would be done, and what it would need; do, fetch and ask nothing."),
    ] = False,
    set: Annotated[
        list[str],
        typer.Option("--set", help="field=value of the file, e.g. run.training.steps=100; may be given several times."),
    ] = [],
) -> None:
    """Download, process captions, train, measure and draw, each step once; interrupted, the same command goes on."""
    with readable_errors():
        from t2ilib.pipeline.job import Options
        from t2ilib.pipeline.running import require_one_process, run_pipeline, table_of
        from t2ilib.report import format_table

        require_one_process()
        options = Options(skip_download, force_extract, checkpoint, tuple(prompt), dry_run)
        found = run_pipeline(file, set, only, begin, options)
        if found and not dry_run:
            print(format_table(table_of(found)))
