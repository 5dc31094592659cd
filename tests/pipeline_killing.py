"""Kills a pipeline with kill -9 in each of its steps, and lets it end: `python pipeline_killing.py FOLDER`.

Like `killing`, one process imports all that is needed, and forks those that are killed: each kills itself in the middle of one step, and behind
it, before its mark. FOLDER/killed is the pipeline that is killed and begun again, FOLDER/straight one that nothing disturbed.
"""

import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import yaml
from coco_shaped import write_coco

from t2ilib.data.download import remote
from t2ilib.pipeline import captioning, drawing, measuring, running
from t2ilib.pipeline.marks import FOLDER
from t2ilib.pipeline.running import run_pipeline
from t2ilib.training import state

KEPT = 2
"""Steps of which a checkpoint is there when the training is killed."""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def deadly(place: object, name: str, times: int = 1) -> None:
    """Has this process kill itself behind the call of a function, or some of them."""
    function, calls = getattr(place, name), []

    def call(*arguments, **named):
        found = function(*arguments, **named)
        calls.append(name)
        if len(calls) == times:
            die()
        return found

    setattr(place, name, call)


def half_written(path: Path, rows: list) -> None:
    path.with_name(f".{path.name}.part").write_text("part,picture")
    die()


MIDDLES: dict[str, Callable[[], None]] = {
    "download": lambda: (setattr(remote, "CHUNK", 4000), deadly(remote, "continues"), cut(remote)),
    "process": lambda: setattr(captioning, "write_rows", half_written),
    "train": lambda: deadly(state, "save_checkpoint"),
    "measure": lambda: deadly(measuring, "measure"),
    "draw": lambda: deadly(drawing, "save_pictures"),
}
"""Step -> what has a process kill itself in it."""


def cut(place: object) -> None:
    """The connection of the first file ends after its first piece; going on with it is what `continues` is asked about."""
    receive = place.receive

    def call(session, url, part, *rest):
        if not part.exists():
            part.write_bytes(session.get(url).content[:4000])
            raise place.Interrupted("cut")
        return receive(session, url, part, *rest)

    place.receive = call


def settings(folder: Path) -> Path:
    file = folder / "pipeline.yaml"
    values = {
        "output": str(folder / "out"),
        "download": {"folder": str(folder / "coco"), "server": str(folder.parent / "served")},
        "run": {
            "model": {"base": "tiny-sd15"},
            "adapter": {"rank": 2},
            "data": {
                "validation_split": "val",
                "captions": ["drop_adverbs"],
                "max_rejected": 0.5,
                "cache_path": str(folder / "cache"),
            },
            "training": {"steps": 4, "batch_size": 2, "checkpoint_every": KEPT},
            "evaluation": {"validate_every": 0, "validation_timesteps": 1, "sample_every": 0, "num_inference_steps": 1}
            | {"prompts": ["a dog", "a cat"], "animation": "none", "measures": []},
        },
    }
    folder.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump(values))
    return file


def work(file: Path, prepare: Callable[[], object]) -> int:
    """The status of a child that goes through the pipeline."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with (file.parent / "output.txt").open("a") as told:
                os.dup2(told.fileno(), 1)
                os.dup2(told.fileno(), 2)
            logging.basicConfig(level=logging.INFO)
            prepare()
            run_pipeline(file)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def marks(folder: Path) -> list[str]:
    return sorted(path.name.split("-")[0].removesuffix(".json") for path in (folder / "out" / FOLDER).glob("*.json"))


def main(folder: Path) -> None:
    write_coco(folder / "served")
    straight, killed = settings(folder / "straight"), settings(folder / "killed")
    print(json.dumps(["straight", work(straight, lambda: None), marks(straight.parent)]), flush=True)
    for step, prepare in MIDDLES.items():
        print(json.dumps([step, work(killed, prepare), marks(killed.parent)]), flush=True)
    behind = lambda: setattr(running, "write_mark", lambda *told: die())  # noqa: E731
    print(json.dumps(["mark", work(killed, behind), marks(killed.parent)]), flush=True)
    print(json.dumps(["end", work(killed, lambda: None), marks(killed.parent)]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
