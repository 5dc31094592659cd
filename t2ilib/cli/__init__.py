"""`t2ilib ...`: a thin layer over the library. Heavy imports happen inside the commands, so `--help` answers at once."""

import logging
import sys
from typing import Annotated

import typer

from t2ilib.cli import adapters, planning, shapes, studies, training

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Which way of fine-tuning Stable Diffusion suits your pictures and your GPU?",
)
study_app = typer.Typer(no_args_is_help=True, help="Write a study of variants, run it, and see how far it is.")
data_app = typer.Typer(no_args_is_help=True, help="Make data sets.")
tiny_app = typer.Typer(no_args_is_help=True, help="Rebuild the tiny models that ship with the package.")


@app.callback()
def main(quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings.")] = False) -> None:
    logging.basicConfig(level=logging.WARNING if quiet else logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)


for command in (
    training.train,
    training.generate,
    adapters.adapters,
    adapters.quantization,
    planning.plan,
    adapters.export,
):
    app.command()(command)
study_app.command("new")(studies.study_new)
study_app.command("run")(studies.study_run)
study_app.command("status")(studies.study_status)
study_app.command("show")(studies.study_show)
data_app.command("shapes")(shapes.data_shapes)
tiny_app.command("build")(shapes.tiny_build)
tiny_app.command("pack")(shapes.tiny_pack)
app.add_typer(study_app, name="study")
app.add_typer(data_app, name="data")
app.add_typer(tiny_app, name="tiny")
