"""A base with its adapters as they lie in memory: what is asked for is loaded where it differs from what is there, and the rest given back.

Another base takes the place of the last one before it is loaded, so that there are never two. Other adapters are put on the same base, which
is bit for bit what it was once they are off again; other strengths change nothing but factors.
"""

import contextlib
import hashlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from t2ilib.adapters.detach import Remembered, detach_adapters, remember, restore
from t2ilib.adapters.load import load_adapter, weigh_adapters
from t2ilib.adapters.tokens import load_embeddings
from t2ilib.config import ModelConfig
from t2ilib.drawing.checkpoints import write_step
from t2ilib.drawing.finding import resolve
from t2ilib.drawing.fit import free_memory
from t2ilib.drawing.settings import AdapterChoice, DrawSettings
from t2ilib.models.components import Components
from t2ilib.models.load import load_base
from t2ilib.runfile import load_run
from t2ilib.training.checkpoint import MANIFEST, file_digest, step_name
from t2ilib.training.state import changes_base

log = logging.getLogger(__name__)

DIGEST = 12
"""Hex digits of an adapter file's SHA-256."""


class Loaded:
    """`components`: the base with what is attached, None before the first `take`. `words`: file of embeddings -> what its word is called in
    prompts. `results`, `uri`: where `models:/...` is looked up, see `finding.resolve`."""

    def __init__(self, device: torch.device, results: Path, uri: str | None = None):
        self.device, self.results, self.uri = device, results, uri
        self.components: Components | None = None
        self.model: ModelConfig | None = None
        self.words: dict[str, str] = {}
        self.digests: dict[str, str] = {}
        self.places: list[Path] = []
        self.attached: tuple = ()
        self.bare: Remembered | None = None
        self.plain: Remembered | None = None
        self.scratch = tempfile.TemporaryDirectory(prefix="t2ilib-")

    def take(self, settings: DrawSettings) -> Components:
        """The components that draw by these settings. Raises ConfigError for what cannot be found, loaded or attached; what was there may be
        gone then, and is loaded again when it is asked for."""
        places = [resolve(choice, self.results, self.uri) for choice in settings.adapters]
        if self.components is None or settings.model != self.model:
            self.load(settings.model)
        wanted = (
            tuple(
                (*identity(place, choice.step), choice.partial)
                for place, choice in zip(places, settings.adapters, strict=True)
            ),
            tuple(identity(Path(file), None) for file in settings.embeddings),
        )
        if wanted != self.attached:
            self.detach()
            try:
                self.attach(settings, places, wanted[0])
            except BaseException:
                self.detach()
                raise
            self.attached = wanted
        self.weigh(settings.adapters)
        self.places = places
        for place, choice in zip(places, settings.adapters, strict=True):
            self.tell_another(place, choice)
        return self.components

    def load(self, model: ModelConfig) -> None:
        """Loads a base in the place of the last one, which is given back first."""
        self.drop()
        self.components = load_base(model, self.device)
        self.model, self.bare = model, remember(self.components)
        self.plain, self.attached = self.bare, ((), ())

    def drop(self) -> None:
        """Gives back the base and all that is attached to it."""
        self.components = self.model = self.bare = self.plain = None
        self.attached, self.words = (), {}
        free_memory(self.device)

    def detach(self) -> None:
        """Takes off what is attached."""
        if self.components is not None:
            detach_adapters(self.components, self.bare)
            self.plain, self.attached, self.words = self.bare, ((), ()), {}
            free_memory(self.device)

    def attach(self, settings: DrawSettings, places: list[Path], identities: tuple) -> None:
        files = [
            place if place.is_file() else self.written(place, choice.step, known)
            for place, choice, known in zip(places, settings.adapters, identities, strict=True)
        ]
        self.words = {file: load_embeddings(self.components, Path(file)) for file in settings.embeddings}
        self.plain = remember(self.components)
        for number, (file, choice) in enumerate(zip(files, settings.adapters, strict=True)):
            load_adapter(self.components, file, adapter_name(number), choice.partial)

    def written(self, run: Path, step: int, known: tuple) -> Path:
        """The adapter of a checkpoint as a file, which is written once."""
        folder = Path(self.scratch.name) / hashlib.sha256(repr(known).encode()).hexdigest()[:16] / step_name(step)
        done = next(folder.glob("*.written"), None)
        if done is None:
            model, anew = self.model, changes_base(load_run(run / "run.yaml"))
            try:
                file = write_step(self.components, run, step, folder)
            except BaseException:
                if anew:
                    self.drop()
                raise
            if anew:
                self.load(model)
            else:
                detach_adapters(self.components, self.bare)
            done = folder / f"{file.name}.written"
            done.touch()
        return done.with_suffix("")

    def weigh(self, adapters: tuple[AdapterChoice, ...]) -> None:
        if adapters:
            strengths = {adapter_name(number): choice.strength for number, choice in enumerate(adapters)}
            weigh_adapters(self.components, strengths)

    @contextlib.contextmanager
    def without_adapters(self, adapters: tuple[AdapterChoice, ...]) -> Iterator[Components]:
        """The base alone for as long as the scope lasts, with its own noise and words, and embeddings that were asked for; then as it was.
        `adapters`: those that are attached."""
        now = remember(self.components)
        restore(self.components, self.plain)
        self.weigh(tuple(choice.model_copy(update={"strength": 0.0}) for choice in adapters))
        try:
            yield self.components
        finally:
            restore(self.components, now)
            self.weigh(adapters)

    def tell_another(self, place: Path, choice: AdapterChoice) -> None:
        """Warns of an adapter's file that is another than a picture's settings say it was."""
        if choice.digest is not None and (now := self.digest_of(place, choice)) not in (None, choice.digest):
            log.warning(
                "%s is another adapter now (%s) than the picture was drawn with (%s)", choice.path, now, choice.digest
            )

    def digest_of(self, place: Path, choice: AdapterChoice) -> str | None:
        """Of an adapter's file; None for what is in a checkpoint alone."""
        if not place.is_file():
            return None
        known = repr(identity(place, choice.step))
        if known not in self.digests:
            self.digests[known] = file_digest(place)[:DIGEST]
        return self.digests[known]

    def told(self, settings: DrawSettings) -> tuple[AdapterChoice, ...]:
        """The adapters of the settings that were taken last, with their digests, as a picture's file says them."""
        return tuple(
            choice.model_copy(update={"digest": self.digest_of(place, choice)})
            for place, choice in zip(self.places, settings.adapters, strict=True)
        )


def adapter_name(number: int) -> str:
    """What an adapter is called among those that are attached."""
    return f"adapter{number}"


def identity(place: Path, step: int | None) -> tuple:
    """What changes where a file, or a run's checkpoint, is written anew."""
    file = place if place.is_file() else place / "checkpoints" / step_name(step or 0) / MANIFEST
    found = file.stat() if file.is_file() else None
    return str(file), found and (found.st_mtime_ns, found.st_size)
