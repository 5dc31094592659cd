"""`t2ilib study checkpoints`, `ballot` and `votes`: which checkpoint to keep, by measure and by eye."""

from pathlib import Path
from typing import Annotated

import typer

from t2ilib.cli.errors import readable_errors

Results = Annotated[Path, typer.Option(help="Where results and the default MLflow store lie.")]
Preset = Annotated[str, typer.Option(help="A preset of the study file.")]


def study_checkpoints(
    source: Annotated[Path, typer.Argument(metavar="FILE | RUN", help="A study file in YAML, or a run's folder.")],
    preset: Preset = "quick",
    only: Annotated[list[str], typer.Option(help="Only this variant; may be given several times.")] = [],
    seeds: Annotated[str, typer.Option(help="Other seeds than the preset's, e.g. 0,1,2.")] = "",
    steps: Annotated[
        str, typer.Option(help="Only these checkpoints, e.g. 200,400; without it all, of more than 20 some.")
    ] = "",
    prompt: Annotated[
        list[str], typer.Option(help="Of the grids; without it the first of those that are measured.")
    ] = [],
    strengths: Annotated[str, typer.Option(help="Of the grids.")] = "0.5,0.75,1",
    noises: Annotated[str, typer.Option(help="Of the grids: seeds of the pictures' noise.")] = "0,1",
    columns: Annotated[int, typer.Option(min=1, help="Checkpoints in a grid, at most.")] = 6,
    no_grid: Annotated[bool, typer.Option("--no-grid", help="Only measures.")] = False,
    results: Results = Path("results"),
) -> None:
    """Which checkpoint to keep: measures those that were kept, and writes one page with curves, grids and a recommendation."""
    with readable_errors():
        from t2ilib.report.keeping import Asked, choose_of_run, choose_of_study

        asked = Asked(
            tuple(numbers(steps, "--steps", int)),
            tuple(prompt),
            tuple(numbers(strengths, "--strengths", float)),
            tuple(numbers(noises, "--noises", int)),
            columns,
            not no_grid,
        )
        if source.is_dir():
            kept = choose_of_run(source, asked, results, say)
        else:
            kept = choose_of_study(source, preset, only, numbers(seeds, "--seeds", int), asked, results, say)
        for name, why in kept.left_out.items():
            print(f"left out: {name}: {why}")
        for own in kept.variants:
            print(f"{own.name}: keep {own.choice.sentence()}")
            if own.by_loss is not None and own.deciding.metric.role != "loss":
                print(f"{' ' * len(own.name)}  the held-out loss would keep {own.by_loss.sentence()}")
        print(f"page:    {kept.page}\nnumbers: {kept.numbers}")


def numbers(text: str, option: str, kind: type) -> list:
    """Numbers between commas; raises ConfigError for what is none."""
    from t2ilib.config import ConfigError

    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise ConfigError(f"{option} {text!r}: write {what} with commas") from None


def say(line: str) -> None:
    print(line, flush=True)
