"""`t2ilib study ...`: write a study of one's own, run it, see how far it is, write a variant out."""

import time
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from t2ilib.cli.errors import readable_errors

Results = Annotated[Path, typer.Option(help="Where results and the default MLflow store lie.")]
Jobs = Annotated[
    int | None,
    typer.Option(min=1, help="Notebooks at a time: 1 here, what a cluster has room for there, unless told."),
]
Where = Annotated[str, typer.Option(help="Where: here, ray (this machine), or ray:ADDRESS, a Ray cluster.")]
PerCard = Annotated[int, typer.Option(min=1, help="Notebooks that may share a GPU.")]


def study_new(
    folder: Annotated[Path, typer.Argument(help="An image folder: captioned pictures.")],
    base: Annotated[
        str, typer.Option(help="tiny-sdxl, tiny-sd15, a diffusers folder, a single .safetensors file or a Hub id.")
    ] = "tiny-sdxl",
    compare: Annotated[
        str, typer.Option(help="What to compare, with commas, the reference first; a wrong name shows the right ones.")
    ] = "lora,dora",
    trigger: Annotated[
        str | None,
        typer.Option(help="The word that captions use for what is taught; it is drawn in new places and styles."),
    ] = None,
    class_word: Annotated[str | None, typer.Option("--class", help="What that is one of: dog, face, house.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The file to write; without it FOLDER's name with .yaml, here.")
    ] = None,
) -> None:
    """Write a study file about your own pictures, ready to run: which way of fine-tuning suits them?"""
    with readable_errors():
        from t2ilib.studies.new import new_study

        names = [name.strip() for name in compare.split(",") if name.strip()]
        path, study = new_study(folder, base, names, out, trigger, class_word)
        command = f"t2ilib study run {quote(str(path))}"
        print(f"{path}: {', '.join(study.variants)}, compared with {study.reference}. Look it over, then")
        for preset, about in study.presets.items():
            steps, seeds = about.run["training"]["steps"], len(about.seeds)
            print(f"  {command} --preset {preset:5s}  # {seeds} seed{'s' * (seeds > 1)}, {steps} steps each")


def study_run(
    file: Annotated[Path, typer.Argument(help="A study file in YAML.")],
    preset: Annotated[str, typer.Option(help="A preset of the study file.")] = "quick",
    only: Annotated[list[str], typer.Option(help="Only this variant; may be given several times.")] = [],
    seeds: Annotated[str, typer.Option(help="Other seeds than the preset's, e.g. 0,1,2.")] = "",
    jobs: Jobs = None,
    tuned: Annotated[
        bool, typer.Option("--tuned", help="Each variant at its own best, as `study tune` found it.")
    ] = False,
    results: Results = Path("results"),
    on: Where = "here",
    per_card: PerCard = 1,
) -> None:
    """Run every variant and seed that is not finished, then write the report."""
    with readable_errors():
        from t2ilib.config import ConfigError
        from t2ilib.studies.study import run_study, write_report
        from t2ilib.studies.tuned import tuned_preset

        preset = tuned_preset(file, preset) if tuned else preset
        try:
            numbers = [int(seed) for seed in seeds.split(",") if seed.strip()]
        except ValueError:
            raise ConfigError(f"--seeds {seeds!r}: write whole numbers with commas, e.g. 0,1,2") from None
        begun = time.monotonic()
        runs = run_study(file, preset, only, numbers, jobs, results, say, on, per_card)
        failed = [run.label for run in runs if run.state != "finished"]
        if any(run.state == "finished" for run in runs):
            page = write_report(file, preset, results)
            from t2ilib.report import format_table, load_report, summary_table

            report = load_report(page.parent)
            rows = summary_table(report, report.speaking("learned", "kept", "loss", "followed", "size", "speed"))
            print("\n" + format_table([{name: row[name] for name in row if name != "variant"} for row in rows]))
            print(f"\nreport:     {page}\n            {page.with_suffix('.md')}")
        for line in tell_mlflow(file, preset, results):
            print(line)
        print(f"{len(runs) - len(failed)} of {len(runs)} runs finished, {time.monotonic() - begun:.0f} s")
        if failed:
            typer.secho(f"not finished: {', '.join(failed)}", fg=typer.colors.RED, err=True)
            raise SystemExit(1)


def study_status(
    file: Annotated[Path, typer.Argument(help="A study file in YAML.")],
    preset: Annotated[str, typer.Option(help="A preset of the study file.")] = "quick",
    results: Results = Path("results"),
) -> None:
    """Show the state of every variant and seed."""
    with readable_errors():
        from t2ilib.report import format_table
        from t2ilib.studies.study import status_rows

        print(format_table(status_rows(file, preset, results)))


def study_power(
    file: Annotated[Path, typer.Argument(help="A study file in YAML.")],
    preset: Annotated[str, typer.Option(help="A preset of the study file.")] = "quick",
    results: Results = Path("results"),
) -> None:
    """Say how many seeds a difference needs in this study, from the runs that are there."""
    with readable_errors():
        from t2ilib.config import ConfigError
        from t2ilib.report import format_table, load_report
        from t2ilib.report.noise import power_tables
        from t2ilib.studies.file import load_study

        folder = results / f"{load_study(file).name}-{preset}"
        tables = power_tables(load_report(folder))
        if not tables:
            raise ConfigError(
                f"{folder}: what runs vary by is known from two finished seeds of some variant on; run them first"
            )
        for told, rows in tables:
            print(f"{told}\n{format_table(rows)}\n")


def study_show(
    file: Annotated[Path, typer.Argument(help="A study file in YAML.")],
    variant: Annotated[str, typer.Argument(help="A variant of it.")],
    preset: Annotated[str, typer.Option(help="A preset of the study file.")] = "quick",
    seed: Annotated[int | None, typer.Option(min=0, help="Another seed than the preset's first.")] = None,
) -> None:
    """Write a variant out as a run config: t2ilib study show FILE VARIANT > run.yaml, then t2ilib train run.yaml."""
    with readable_errors():
        from t2ilib.studies.file import load_study
        from t2ilib.studies.runs import plan_runs, write_out

        seeds = [] if seed is None else [seed]
        print(write_out(plan_runs(load_study(file), file, preset, Path("results"), [variant], seeds)[0]), end="")


def say(line: str) -> None:
    """A line at once and in one piece: several threads tell of their notebooks."""
    print(f"{line}\n", end="", flush=True)


def tell_mlflow(file: Path, preset: str, results: Path) -> list[str]:
    """The report goes to the study's parent run, the best adapter to the registry; lines that say so, or why not: all else is done."""
    from t2ilib.config import ConfigError
    from t2ilib.report.tracked import champion_card, log_report
    from t2ilib.studies.study import champion_line

    store = f" --results {quote(str(results))}" if results != Path("results") else ""
    try:
        told = log_report(file, preset, results)
        champion = champion_line(file, preset, results, lambda name: champion_card(results / name, name))
    except ConfigError as error:
        return [f"champion:   not registered, and the report is not in MLflow: {error}"]
    return [*filter(None, [told]), f"champion:   {champion}", f"MLflow UI:  t2ilib ui{store}"]
