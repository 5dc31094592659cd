"""`t2ilib study tune`, and what tuning changed: each variant at its own best before it is compared."""

import time
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from t2ilib.cli.errors import readable_errors
from t2ilib.cli.studies import Jobs, PerCard, Results, Where, say


def study_tune(
    file: Annotated[Path, typer.Argument(help="A study file in YAML, with `search`.")],
    preset: Annotated[str, typer.Option(help="The preset whose runs are tuned: its length and data.")] = "quick",
    only: Annotated[list[str], typer.Option(help="Only this variant; may be given several times.")] = [],
    jobs: Jobs = None,
    results: Results = Path("results"),
    on: Where = "here",
    per_card: PerCard = 1,
) -> None:
    """Search each variant's own best values, on other seeds, pictures and prompts; then run the study at them: study run --tuned."""
    with readable_errors():
        from t2ilib.report import format_table
        from t2ilib.report.tuning import load_tuning, sentences, tuning_table
        from t2ilib.studies.tuning import tune_study

        begun = time.monotonic()
        trials = tune_study(file, preset, only, jobs, results, say, on, per_card)
        tuning = load_tuning(trials.parent)
        if tuning is not None:
            print("\n" + format_table(tuning_table(tuning)) + "\n")
            for line in sentences(tuning):
                print(line)
            print(f"\ntrials: {trials}")
        open_ones = [name for name, told in tuning.variants.items() if not told["ended"]] if tuning else ["all"]
        print(f"{time.monotonic() - begun:.0f} s")
        if open_ones:
            typer.secho(f"not ended: {', '.join(open_ones)}; the same command goes on", fg=typer.colors.RED, err=True)
            raise SystemExit(1)
        print(f"next: t2ilib study run {quote(str(file))} --preset {quote(preset)} --tuned")


def study_changed(
    file: Annotated[Path, typer.Argument(help="A study file in YAML.")],
    preset: Annotated[str, typer.Option(help="A preset that was run as it is, and with --tuned.")] = "quick",
    results: Results = Path("results"),
) -> None:
    """Tell which verdicts change between one common rate and each variant at its own best."""
    with readable_errors():
        from t2ilib.report import load_report
        from t2ilib.report.changed import changed_markdown
        from t2ilib.studies.file import load_study
        from t2ilib.studies.tuned import TUNED

        folder = results / f"{load_study(file).name}-{preset}"
        print(changed_markdown(load_report(f"{folder}{TUNED}"), load_report(folder)))
