"""Mistakes of those who write configs, and the name that they probably meant."""

import difflib
from collections.abc import Iterable
from typing import Any


class ConfigError(ValueError):
    """A mistake in a configuration, told in one screen: field, value, what is allowed."""


def check_choice(value: str, allowed: Iterable[str], what: str) -> str:
    """`value` if it is one of `allowed`; otherwise ConfigError that names the right ones and the likely intended one."""
    allowed = list(allowed)
    if value in allowed:
        return value
    names = [str(name) for name in allowed]
    raise ConfigError(f"{what} {value!r} does not exist; choose from {', '.join(names)}.{did_you_mean(value, names)}")


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """ " Did you mean ...?", where one of `known` is near; otherwise nothing."""
    near = difflib.get_close_matches(str(name), sorted(known), 1, 0.5)
    return f" Did you mean {near[0]!r}?" if near else ""
