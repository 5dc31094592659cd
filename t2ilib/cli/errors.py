"""A mistake of the user's is one message and exit code 2, without a traceback."""

import contextlib
from collections.abc import Iterator

import typer

from t2ilib.cli.launcher import tells_mistakes


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
            raise SystemExit(2) from None
        typer.secho(f"{type(error).__name__}: {error}", fg=typer.colors.RED, err=True)
        raise SystemExit(2) from None
