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


def study_ballot(
    file: Annotated[Path, typer.Argument(help="A study file in YAML.")],
    of: Annotated[
        list[str],
        typer.Option(help="A variant, or a checkpoint of it such as lora@400; to be given twice."),
    ],
    preset: Preset = "quick",
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of pictures to vote on.")] = 24,
    prompt: Annotated[
        list[str], typer.Option(help="May be given several times; without it those that were measured.")
    ] = [],
    seed: Annotated[int | None, typer.Option(min=0, help="Training seed; without it the first of both.")] = None,
    noise: Annotated[int, typer.Option(min=0, help="Seed of the pictures' noise.")] = 0,
    results: Results = Path("results"),
) -> None:
    """Make a page on which people vote between two variants without their names; t2ilib study votes takes the votes in."""
    with readable_errors():
        from t2ilib.report.balloting import make_ballot

        page, ballot = make_ballot(file, preset, of, pairs, results, prompt, seed, noise, say)
        print(f"{len(ballot.pairs())} pairs of {len(ballot.prompts)} prompts: open {page} in a browser")


def study_votes(
    file: Annotated[Path, typer.Argument(help="A study file in YAML.")],
    votes: Annotated[list[Path], typer.Argument(help="Files of votes that were saved from a ballot's page.")],
    preset: Preset = "quick",
    results: Results = Path("results"),
) -> None:
    """Take votes into the study's results, so that the report shows them; the same file twice adds nothing."""
    with readable_errors():
        from t2ilib.report.balloting import take_votes

        taken = take_votes(file, preset, votes, results)
        for path, (target, _, new) in zip(votes, taken, strict=True):
            print(f"{path}: {new} new vote{'s' * (new != 1)}, in {target}")
        for target, own in {target: own for target, own, _ in taken}.items():
            print(f"{target.stem}: {own.tally().sentence()}")
