"""Kills a training with kill -9 again and again, and says what every kill found: `python killing.py FOLDER KIND KILLS SEED`.

Imports take most of a short run's time, so one process imports all that the straight run had to, and forks the runs that are killed. It
computes nothing itself: its children would inherit locks of threads that they have not. FOLDER/killed is the run that is killed and begun again until it ends,
FOLDER/straight one that nothing disturbed. Moments are drawn from SEED: of any kind, of saving a checkpoint (there a run kills itself
behind a drawn call, for no watcher is quick enough), and at the two ends of a run.
"""

import contextlib
import importlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

from t2ilib.evaluation.measures import measure
from t2ilib.runfile import build_run
from t2ilib.shapes import source
from t2ilib.training import checkpoint, state
from t2ilib.training.checkpoint import load_latest
from t2ilib.training.history import read_rows
from t2ilib.training.loop import train

STEPS, EVERY = 30, 3
KINDS = {
    "adapter": {"adapter": {"rank": 4, "text_encoder_targets": "attention", "dropout": 0.2}},
    "unet": {"adapter": None, "training": {"trains": "unet", "ema_horizon": 20}},
}
FIRST, LAST = ("encoding",), ("model", "measuring")
"""Places of the first kills of a run and of the last ones; between them, every second falls into a checkpoint that is being saved."""
CALLS, SAVES = 22, 3
"""So many of the calls that change something on disk fall into no more than so many saves."""
LATE = "behind the end"
"""Where a kill comes that finds the run ended. It is none."""


def settings(output: Path, kind: str) -> dict:
    training = {"steps": STEPS, "batch_size": 2, "checkpoint_every": EVERY, "keep_checkpoints": 2}
    own = KINDS[kind]
    return own | {
        "name": "run",
        "output": str(output),
        "model": {"base": "tiny-sd15"},
        "data": {"source": "shapes", "cache_path": str(output.with_name(f"{output.name}-cache"))},
        "shapes": {"scenes": ["heart"], "num_pictures": 8, "checked_prompts": 2},
        "optimizer": {"schedule": "cosine", "warmup_steps": 5},
        "objective": {"caption_dropout": 0.2},
        "training": training | own.get("training", {}),
        "evaluation": {"validate_every": 15, "validation_timesteps": 1, "sample_every": 0, "num_inference_steps": 1}
        | {"prompts": ["a red heart"], "animation": "none"},
    }


def die_in_a_save(calls: int) -> None:
    """Has this process kill itself behind so many calls by which checkpoints are saved."""
    left = itertools.count(calls, -1)

    def deadly(function: Callable) -> Callable:
        def call(*arguments, **named):
            function(*arguments, **named)
            if next(left) <= 1:
                os.kill(os.getpid(), signal.SIGKILL)

        return call

    checkpoint.save_file, checkpoint.sync = deadly(checkpoint.save_file), deadly(checkpoint.sync)
    checkpoint.shutil = SimpleNamespace(rmtree=deadly(shutil.rmtree))


def tell_commits(note: Path) -> None:
    """Has this process write down every checkpoint that it was told is committed."""
    save = state.save_checkpoint

    def told(folder: Path, saved: checkpoint.Checkpoint, keep: int) -> None:
        save(folder, saved, keep)
        with note.open("a") as lines:
            lines.write(f"{saved.step}\n")

    state.save_checkpoint = told


def committed(output: Path) -> int:
    """The newest checkpoint that any process was told is committed."""
    note = output.with_name("committed.txt")
    return max(map(int, note.read_text().split()), default=0) if note.exists() else 0


def work(output: Path, kind: str) -> None:
    """What `t2ilib train` does, in a child that never returns; its global generators stand elsewhere every time."""
    torch.manual_seed(time.time_ns() % 2**31)
    random.seed()
    with (output.parent / "output.txt").open("a") as told:
        os.dup2(told.fileno(), 1)
        os.dup2(told.fileno(), 2)
    status = 1
    try:
        run = build_run(settings(output, kind))
        result = train(run)
        measure(run, result.components, metrics=result.metrics, prompts=result.prompts)
        (output.parent / "modules.txt").write_text("\n".join(sys.modules))
        status = 0
    finally:
        os._exit(status)


def start(output: Path, kind: str, calls: int | None = None) -> int:
    child = os.fork()
    if child == 0:
        if calls is not None:
            die_in_a_save(calls)
        if output.name == "killed":
            tell_commits(output.with_name("committed.txt"))
        work(output, kind)
    return child


def ended(child: int) -> bool:
    """Whether a child has ended, or killed itself; it stays to be waited for. Raises where it failed."""
    found = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if found and found.si_status not in (0, signal.SIGKILL):
        raise SystemExit(f"a run failed with {found.si_status}")
    return bool(found)


def finish(child: int) -> float:
    """Waits for a child to end by itself; returns the seconds that took."""
    begun = time.monotonic()
    while not ended(child):
        time.sleep(0.01)
    os.waitpid(child, 0)
    return time.monotonic() - begun


def logged(output: Path) -> int:
    return max((row["step"] for row in read_rows(output / "metrics.jsonl")), default=0)


def places(output: Path) -> dict[str, Callable[[], bool]]:
    """Name -> whether the run is there."""
    cache = output.with_name(f"{output.name}-cache")
    return {
        "saving": lambda: False,
        "encoding": lambda: any(cache.rglob("*")),
        "model": lambda: (output / ".model.saving").exists() or (output / "adapter").exists(),
        "measuring": lambda: logged(output) == STEPS and (output / "metrics.about.json").exists(),
    }


def kill_once(output: Path, kind: str, place: str, pause: float, calls: int | None) -> dict:
    """Starts the run, waits for `place` and then `pause` seconds, and kills it, unless it has killed itself by then. What was committed
    before must be there afterwards."""
    arrived = places(output).get(place, lambda: True)
    child, begun = start(output, kind, calls), time.monotonic()
    with contextlib.suppress(FileNotFoundError):  # of what is being renamed
        while not arrived() and not ended(child):
            time.sleep(0.0003)
    time.sleep(pause)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    found = load_latest(output / "checkpoints")
    kept = found.step if found else 0
    if kept < (told := committed(output)):
        raise SystemExit(f"step {told} was committed, and {kept} is there")
    return {
        "place": place if os.WIFSIGNALED(status) else LATE,
        "seconds": round(time.monotonic() - begun, 2),
        "kept": kept,
        "redone": max(0, logged(output) - kept) if kept < STEPS else 0,
    }


def main(folder: Path, kind: str, kills: int, seed: int) -> None:
    source.NUM_VALIDATION = 4
    chance, killed = random.Random(seed), folder / "killed"
    straight = finish(start(folder / "straight", kind))
    for name in (folder / "modules.txt").read_text().splitlines():
        if name.startswith(("torch", "diffusers", "transformers", "peft", "accelerate", "t2ilib", "PIL")):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    print(json.dumps({"straight": round(straight, 2)}), flush=True)
    number = kept = 0
    while number < kills:
        if number < len(FIRST):
            place, pause = FIRST[number], chance.uniform(0, 0.05 * straight)
        elif kills - number <= len(LAST):
            place, pause = LAST[number - kills], chance.uniform(0, 0.02)
        elif number % 2 and kept + SAVES * EVERY <= STEPS:
            place, pause = "saving", 0
        else:
            place, pause = "anywhere", chance.uniform(0, 0.3 * straight)
        found = kill_once(killed, kind, place, pause, chance.randint(1, CALLS) if place == "saving" else None)
        kept, number = found["kept"], number + (found["place"] != LATE)
        print(json.dumps(found), flush=True)
    finish(start(killed, kind))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
