"""Options that several commands have."""

from typing import Annotated

import typer

Config = Annotated[
    str | None,
    typer.Option(help="For a single file of unusual size: tiny-sdxl, a diffusers folder or a Hub id with its configs."),
]
SkipDownload = Annotated[bool, typer.Option("--skip-download", help="Fetch nothing; extract the zips that are there.")]
ForceExtract = Annotated[
    bool, typer.Option("--force-extract", help="Extract every file anew, those that are there too.")
]
