"""The results folder that the tests of the app look into, trained once."""

from small_runs import results  # noqa: F401
