"""`python -m t2ilib.cli`."""

from t2ilib.cli import app

app()
