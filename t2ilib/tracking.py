"""Everything that speaks to MLflow. The loop knows only `Tracker`; without an experiment it gets one that does nothing.
"""

from pathlib import Path
from typing import Protocol

from PIL import Image


class Tracker(Protocol):
    """What the loop and the notebooks log. Steps are optimizer steps."""

    def log_metrics(self, values: dict[str, float], step: int) -> None: ...
    def log_image(self, image: Image.Image, key: str, step: int) -> None: ...
    def log_datasets(self, training, held_out) -> None: ...
    def log_artifact(self, path: Path, folder: str | None = None) -> None: ...
    def flush(self) -> None: ...


class NullTracker:
    """Logs nothing."""

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        pass

    def log_image(self, image: Image.Image, key: str, step: int) -> None:
        pass

    def log_datasets(self, training, held_out) -> None:
        pass

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        pass

    def flush(self) -> None:
        pass
