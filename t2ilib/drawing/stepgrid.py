"""One grid of checkpoint x strength x noise: how people look for the checkpoint to keep, the base without an adapter in the first column.

    sheet = plan_sheet(settings, "a red heart", "results/cat", [100, 200, 300], [0.5, 1.0], [0, 1])
    files = draw_kept(desk, sheet.jobs(), folder)
    shown = sheet.filled(files)

A row is a strength and a noise, a column a checkpoint; all pictures of a row have the same noise, and the base's does not depend on the
strength. Importing this imports no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from t2ilib.config import ConfigError
from t2ilib.drawing.settings import DrawSettings

MOST_COLUMNS = 6
STRENGTHS = (0.5, 0.75, 1.0)
NOISES = (0, 1)


@dataclass(frozen=True)
class StepRow:
    """`cells`: the settings of the base alone, then of every step; `files`: their pictures, once they are drawn."""

    strength: float
    noise: int
    cells: tuple[DrawSettings, ...]
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class StepSheet:
    """The grid of a prompt: `steps` are its columns behind the base's."""

    prompt: str
    steps: tuple[int, ...]
    rows: tuple[StepRow, ...]

    def jobs(self) -> list[DrawSettings]:
        """What is drawn, row by row."""
        return [cell for row in self.rows for cell in row.cells]

    def filled(self, files: Sequence[Path]) -> "StepSheet":
        """The sheet with the files of its `jobs`."""
        width = 1 + len(self.steps)
        parts = [tuple(files[start : start + width]) for start in range(0, len(files), width)]
        return replace(self, rows=tuple(replace(row, files=part) for row, part in zip(self.rows, parts, strict=True)))


def plan_sheet(
    settings: DrawSettings,
    prompt: str,
    run: Path | str,
    steps: Sequence[int],
    strengths: Sequence[float] = STRENGTHS,
    noises: Sequence[int] = NOISES,
) -> StepSheet:
    """The grid of a run's folder. `settings`: the base and how pictures are drawn; `noises`: seeds of the pictures' noise.

    Raises ConfigError for values that settings cannot have, and for an empty axis.
    """
    if not (steps and strengths and noises):
        raise ConfigError("a grid needs a checkpoint, a strength and a noise at least")
    rows = []
    for strength in strengths:
        for noise in noises:
            plain = settings.changed(prompt=prompt, seed=noise, first=0, num_pictures=1, adapters=())
            adapters = [[{"path": str(run), "step": step, "strength": strength}] for step in steps]
            rows.append(StepRow(strength, noise, (plain, *(plain.changed(adapters=own) for own in adapters))))
    return StepSheet(prompt, tuple(steps), tuple(rows))


def columns(steps: Sequence[int], always: Sequence[int] = (), most: int = MOST_COLUMNS) -> list[int]:
    """At most so many of the steps, evenly, the first and the last among them, and those of `always` in any case."""
    kept = {step for step in always if step in steps}
    room = max(0, most - len(kept | {steps[0], steps[-1]}))
    kept |= {steps[0], steps[-1]} if most > len(kept) else set()
    between = [step for step in steps if step not in kept]
    if room >= len(between):
        return sorted(kept | set(between))
    return sorted(kept | {between[(2 * i + 1) * len(between) // (2 * room)] for i in range(room)})
