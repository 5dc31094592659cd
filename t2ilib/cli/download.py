"""`t2ilib data download`: a data set from its server to a folder that runs can name."""

from pathlib import Path
from typing import Annotated

import typer

from t2ilib.cli.errors import readable_errors
from t2ilib.cli.options import ForceExtract, SkipDownload


def data_download(
    name: Annotated[str, typer.Argument(help="coco; of flickr30k it says how to get it.")],
    folder: Annotated[Path | None, typer.Argument(help="Where it goes; without it a folder NAME, here.")] = None,
    server: Annotated[
        str | None,
        typer.Option(
            help="Another address to fetch from, or a folder as a server has it; a SHA256SUMS or MD5SUMS there is honoured."
        ),
    ] = None,
    part: Annotated[
        list[str], typer.Option(help="Only this (train, val or annotations); may be given several times.")
    ] = [],
    skip_download: SkipDownload = False,
    force_extract: ForceExtract = False,
    keep_zips: Annotated[
        bool, typer.Option("--keep-zips/--delete-zips", help="Whether zips stay once they are extracted.")
    ] = True,
    extract: Annotated[
        bool,
        typer.Option("--extract/--no-extract", help="Whether pictures are taken out of their zips; runs read both."),
    ] = True,
) -> None:
    """Download and extract a data set. Interrupt it as you like: the same command goes on where it was."""
    with readable_errors():
        from t2ilib.data.download import obtain

        lines = obtain(
            name, folder or Path(name), server, tuple(part), skip_download, force_extract, keep_zips, extract
        )
        print("\n".join(lines))
