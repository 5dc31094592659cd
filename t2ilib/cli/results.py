"""`t2ilib results ...`: results taken from one machine to another."""

from pathlib import Path
from typing import Annotated

import typer

from t2ilib.cli.errors import readable_errors


def results_pack(
    results: Annotated[Path, typer.Argument(help="A results folder, or a run's or study's in it.")],
    file: Annotated[Path, typer.Argument(help="The zip to write.")],
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="With checkpoints, to train on elsewhere.")
    ] = False,
) -> None:
    """Pack results into one small file: adapters, configs, metrics, reports, pictures, MLflow's store; without checkpoints."""
    with readable_errors():
        from t2ilib.memory import MIB
        from t2ilib.studies.parcel import pack_results

        packed = pack_results(results, file, checkpoints)
        print(f"{packed.file}: {packed.size / MIB:,.1f} MiB, {packed.num_files} files of {len(packed.runs)} run(s)")
        for reason, size in sorted(packed.left_out.items()):
            print(f"  left out: {reason}, {size / MIB:,.1f} MiB")


def results_merge(
    sources: Annotated[list[Path], typer.Argument(help="Packed files, or results folders.")],
    into: Annotated[Path, typer.Option(help="The results folder that they are put into.")] = Path("results"),
    uri: Annotated[
        str | None, typer.Option(help="The MLflow store; without it MLFLOW_TRACKING_URI, or the one in --into.")
    ] = None,
) -> None:
    """Put results from elsewhere among those that are here, run by run, and their MLflow store into the one in use. Twice adds nothing."""
    with readable_errors():
        from t2ilib.studies.homecoming import merge_results

        conflicts = []
        for arrived in merge_results(sources, into, uri):
            told = {"new": arrived.new, "updated": arrived.updated, "known": arrived.known}
            counted = ", ".join(f"{len(names)} {word}" for word, names in told.items())
            print(f"{arrived.source}: runs: {counted}; {arrived.num_files} other files")
            if (logged := arrived.logged) is not None:
                print(
                    f"  MLflow: {logged.added} of {len(logged.runs)} runs new, {logged.points:,} points of metrics, {len(logged.models)} model(s)"
                )
            conflicts += arrived.conflicts
        for sentence in conflicts:
            typer.secho(f"conflict: {sentence}", fg=typer.colors.RED, err=True)
        if conflicts:
            raise SystemExit(1)
