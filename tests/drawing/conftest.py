"""The results folder that the tests of drawing look into, trained once."""

from small_runs import results  # noqa: F401
