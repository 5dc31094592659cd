"""Pictures that are drawn once: each lies in a folder under a digest of all that decides it, and what lies there is not drawn again.

So a page of many pictures that was interrupted goes on where it was, and more of them cost only what is new. The files say nothing of how
they were drawn: they may be shown to people who are not to know.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from t2ilib.adapters.load import adapter_file
from t2ilib.drawing.desk import Desk, Progress, Watch
from t2ilib.drawing.grid import changes_of
from t2ilib.drawing.judging import weights_digest
from t2ilib.drawing.settings import AdapterChoice, DrawSettings
from t2ilib.text import shown
from t2ilib.training.checkpoint import file_digest

PARTS = 5
"""How often it is told how far a drawing is."""


def draw_kept(
    desk: Desk,
    settings: Sequence[DrawSettings],
    folder: Path,
    say: Callable[[str], None] = lambda line: None,
    watch: Watch | None = None,
) -> list[Path]:
    """The file of each of these single pictures, in order; those that are not in `folder` yet are drawn, so that adapters change least
    often. `say` is told how far it is in a few lines, `watch` as `Desk.draw` tells it. Raises ConfigError as that does."""
    folder.mkdir(parents=True, exist_ok=True)
    weights: dict[AdapterChoice, str] = {}
    files = [folder / f"{digest_of(one, weights)}.png" for one in settings]
    lacking = {file: one for file, one in zip(files, settings, strict=True) if not file.is_file()}
    ordered = in_order(lacking)
    written, told = iter(ordered), 0

    def look(progress: Progress) -> None:
        nonlocal told
        if watch is not None:
            watch(progress)
        for picture in progress.finished:
            file = next(written)
            draft = file.with_suffix(".part")
            picture.image.save(draft, "PNG")
            draft.replace(file)
        if progress.finished and (part := PARTS * progress.done // progress.total) > told:
            told = part
            say(f"{shown(folder)}: {progress.done} of {progress.total} pictures drawn")

    desk.draw([lacking[file] for file in ordered], watch=look)
    return files


def in_order(settings: dict[Path, DrawSettings]) -> list[Path]:
    """The files in the order in which their pictures load least: see `Grid.order`."""
    ranks: list[dict[Any, int]] = [{}, {}, {}]

    def rank(file: Path) -> tuple[int, ...]:
        changes = changes_of(settings[file])
        return tuple(seen.setdefault(key, len(seen)) for seen, key in zip(ranks, changes, strict=True))

    return sorted(settings, key=rank)


def digest_of(settings: DrawSettings, weights: dict[AdapterChoice, str]) -> str:
    """Of all that decides a picture; of adapters their weights count, wherever they lie. `weights`: what was looked at already."""
    for choice in settings.adapters:
        if choice not in weights:
            weights[choice] = choice_digest(choice)
    told = settings.model_dump(mode="json", exclude={"adapters"})
    told["adapters"] = [
        [weights[choice], choice.strength, *(["partial"] if choice.partial else [])] for choice in settings.adapters
    ]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:20]


def choice_digest(choice: AdapterChoice) -> str:
    """Of the weights of an adapter on disk, at the step that is chosen; raises ConfigError where there is none."""
    if choice.step is not None:
        return weights_digest(Path(choice.path), choice.step)
    return file_digest(adapter_file(Path(choice.path)))
