"""`t2ilib push`: what a run trained to the Hub, with its card."""

from pathlib import Path
from typing import Annotated

import typer

from t2ilib.cli.errors import readable_errors


def push(
    run: Annotated[Path, typer.Argument(help="A finished run's folder.")],
    to: Annotated[str, typer.Option(help="The repository, user/name; it is made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make it one that only you see.")] = False,
    license: Annotated[
        str | None, typer.Option(help="For the card, such as mit or creativeml-openrail-m; t2ilib chooses none.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Make the folder and show what would be uploaded; upload nothing.")
    ] = False,
) -> None:
    """Upload an adapter or a trained model to the Hugging Face Hub, with a model card."""
    with readable_errors():
        from t2ilib.hub.folder import prepare
        from t2ilib.hub.upload import push as upload
        from t2ilib.report.tables import format_table

        folder = prepare(run, to, license)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        sizes = [{"file": str(path.relative_to(folder)), "MB": f"{path.stat().st_size / 1e6:,.2f}"} for path in files]
        print(format_table(sizes))
        if dry_run:
            print(f"\n{(folder / 'README.md').read_text(encoding='utf-8')}")
        if license is None:
            print("The card says no licence: give one with --license.")
        print(f"{folder} is ready for {to}" if dry_run else f"uploaded: {upload(folder, to, private)}")
