"""A mistake of the user's is one message and exit code 2, without a traceback."""

import contextlib
import time
from collections.abc import Iterator

import typer

from t2ilib.cli.launcher import tells_mistakes

SECONDS_FOR_THE_FIRST = 30.0
"""Of several processes the first tells what all of them have found wrong, and its end is for the launcher to end the others; one that
left before it had spoken would be the end of it. Who still lives after so long has found something of its own, and tells it."""


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """A mistake of the user's is one message and exit code 2, without a traceback."""
    from pydantic import ValidationError

    try:
        yield
    except (ValueError, OSError) as error:
        if isinstance(error, ValidationError):
            raise
        if not tells_mistakes():
            time.sleep(SECONDS_FOR_THE_FIRST)
        typer.secho(f"{type(error).__name__}: {error}", fg=typer.colors.RED, err=True)
        raise SystemExit(2) from None
