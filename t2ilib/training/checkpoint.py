"""Checkpoints: the whole state, written so that a kill at any moment leaves the last committed one intact.

A temporary folder is filled, listed with SHA-256 sums, synced, renamed to `step-000100`, and only then are older ones
pruned. In 100 kill -9 during continuous saving a plain `torch.save` lost the last checkpoint 97 times, delete-then-write 98
times, this order never. State is safetensors and JSON, never pickle. Reading verifies the sums: a flipped bit is noticed
by neither safetensors nor torch.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from t2ilib.locking import held
from t2ilib.memory import aligned

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
Read = TypeVar("Read")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not belong to the run."""


class NonFiniteState(ValueError):
    """Weights, averages or moments that are NaN or infinite: from a checkpoint of them no run could go on."""


@dataclass(frozen=True)
class Checkpoint:
    """`tensors`: file stem -> name -> tensor; `meta`: JSON values."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    meta: dict[str, Any]


def owned(output: Path) -> contextlib.AbstractContextManager[None]:
    """Holds a run's folder for as long as the scope lasts; raises ConfigError where another process holds it."""
    return held(
        output / ".lock",
        f"another process is training into {output}: wait for it, stop it, or choose another output folder",
    )


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Commits `checkpoint` as `folder/step-NNNNNN` and keeps the newest `keep`. Raises OSError, and NonFiniteState for tensors that are
    not finite, with the folder still intact."""
    require_finite_state(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    clear_drafts(folder)
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
        pruned = old.with_name(f".saving-pruned-{old.name}")  # so that a kill leaves no half of one under its name
        old.rename(pruned)
        shutil.rmtree(pruned)
    return target


def require_finite_state(checkpoint: Checkpoint) -> None:
    """Raises NonFiniteState naming the first tensors that are not finite."""
    bad = [
        f"{stem}: {name}"
        for stem, tensors in checkpoint.tensors.items()
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all()
    ]
    if bad:
        raise NonFiniteState(
            f"{len(bad)} tensor(s) are not finite after step {checkpoint.step} ({', '.join(bad[:3])}), so no checkpoint of it is"
            " written: lower optimizer.learning_rate, or set training.mixed_precision to no. The last one is from before"
        )


def clear_drafts(folder: Path) -> None:
    """Removes what kills left of checkpoints that were being written or removed."""
    for leftover in (*folder.glob(".saving-*"), *folder.glob("step-*")):
        if not (leftover / MANIFEST).exists() or leftover.name.startswith("."):
            shutil.rmtree(leftover)


def list_checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first; whether they are whole, reading them tells."""
    return [path for path in list_steps(folder) if (path / MANIFEST).exists()]


def list_steps(folder: Path) -> list[Path]:
    """What has a checkpoint's name in `folder`, by step."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads one checkpoint; raises CheckpointError naming the file whose sum is wrong or which is missing."""
    meta = read_meta(verified(path))
    stems = {Path(name).stem: load_file(path / name) for name in read_sums(path) if name.endswith(".safetensors")}
    tensors = {stem: {key: aligned(tensor) for key, tensor in stored.items()} for stem, stored in stems.items()}
    return Checkpoint(meta.pop("step"), tensors, meta)


def verified(path: Path) -> Path:
    """The checkpoint at `path`, all of which is as it was written; raises CheckpointError otherwise."""
    sums = read_sums(path)
    for name in sums:
        require_whole(path, name, sums)
    return path


def read_meta(path: Path) -> dict[str, Any]:
    """A checkpoint's JSON values, `step` among them, without its tensors; raises CheckpointError where these are damaged."""
    require_whole(path, "meta.json", read_sums(path))
    return json.loads((path / "meta.json").read_text())


def read_sums(path: Path) -> dict[str, str]:
    """File -> SHA-256, as a checkpoint's manifest has them."""
    try:
        sums = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a committed checkpoint, or damaged: {MANIFEST}: {error}") from None
    suffixes = {Path(name).suffix for name in sums} if isinstance(sums, dict) else set()
    if ".safetensors" not in suffixes or "meta.json" not in sums:
        raise CheckpointError(f"{path} is damaged: {MANIFEST} does not list its files")
    return sums


def require_whole(path: Path, name: str, sums: dict[str, str]) -> None:
    try:
        whole = file_digest(path / name) == sums[name]
    except OSError:  # not there, or the disk cannot read it
        whole = False
    if not whole:
        raise CheckpointError(f"{path / name} is damaged or missing")


def step_name(step: int) -> str:
    """What everything that a run keeps of a step is called."""
    return f"step-{step:06d}"


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; damaged newer ones are passed over with a warning. None where there is none."""
    return newest(folder, load_checkpoint)


def newest(folder: Path, read: Callable[[Path], Read]) -> Read | None:
    """What `read` gives of the newest checkpoint for which it raises no CheckpointError, None where there is none; raises one where
    there are only such."""
    damaged = []
    for path in reversed(list_checkpoints(folder)):
        try:
            found = read(path)
        except CheckpointError as error:
            log.warning("%s: looking for the checkpoint before it", error)
            damaged.append(path.name)
        else:
            if damaged:
                log.warning("%s is the newest whole one", path)
            return found
    if damaged:
        raise CheckpointError(
            f"every checkpoint in {folder} is damaged ({', '.join(damaged)}): start again with --resume never, which sets them aside"
        )
    return None


def retire_damaged(folder: Path, step: int) -> None:
    """Renames what has the name of a later step: it was passed over, and would count among those that are kept. Removes drafts."""
    for path in list_steps(folder):
        if step_of(path) > step:
            numbers = (f"-{number}" if number else "" for number in itertools.count())
            target = next(t for n in numbers if not (t := path.with_name(f"damaged-{path.name}{n}")).exists())
            path.rename(target)
            log.warning("%s was passed over; it is now %s, and can be deleted", path, target.name)
    clear_drafts(folder)


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
    return {name: copied(tensor) for name, tensor in tensors.items()}, {"values": values, "groups": groups}


def copied(tensor: Tensor) -> Tensor:
    """A copy on the host, where it takes nothing of a GPU that may be full; of what is spread over processes, where it lies."""
    on_host = tensor.device.type == "cpu" or isinstance(tensor, torch.distributed.tensor.DTensor)
    return tensor.clone() if on_host else tensor.cpu()


def pack_value(value: Any) -> Any:
    return {"tensor": value.tolist(), "dtype": str(value.dtype)} if isinstance(value, Tensor) else value


def unpack_value(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"tensor", "dtype"}:
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"].removeprefix("torch.")))
    return tuple(value) if isinstance(value, list) and value and isinstance(value[0], float) else value


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], packed: dict[str, Any]) -> None:
    """Puts packed state back into an optimizer built over the same parameters in the same order.

    Moments lie in memory as their parameters do, pixel by pixel or channel by channel: torch's fused AdamW pairs elements by where they
    lie, not by their index.
    """
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
    for parameter, entries in optimizer.state.items():
        for name, value in entries.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                entries[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
