"""`t2ilib ...`: a thin layer over the library. Heavy imports happen inside the commands, so `--help` answers at once."""

import logging
import sys
from typing import Annotated

import typer

from t2ilib.cli import (
    adapters,
    captions,
    choosing,
    download,
    drawing,
    hub,
    inspection,
    pipeline,
    planning,
    preferences,
    results,
    serving,
    shapes,
    shards,
    studies,
    tracking,
    training,
    tuning,
)
from t2ilib.cli.launcher import launched_as

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Which way of fine-tuning Stable Diffusion suits your pictures and your GPU?",
)
study_app = typer.Typer(no_args_is_help=True, help="Write a study of variants, run it, and see how far it is.")
data_app = typer.Typer(
    no_args_is_help=True, help="Get data sets, make them, look into them, and see what is done to captions."
)
results_app = typer.Typer(no_args_is_help=True, help="Take results from one machine to another.")
tiny_app = typer.Typer(no_args_is_help=True, help="Rebuild the tiny models that ship with the package.")


@app.callback()
def main(quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings.")] = False) -> None:
    level = logging.ERROR if launched_as()[0] else logging.WARNING if quiet else logging.INFO
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)


for command in (
    training.train,
    drawing.generate,
    serving.app,
    pipeline.pipeline,
    adapters.adapters,
    adapters.quantization,
    planning.plan,
    adapters.export,
    hub.push,
    tracking.ui,
    tracking.send,
):
    app.command()(command)
study_app.command("new")(studies.study_new)
study_app.command("run")(studies.study_run)
study_app.command("tune")(tuning.study_tune)
study_app.command("changed")(tuning.study_changed)
study_app.command("status")(studies.study_status)
study_app.command("show")(studies.study_show)
study_app.command("checkpoints")(choosing.study_checkpoints)
study_app.command("ballot")(choosing.study_ballot)
study_app.command("votes")(choosing.study_votes)
study_app.command("power")(studies.study_power)
data_app.command("inspect")(inspection.data_inspect)
data_app.command("shapes")(shapes.data_shapes)
data_app.command("captions")(captions.data_captions)
data_app.command("download")(download.data_download)
data_app.command("shard")(shards.data_shard)
data_app.command("preferences")(preferences.data_preferences)
results_app.command("pack")(results.results_pack)
results_app.command("merge")(results.results_merge)
tiny_app.command("build")(shapes.tiny_build)
tiny_app.command("pack")(shapes.tiny_pack)
app.add_typer(study_app, name="study")
app.add_typer(data_app, name="data")
app.add_typer(results_app, name="results")
app.add_typer(tiny_app, name="tiny")
