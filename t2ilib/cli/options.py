"""Options that several commands have."""

from typing import Annotated

import typer

Config = Annotated[
    str | None,
    typer.Option(help="For a single file of unusual size: tiny-sdxl, a diffusers folder or a Hub id with its configs."),
]
