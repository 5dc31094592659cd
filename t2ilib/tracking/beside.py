"""TensorBoard and Weights & Biases beside MLflow, through Accelerate's trackers: the same metrics by the same names, sample grids, and
the animations of a run's progress. Files, data sets and models are MLflow's, and lie in the run's folder anyway.

Each is begun by the first thing that is logged, below `run.output`, and taken up again by a resumed run: what is there is not logged
again, which each is asked for itself, because a process that was killed knows least what it had written. Without a login, W&B works offline:
it asks nothing, and `wandb sync` uploads its folders later. Its steps cannot go back: grids of before a kill that it lost stay lost.
"""

import functools
import importlib.util
import json
import logging
import os
import struct
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2ilib.config import ConfigError, RunConfig
from t2ilib.tracking.naming import run_tags, shown_name, telling_fields

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

PROJECT = "t2ilib"
"""Of W&B, where no `tracking.experiment` names one."""
BLOCK, HEADER = 2**15, 7
"""Bytes of a block of W&B's transaction log, and of the header of a record in it, and of the file."""


def require_installed(names: Sequence[str]) -> None:
    """Raises ConfigError for a tracker whose package is not there, with what installs it."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"tracking.beside: {name} is not installed: pip install 't2ilib[{name}]'")


class Beside:
    """What is not logged beside MLflow, and that nothing is begun before something is logged."""

    def __init__(self, run: RunConfig):
        self.run, self.begun = run, False

    @functools.cached_property
    def opened(self) -> Any:
        """Accelerate's tracker, begun by being asked for."""
        from accelerate import PartialState

        PartialState()  # trackers ask it which process they are in
        tracker = self.begin()
        self.begun = True
        return tracker

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        self.log({shown_name(name): float(value) for name, value in values.items()}, step)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        if path.is_dir():
            for file in sorted(path.glob("*.gif")):
                self.log_animation(file, f"{path.name}/{file.stem}", self.run.training.steps)

    def log_datasets(self, training: Any, held_out: Any) -> None:
        pass

    def log_adapter(self, file: Path, base: str, side: int) -> None:
        pass

    def flush(self) -> None:
        pass


class TensorBoard(Beside):
    """`output`/tensorboard/<digest of the settings>: other settings are another run."""

    def begin(self) -> Any:
        from accelerate.tracking import TensorBoardTracker

        digest = self.run.training_digest()
        folder = self.run.output / "tensorboard"
        self.last = last_events(folder / digest)
        tracker = TensorBoardTracker(digest, folder)
        tracker.start()
        if not self.last:
            tracker.store_init_configuration({name: str(value) for name, value in config_of(self.run).items()})
        return tracker

    def new(self, name: str, step: int) -> bool:
        return step > self.last.get(name, -1)

    def log(self, values: Mapping[str, float], step: int) -> None:
        opened = self.opened
        if told := {name: value for name, value in values.items() if self.new(name, step)}:
            opened.log(told, step=step)

    def log_image(self, image: "Image", key: str, step: int) -> None:
        import numpy as np

        opened = self.opened
        if self.new(key, step):
            opened.log_images({key: np.asarray(image.convert("RGB"))[None]}, step=step, dataformats="NHWC")

    def log_animation(self, file: Path, key: str, step: int) -> None:
        """As it is: browsers play a GIF among the images."""
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary

        opened = self.opened
        if self.new(key, step):
            with Image.open(file) as frame:
                size = {"width": frame.width, "height": frame.height, "colorspace": 3}
            image = Summary.Image(encoded_image_string=file.read_bytes(), **size)
            opened.tracker.file_writer.add_summary(Summary(value=[Summary.Value(tag=key, image=image)]), step)

    def end(self, status: str, why: str = "") -> None:
        if self.begun:
            self.opened.finish()


class WandB(Beside):
    """A run of W&B that resumed runs go on with, each in a folder of its own below `output`/wandb. Its id begins with the digest of the
    settings: other settings are another run."""

    def begin(self) -> Any:
        os.environ.setdefault(
            "WANDB_DISABLE_WEAVE", "true"
        )  # or it is advertised to whoever has loaded huggingface_hub
        import wandb
        from accelerate.tracking import WandBTracker

        self.run.output.mkdir(parents=True, exist_ok=True)
        digest = self.run.training_digest()
        before = sorted((self.run.output / "wandb").glob(f"*run-*-{digest}*"))
        tracker = WandBTracker(
            self.run.tracking.experiment or PROJECT,
            id=id_of(before[-1]) if before else digest + uuid.uuid4().hex[:8],
            name=self.run.name,
            dir=str(self.run.output),
            resume="allow",
            mode=wandb_mode(),
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )
        tracker.start()
        self.last = last_row(before) if tracker.run.offline else tracker.run.step - 1
        self.at = self.last
        tracker.store_init_configuration(config_of(self.run))
        return tracker

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """A row of the history is written when the next begins, and not added to: what comes to the last one of an earlier start is
        among the final numbers alone."""
        opened = self.opened
        if step > self.last and step >= self.at:
            self.at = step
            opened.log(dict(values), step=step)
        elif step == self.last:
            opened.run.summary.update(dict(values))

    def log_image(self, image: "Image", key: str, step: int) -> None:
        import wandb

        self.log({key: wandb.Image(image)}, step)

    def log_animation(self, file: Path, key: str, step: int) -> None:
        import wandb

        self.log({key: wandb.Video(str(file), format="gif")}, step)

    def end(self, status: str, why: str = "") -> None:
        if self.begun:
            import wandb

            run, code = self.opened.run, int(status != "FINISHED")
            run.finish(exit_code=code)
            wandb.teardown(code)  # waits until all is written, and ends W&B's own process
            if run.offline:
                log.info("W&B is offline: `wandb sync %s` uploads the run", Path(run.dir).parent)


BESIDE = {"tensorboard": TensorBoard, "wandb": WandB}


def config_of(run: RunConfig) -> dict[str, Any]:
    """The settings that MLflow has as parameters, and its tags."""
    return telling_fields(run) | {f"tag.{name}": value for name, value in run_tags(run).items()}


def last_events(folder: Path) -> dict[str, int]:
    """Tag -> step of its last scalar or image in TensorBoard's files of a folder; the end of one that was cut off is left out."""
    if not folder.exists():
        return {}
    from tensorboard.backend.event_processing.event_accumulator import IMAGES, SCALARS, EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.WARNING)  # or it tells of every file that it has read to its end
    events = EventAccumulator(str(folder), size_guidance={SCALARS: 1, IMAGES: 1}).Reload()  # of each the last
    scalars = {tag: events.Scalars(tag)[-1].step for tag in events.Tags()[SCALARS]}
    return scalars | {tag: events.Images(tag)[-1].step for tag in events.Tags()[IMAGES]}


def id_of(folder: Path) -> str:
    """Of W&B's run, from a folder of its: (offline-)run-<date>_<time>-<id>, behind which a second start in the same second has a -1."""
    return folder.name.partition("run-")[2].split("-")[1]


def wandb_mode() -> str:
    """WANDB_MODE; else online where there is a login, and offline where W&B would ask for one."""
    import wandb
    from requests.utils import get_netrc_auth

    if mode := os.environ.get("WANDB_MODE"):
        return mode
    settings = wandb.setup().settings
    return "online" if settings.api_key or get_netrc_auth(settings.base_url) else "offline"


def last_row(folders: Sequence[Path]) -> int:
    """The last step of the history in W&B's folders of earlier starts, -1 without one."""
    steps = [row["_step"] for folder in folders for file in folder.glob("*.wandb") for row in read_history(file)]
    return max(steps, default=-1)


def read_history(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of the history in a transaction log of W&B, as far as it was written.

    A header of HEADER bytes, then LevelDB's log format: blocks of BLOCK bytes, in which each piece of a record has its checksum (4 bytes),
    length (2) and kind (1: a whole record, 2, 3 and 4: its first, middle and last piece).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = file.read_bytes(), HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # too little for a header: filled up
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        piece = data[at + HEADER : at + HEADER + length]
        if kind not in (1, 2, 3, 4) or len(piece) < length:
            return
        at, record = at + HEADER + length, record + piece
        if kind in (1, 4):
            told, record = Record.FromString(record), b""
            if told.WhichOneof("record_type") == "history":
                yield {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in told.history.item}
