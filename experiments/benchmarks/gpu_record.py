"""The record of a benchmark: rows that are taken one after the other, each written down as soon as it is known.

A row that fails is recorded with the end of its traceback and does not stop the next. A row that no longer fits into the time
is left out by name. The file is written anew after every row, by draft and rename, so whatever ends the process leaves a whole one.
"""

import contextlib
import gc
import io
import json
import math
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GRACE = 15.0
"""Seconds that the last row may go on after the time is over, before it is interrupted."""
PATIENCE, LEAST_PATIENCE = 5.0, 90.0
"""A row may take so many times what was expected of it, and so many seconds in any case."""
LINES = 12
"""Of a traceback, from its end."""


class NotHere(Exception):
    """A row that cannot be taken, for a reason that is no failure of what it measures: it says which."""


class Figures(dict[str, Any]):
    """What a row found, by name. `exceeded`: what lies outside its tolerance, in words; a row with any has failed."""

    def __init__(self) -> None:
        super().__init__()
        self.exceeded: list[str] = []

    def within(self, name: str, value: float, most: float) -> None:
        """Notes `value` and what it may be at most. NaN is never within."""
        self[name], self[f"{name}_allowed"] = value, most
        if not value <= most:
            self.exceeded.append(f"{name} is {value:.3g}, and {most:.3g} is allowed")


@dataclass(frozen=True)
class Row:
    """`take(figures)` measures and fills in what it finds as it finds it; `expected`: seconds, to know whether it still fits;
    `settings`: what is done; `shown`: the figures that its printed line has. `begin()`: has other cores begin with what the row
    will ask for; called for all rows before the first is taken."""

    group: str
    name: str
    expected: float
    take: Callable[[Figures], None]
    settings: Mapping[str, Any] = field(default_factory=dict)
    shown: tuple[str, ...] = ()
    begin: Callable[[], Any] | None = None


@dataclass
class Record:
    """`about`: machine and versions, the file's head. `rows`: what was taken so far, as it stands in the file."""

    path: Path
    about: Mapping[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, row: Row, status: str, seconds: float, figures: Mapping[str, Any], why: Sequence[str] = ()) -> None:
        told = {"why": list(why)} if why else {}
        self.rows.append(
            {
                "group": row.group,
                "row": row.name,
                "status": status,
                **told,
                "seconds": round(seconds, 2),
                "figures": plain(figures),
                "settings": plain(row.settings),
            }
        )
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps({"about": self.about, "rows": self.rows}, indent=1, allow_nan=False) + "\n")
        draft.replace(self.path)


def plain(value: Any) -> Any:
    """JSON values; a number that JSON has no word for becomes text."""
    if isinstance(value, Mapping):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value if isinstance(value, str | int | bool | None) else str(value)


def take_rows(rows: Sequence[Row], record: Record, seconds: float, begun: float | None = None) -> None:
    """Takes rows in order into `record`, until `seconds` after `begun` (`time.monotonic`; None: now) no further one fits."""
    begun = time.monotonic() if begun is None else begun
    for row in rows:
        if row.begin is not None:
            row.begin()
    for row in rows:
        left = seconds - (time.monotonic() - begun)
        if row.expected > left:
            reason = f"time: it takes some {row.expected:.0f} s, and {max(left, 0):.0f} s are left"
            record.add(row, "left out", 0.0, {}, [reason])
        else:
            take(row, record, min(max(LEAST_PATIENCE, PATIENCE * row.expected), left + GRACE))
        print(f"{row.group}, {row.name}: {record.rows[-1]['status']}, {record.rows[-1]['seconds']:.1f} s", flush=True)


def take(row: Row, record: Record, patience: float) -> None:
    """One row, whatever happens in it. What it prints (progress of training) is kept off the screen."""
    figures, started, status, why = Figures(), time.perf_counter(), "ok", []
    try:
        with limited(patience), contextlib.redirect_stdout(io.StringIO()):
            row.take(figures)
        if figures.exceeded:
            status, why = "failed", figures.exceeded
    except NotHere as reason:
        status, why = "left out", [str(reason)]
    except Exception as error:  # whatever it is, it belongs into the record, and the next row is another matter
        status, why = "failed", [*figures.exceeded, *told(error)]
    record.add(row, status, time.perf_counter() - started, figures, why)
    tidy()


def told(error: BaseException) -> list[str]:
    """The last lines of its traceback."""
    return [line for part in traceback.format_exception(error) for line in part.rstrip().splitlines()][-LINES:]


def tidy() -> None:
    """Gives back to the device what a row, failed ones included, no longer holds."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises TimeoutError inside the scope after so many seconds; where there are no alarms (Windows, other threads) it does not."""

    def ring(number: int, frame: Any) -> None:
        raise TimeoutError(f"interrupted after {seconds:.0f} s")

    try:
        handler = signal.signal(signal.SIGALRM, ring)
    except (AttributeError, ValueError):
        yield
        return
    outer, started = signal.setitimer(signal.ITIMER_REAL, seconds)[0], time.monotonic()
    try:
        yield
    finally:
        rest = max(0.001, outer - (time.monotonic() - started)) if outer else 0.0
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, rest)


def table(rows: Sequence[Row], record: Record) -> str:
    """A line a row: what was measured, or why it was not."""
    return "\n".join(line_of(row, found) for row, found in zip(rows, record.rows, strict=True))


def line_of(row: Row, found: Mapping[str, Any]) -> str:
    figures = [
        f"{name.replace('_', ' ')} {short(found['figures'][name])}" for name in row.shown if name in found["figures"]
    ]
    why = found["why"][-1:] if "why" in found else []
    return f"{row.group:<11}  {row.name:<47}  {found['status']:<8}  {found['seconds']:6.1f} s  {', '.join([*figures, *why])}"


def short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
