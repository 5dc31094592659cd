"""What all visitors of a page share: the desk that draws, the folder of results, and where pictures are written.

Every picture is written into `out` with its settings in it, and what the page shows is a copy of that very file, byte for byte, in a folder of
the server's own, under a name that cannot be guessed. So nothing that lies under the results is ever given out by its path.
"""

import contextlib
import logging
import secrets
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from t2ilib.app.choices import newest_for
from t2ilib.app.visitors import Visitor, Visitors
from t2ilib.config import ConfigError, ModelConfig
from t2ilib.drawing.desk import Desk, Drawing, Picture, Progress
from t2ilib.drawing.finding import Found, base_of, change_base, list_adapters
from t2ilib.drawing.settings import USUAL_STEPS, AdapterChoice, DrawSettings
from t2ilib.evaluation.sampling import save_png
from t2ilib.tracking.models import registered
from t2ilib.tracking.store import database_file, tracking_uri

log = logging.getLogger(__name__)

PREVIEWS = 4
"""Of a batch, at the most: seeing costs a pass of the VAE."""
SECONDS_BETWEEN_WORDS = 0.25
"""Between two messages of how far it is, where nothing else is to be shown."""


class Studio:
    """`model`, `adapters`: what a new page begins with; no adapters means the newest one that goes with the base. `out`: where pictures are
    written, `app` under the results where it is None. Raises ConfigError for a base or an adapter that is none."""

    def __init__(
        self,
        results: Path = Path("results"),
        model: str | None = None,
        adapters: Sequence[str] = (),
        out: Path | None = None,
        desk: Desk | None = None,
    ):
        self.results, self.adapters = Path(results), tuple(adapters)
        self.out = Path(out) if out else self.results / "app"
        self.desk = desk or Desk(self.results)
        own = [base_of(AdapterChoice(path=path), self.results) for path in self.adapters]
        base = next((model for model in own if model is not None), ModelConfig())
        self.model = change_base(base, base=model)
        self.visitors = Visitors(lambda: self.model)
        self.folder = tempfile.TemporaryDirectory(prefix="t2ilib-app-")
        self.served = Path(self.folder.name).resolve()
        self.saving = threading.Lock()

    def close(self) -> None:
        """Stops all that is being drawn, without waiting for the step that it is at, and deletes what was served."""
        self.visitors.close()
        self.folder.cleanup()

    def runs(self) -> list[Found]:
        """The adapters of all runs, newest first."""
        return list_adapters(self.results)

    def registered(self, anywhere: bool = False) -> list[str]:
        """The adapters of MLflow's registry. A store that is not on this machine is asked only when it is to be looked for `anywhere`: one that
        does not answer is waited for. Raises ConfigError for a store that cannot be used."""
        store = tracking_uri(None, self.results)
        return registered(store) if anywhere or database_file(store) is not None else []

    def first_adapters(self, runs: Sequence[Found]) -> tuple[str, ...]:
        """The adapters that a new page begins with, as the page has them."""
        return self.adapters or tuple(filter(None, [newest_for(runs, self.model.base)]))

    def follow(
        self, visitor: Visitor, settings: Sequence[DrawSettings], beside_base: bool = False, previews: bool = True
    ) -> Iterator[Progress | Drawing]:
        """`Desk.stream` of settings for a visitor, who can stop it, without the messages that nobody could read so fast."""
        steps = settings[0].num_inference_steps or USUAL_STEPS
        every = max(2, -(-steps // (PREVIEWS + 1))) if previews else 0
        with visitor.at_work() as stop:
            stream = self.desk.stream(settings, beside_base=beside_base, stop=stop, preview_every=every)
            with contextlib.closing(stream):
                last = float("-inf")
                for event in stream:
                    now = time.monotonic()
                    shows = isinstance(event, Drawing) or event.finished or event.previews
                    if shows or now - last >= SECONDS_BETWEEN_WORDS:
                        last = now
                        yield event

    def keep(self, picture: Picture) -> Path:
        """Writes a picture, and the base's beside it, with their settings; returns the path of the first."""
        return picture.save(self.out)

    def serve(self, path: Path) -> str:
        """A copy of a file that can be given out, under its own name, in a folder named by what is in it."""
        from gradio.processing_utils import save_file_to_cache

        return save_file_to_cache(path, str(self.served))

    def serve_bare(self, image: Image.Image) -> str:
        """A picture that can be given out and tells nothing of itself: no text, a name that all have."""
        target = self.served / secrets.token_hex(16) / "picture.png"
        target.parent.mkdir(parents=True)
        save_png(image, target, {})
        return str(target)

    def free_folder(self, name: str) -> Path:
        """A folder of this name under `out` that is not there yet; a number behind it where one is."""
        for number in range(1, 10_000):
            folder = self.out / (name if number == 1 else f"{name}-{number}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir(parents=True)
                return folder
        raise ConfigError(f"{self.out} is full of folders called {name}: clear it up")

    def numbered(self, name: str, ending: str) -> Path:
        """A file under `out` that is not there yet, taken by an empty one."""
        self.out.mkdir(parents=True, exist_ok=True)
        for number in range(10_000):
            path = self.out / f"{name}-{number:02d}{ending}"
            with contextlib.suppress(FileExistsError):
                path.touch(exist_ok=False)
                return path
        raise ConfigError(f"{self.out} is full of files called {name}: clear it up")
