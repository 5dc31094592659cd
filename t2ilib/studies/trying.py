"""Which values a search tries next, from what it has tried: pure functions, so that a search that was killed goes on as it would have.

First a grid from end to end of the range. While the best value lies at an end of what was tried, the range is extended there by a factor,
for the best may lie outside; then the budget's other trials, which a sampler chooses (`trials`). A trial whose loss was not finite counts as
tried and worse than all others: a rate at which training diverges is the far side of a U like any other.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from t2ilib.studies.search import EXTENSION, GRID, Search, Searched, kind_of, significant

ENDED = ("scored", "diverged", "given up")
Allowed = Callable[[Mapping[str, Any]], bool]
"""Whether RunConfig takes these values."""
State = Literal["waiting", "running", "scored", "diverged", "given up"]


@dataclass(frozen=True)
class Tried:
    """A trial. `values`: `section.field` -> value; `gain`: its score, the other way round where less is better, so that more is; `extends`:
    whether it was made because the best value lay at an end; `failures`: how often its notebook failed for another reason than its loss;
    `seconds`: what its notebooks took."""

    number: int
    state: State
    values: Mapping[str, Any]
    gain: float | None = None
    extends: bool = False
    failures: int = 0
    seconds: float = 0.0

    @property
    def ended(self) -> bool:
        return self.state in ENDED


@dataclass(frozen=True)
class Next:
    """What a search does: a trial of `fixed` values (which `extends` the range), or, with `ask`, of the sampler's; it waits for trials that
    are not ended; or it ends, and says `why`."""

    fixed: Mapping[str, Any] | None = None
    extends: bool = False
    ask: bool = False
    why: str = ""

    @property
    def waits(self) -> bool:
        return self.fixed is None and not self.ask and not self.why


def best_of(tried: Sequence[Tried]) -> Tried | None:
    """The trial that gained most; of several that gained as much the one in the middle of their values. None where none has a score."""
    scored = [trial for trial in tried if trial.state == "scored"]
    if not scored:
        return None
    most = max(trial.gain for trial in scored)
    level = [trial for trial in scored if trial.gain == most]
    level.sort(key=lambda trial: ([v for v in trial.values.values() if isinstance(v, int | float)], trial.number))
    return level[len(level) // 2]


def at_end(tried: Sequence[Tried], search: Search, allowed: Allowed = lambda values: True) -> dict[str, str]:
    """`section.field` -> "low" or "high", of the ranges in which the best value is the lowest or highest that was tried, and not shown to be
    a best one. Of choices nothing can lie beyond, nor where RunConfig has nothing there (`allowed`), as below a dropout of 0."""
    best = best_of(tried)
    found: dict[str, str] = {}
    for address, field in search.items():
        values = [t.values[address] for t in tried if t.state in ("scored", "diverged") and address in t.values]
        if best is None or field.choices or address not in best.values or len(set(values)) < 2:
            continue
        for end, last in (("low", min(values)), ("high", max(values))):
            if best.values[address] == last and allowed({**best.values, address: beyond(address, field, last, end)}):
                found[address] = end
    return found


def beyond(address: str, field: Searched, value: float, end: str) -> float:
    """What lies next outside a range: by EXTENSION where it goes by ratios, otherwise by a step of it."""
    whole = kind_of(address) is int
    if field.log:
        moved = significant(value / EXTENSION if end == "low" else value * EXTENSION)
    else:
        step = field.step or (field.high - field.low) / (GRID - 1)
        moved = value - step if end == "low" else value + step
    return round(moved) if whole else moved


def extension(tried: Sequence[Tried], search: Search, allowed: Allowed) -> dict[str, Any] | None:
    """The best trial's values, one of them beyond the end that it lies at. None where the best lies inside, and where the range has another
    form than real numbers by ratios: a rank is not extended, for it costs, nor a share, whose ends are meant."""
    best = best_of(tried)
    for address, end in at_end(tried, search, allowed).items():
        if search[address].log and kind_of(address) is float:
            return {**best.values, address: beyond(address, search[address], best.values[address], end)}
    return None


def next_trial(
    tried: Sequence[Tried],
    search: Search,
    grid: Sequence[Mapping[str, Any]],
    trials: int,
    hours: float | None,
    extensions: int,
    allowed: Allowed,
) -> Next:
    """What comes next of a search that has `tried` these. The grid is made in any case; then `hours` of its notebooks end it, or `trials`
    with its best value inside the range, or so many `extensions` beyond them."""
    if len(tried) < len(grid):
        return Next(fixed=grid[len(tried)])
    if not search:
        return Next(why="there is nothing to search")
    if hours is not None and sum(trial.seconds for trial in tried) >= 3600 * hours:
        return Next(why=f"its {hours:g} h are spent")
    ended = sum(trial.ended for trial in tried)
    if ended < len(grid):
        return Next()
    if ended == len(tried) and sum(trial.extends for trial in tried) < extensions:
        beyond = extension(tried, search, allowed)
        if beyond is not None:
            return Next(fixed=beyond, extends=True)
    if len(tried) < trials:
        return Next(ask=True)
    if ended < len(tried):
        return Next()
    more = f", and {len(tried) - trials} more because the best lay at an end" if len(tried) > trials else ""
    return Next(why=f"its {trials} trials are made{more}")
