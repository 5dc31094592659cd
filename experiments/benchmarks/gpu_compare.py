"""How far two runs, or two files, lie apart; and what a part of a model holds on a device."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from gpu_record import Figures
from safetensors.torch import load_file
from torch import Tensor, nn

from t2ilib.evaluation.sampling import load_pictures
from t2ilib.planning.ledger import state_tensors
from t2ilib.training.checkpoint import list_checkpoints
from t2ilib.training.history import read_rows

PICTURE_LEVELS = 1.0
"""How far a picture of the untouched base may be off, in levels of 255, in the mean."""


def last_state(output: Path) -> dict[str, Tensor]:
    """Weights and the optimizer's tensors in a run's last checkpoint."""
    folder = list_checkpoints(output / "checkpoints")[-1]
    parts = {part: load_file(folder / f"{part}.safetensors") for part in ("weights", "optimizer")}
    return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def learned(state: Mapping[str, Tensor]) -> Tensor:
    """All of B, in one row."""
    return torch.cat([state[name].float().flatten() for name in sorted(state) if ".lora_B." in name])


def off(ours: Tensor, theirs: Tensor) -> float:
    """||ours - theirs|| / ||theirs||"""
    return float((ours - theirs).norm() / theirs.norm())


def steps_of(output: Path) -> list[dict[str, float]]:
    return [row for row in read_rows(output / "metrics.jsonl") if "grad_norm" in row]


def largest(name: str, ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> float:
    """The largest relative difference of this number, over the steps that have it."""
    pairs = [(a[name], b[name]) for a, b in zip(ours, theirs, strict=True) if name in b]
    return max(abs(a - b) / abs(b) for a, b in pairs)


def compare(figures: Figures, ours: Path, theirs: Path, losses: float, weights: float) -> None:
    """Two runs of the same steps. `losses`: how far each loss may be off, held-out ones too, relatively, and a tenth of how far each norm of
    gradients may; `weights`: all of B together, which starts from zero, so that it is what was learned."""
    rows = [read_rows(output / "metrics.jsonl") for output in (ours, theirs)]
    held_out = [[row for row in part if "held_out_loss" in row] for part in rows]
    own, other = steps_of(ours), steps_of(theirs)
    skipped = [number for number, row in enumerate(own) if not np.isfinite(row["grad_norm"])]
    figures["steps_skipped"] = len(skipped)  # by a loss scale that was too large at first: from there on runs differ
    same = min(skipped, default=len(own))
    figures.within("loss_off", largest("loss", own[: same + 1], other[: same + 1]), losses)
    figures.within("held_out_before_off", largest("held_out_loss", held_out[0][:1], held_out[1][:1]), losses)
    if same:
        figures.within("grad_norm_off", largest("grad_norm", own[:same], other[:same]), 10 * losses)
    if not skipped:
        figures.within("held_out_after_off", largest("held_out_loss", held_out[0], held_out[1]), losses)
        figures.within("weights_off", off(learned(last_state(ours)), learned(last_state(theirs))), weights)
    pictures = [np.asarray(load_pictures(output / "samples" / "step-000000")[0], float) for output in (ours, theirs)]
    figures.within("picture_off_levels", float(np.abs(pictures[0] - pictures[1]).mean()), PICTURE_LEVELS)


def spread(ours: Path, theirs: Path) -> dict[str, float]:
    """The largest absolute differences between two runs: of losses, and of weights and moments in the last checkpoint."""
    states = [last_state(output) for output in (ours, theirs)]
    losses = [[row["loss"] for row in steps_of(output)] for output in (ours, theirs)]
    of_part = {
        part: max(float((tensor.float() - states[1][name].float()).abs().max()) for name, tensor in states[0].items() if name.startswith(part))
        for part in ("weights", "optimizer")
    }  # fmt: skip
    return {"loss apart": max(abs(a - b) for a, b in zip(*losses, strict=True))} | {
        f"{part} apart": value for part, value in of_part.items()
    }


def tensors_at(place: Path) -> dict[str, Tensor]:
    return load_file(place if place.is_file() else next(iter(sorted(place.rglob("*.safetensors")))))


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max().clamp(min=1e-30))


def bytes_on(module: nn.Module, device: torch.device) -> int:
    """What a part holds on this type of device, with what bitsandbytes keeps beside its weights."""
    tensors = [*module.parameters(), *module.buffers(), *state_tensors(module)]
    for layer in module.modules():
        for keeper in (layer._parameters.get("weight"), vars(layer).get("state")):
            kept = vars(keeper) if keeper is not None else {}
            tensors += [tensor for name in ("CB", "SCB") if isinstance(tensor := kept.get(name), Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors if tensor.device.type == device.type}
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
