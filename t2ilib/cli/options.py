"""Options that several commands have."""

from pathlib import Path
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

Model = Annotated[
    str | None,
    typer.Option(
        help="tiny-sdxl, tiny-sd15, a diffusers folder, a single .safetensors file or a Hub id; without it the base of the adapter's run."
    ),
]
Adapters = Annotated[
    list[str],
    typer.Option(
        help="A run's folder, an adapter file, or models:/STUDY-PRESET@champion from MLflow; may be given several times."
    ),
]
Checkpoint = Annotated[
    int | None, typer.Option(help="Take the adapter as it was at this step (--adapter names a run's folder).")
]
Scales = Annotated[
    list[float], typer.Option(help="Strength of each adapter, in their order: 0 switches it off, 1 is as trained.")
]
Partial = Annotated[
    bool,
    typer.Option(
        "--partial",
        help="Leave out layers of an adapter that the base does not have, as a student has not all of its teacher's.",
    ),
]
Quantization = Annotated[str | None, typer.Option(help="none or nf4; without it as the adapter's run had its base.")]
NegativePrompt = Annotated[str | None, typer.Option(help="What guidance leads away from.")]
Sampler = Annotated[
    str | None,
    typer.Option(
        help="auto, the base's own or the adapter's, or by name: Euler, Euler a, DPM++ 2M Karras, DDIM, UniPC, ..."
    ),
]
Guidance = Annotated[
    float | None, typer.Option(help="Classifier-free guidance scale; without it as the adapter's file says, or 5.")
]
Steps = Annotated[int | None, typer.Option(help="Sampling steps; without it as the adapter's file says, or 20.")]
Width = Annotated[int | None, typer.Option(help="Of a picture, in pixels; without it the base's own.")]
Height = Annotated[int | None, typer.Option(help="Of a picture, in pixels; without it the base's own.")]
Results = Annotated[Path, typer.Option(help="Beside which results MLflow's store lies.")]
