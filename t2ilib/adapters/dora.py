"""DoRA for other programs: by the arithmetic of each where that can give our weights, else as what any of them adds up.

Ours is W' = m (W + s B A) / |W + s B A|, |.| the norm of a row over inputs and kernel (arXiv 2402.09353, equation 5). Programs
that read kohya's layout take a `dora_scale` and divide by another norm, and a file does not say which it was made for:

- LyCORIS (lycoris/modules/locon.py at f49d30d, 2025-10-04): the rows of W + s B A, as here. The scale is m.
- ComfyUI (comfy/weight_adapter/base.py at a125cd8, 2025-10-12; its pull request 15458, open in 2026-08, would make it LyCORIS's) and
  Forge (backend/patcher/lora.py at dfdcbab, 2025-06-26): the rows of the base weight W. The scale is m |W| / |W + s B A|.
- A1111 (extensions-builtin/Lora/network.py, read in the copy that Forge carries): the columns of W + s B A, whatever the scale's shape. No scale smaller than the
  weight itself gives our rows.

W' - W has full rank where a row's length changed, so only a whole difference is exact there; a LoRA of it is an approximation.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from t2ilib.adapters.weights import AdapterLayer, WeightDifference, base_weight, to_host
from t2ilib.config import ConfigError, check_choice
from t2ilib.memory import MIB, require_disk
from t2ilib.models.components import Components
from t2ilib.models.load import load_full

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Program:
    """How a program computes a DoRA. `told`: what a file written for it says of itself; `over_base`: whether it divides by the rows
    of the base, so that the scale is not m itself; `exact`: whether any scale gives our weights there."""

    told: str
    over_base: bool = False
    exact: bool = True


PROGRAMS: dict[str, Program] = {
    "comfyui": Program(
        "dora_scale is m |W| / |W + BA| by row: for programs that divide by the row norms of the base weight W, as Forge and ComfyUI"
        " without its pull request 15458. Exact over the base it was exported with, as the first or only adapter.",
        over_base=True,
    ),
    "lycoris": Program(
        "dora_scale is the magnitude m of each row: for programs that divide by the row norms of W + BA, as LyCORIS, and ComfyUI"
        " with its pull request 15458."
    ),
    "a1111": Program(
        "A1111 divides by the column norms of W + BA, so no scale of rows or columns gives a DoRA's weights there.",
        exact=False,
    ),
}
"""Whose arithmetic a DoRA is written for."""

FORMS = {
    "diff": "full differences of weights (.diff) in place of a DoRA: exact over the base it was exported with",
    "lora": "a LoRA in place of a DoRA: the nearest of its rank, an approximation",
}
"""What can be written in a DoRA's place, for any program."""

FOR, AS, SAID, ERROR, ERRORS = (f"t2ilib.dora{end}" for end in ("_for", "_as", "", "_error", "_errors"))
"""In a file's metadata: the program and the form it was written for, a sentence about them, and how far a LoRA is from the DoRA."""


def check_options(
    source: Path, dora: bool, format: str, program: str | None, form: str | None, rank: int | None
) -> None:
    """Raises ConfigError for options of `t2ilib export` that do not go together, or that a DoRA needs. `dora`: whether it is one."""
    if program is not None:
        check_choice(program, PROGRAMS, "--for")
    if form is not None:
        check_choice(form, FORMS, "--as")
    given = [f"--{name}" for name, value in (("for", program), ("as", form), ("rank", rank)) if value is not None]
    if given and format != "kohya":
        raise ConfigError(f"{', '.join(given)} is about --format kohya, and the format is {format}: leave it out")
    if (rank is not None) != (form == "lora"):
        raise ConfigError(
            "--as lora needs --rank, of the LoRA that approximates the DoRA"
            if rank is None
            else f"--rank {rank} is of a LoRA that approximates a DoRA: give --as lora too"
        )
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank {rank}: give 1 or more")
    if form is not None and not dora:
        raise ConfigError(f"{source} is no DoRA, and every program reads a LoRA as it is: leave --as out")
    if format == "kohya" and dora and program is None and form is None:
        raise ConfigError(
            f"{source} is a DoRA, which programs that read kohya files compute differently: say which by --for comfyui (ComfyUI and"
            " Forge, exact), --for lycoris (LyCORIS, exact) or --for a1111 (which needs --as diff, exact and large, or --as lora with"
            " --rank, an approximation)"
        )


def for_program(
    layers: Sequence[AdapterLayer],
    components: Components,
    target: Path,
    program: str | None,
    form: str | None,
    rank: int | None = None,
) -> tuple[list[AdapterLayer | WeightDifference], dict[str, str]]:
    """A DoRA as `program`'s own arithmetic takes it, or in another `form`, and what the file is to say of it.

    Layers without a magnitude stay as they are. Raises ConfigError for a program whose arithmetic gives no DoRA where no form is
    given, and for differences that the disk of `target` cannot hold.
    """
    doras = [layer for layer in layers if layer.magnitude is not None]
    if form is None and not PROGRAMS[program].exact:
        own = max(layer.rank for layer in doras)
        raise ConfigError(
            f"{PROGRAMS[program].told} Give --as diff (exact, {megabytes(difference_bytes(doras, components))}) or --as lora with"
            f" --rank (an approximation; {megabytes(lora_bytes(doras, own))} at the DoRA's own rank {own})"
        )
    told = {FOR: program, AS: form or "dora", SAID: FORMS[form] if form else PROGRAMS[program].told}
    told = {key: value for key, value in told.items() if value}
    if form == "diff":
        needed = difference_bytes(doras, components)
        log.info("%d differences of weights: %s", len(doras), megabytes(needed))
        require_disk(target.parent, needed, f"the differences of {target.name}", "free some, or write to another disk")
        dtype = difference_dtype(components)
        written = [layer if layer.magnitude is None else difference(layer, components, dtype) for layer in layers]
    elif form == "lora":
        written, errors = approximate(layers, components, rank)
        told |= errors
    else:
        written = with_scales(layers, components, program)
    return written, told


def row_norms(weight: Tensor) -> Tensor:
    """Over all but the first axis. weight: (out, in) or (out, in, kh, kw) -> (out,)."""
    return weight.flatten(1).norm(dim=1)


def moved_rows(layer: AdapterLayer, weight: Tensor) -> tuple[Tensor, Tensor]:
    """W + s B A in the shape of W, and the norms of its rows. Raises ConfigError for a row of zeros."""
    moved = weight + layer.update().to(weight.device)
    norms = row_norms(moved)
    if not bool(norms.all()):
        raise ConfigError(f"{layer.component}.{layer.module} has a row of zeros, which DoRA cannot rescale: exclude it")
    return moved, norms


def change(layer: AdapterLayer, components: Components) -> Tensor:
    """W' - W of a DoRA, in the shape of W."""
    weight = base_weight(components, layer.component, layer.module)
    moved, norms = moved_rows(layer, weight)
    factor = layer.magnitude.flatten().to(weight.device) / norms
    return moved * factor.view(-1, *[1] * (weight.ndim - 1)) - weight


def base_factor(layer: AdapterLayer, components: Components) -> Tensor:
    """|W| / |W + s B A| by row, in the magnitude's shape."""
    weight = base_weight(components, layer.component, layer.module)
    eps = torch.finfo(torch.float32).eps  # which ComfyUI adds to the norm it divides by
    return to_host((row_norms(weight) + eps) / moved_rows(layer, weight)[1]).view_as(layer.magnitude)


def with_scales(layers: Sequence[AdapterLayer], components: Components, program: str) -> list[AdapterLayer]:
    """The layers with the scale that `program` takes in the magnitude's place; `components` in full precision."""
    if not PROGRAMS[program].over_base:
        return list(layers)
    return [
        a if a.magnitude is None else replace(a, magnitude=a.magnitude * base_factor(a, components)) for a in layers
    ]


def with_magnitudes(layers: Sequence[AdapterLayer], components: Components, program: str) -> list[AdapterLayer]:
    """The layers of a file that was written for `program`, with the magnitudes that its scales were made from.

    A scale belongs to the base in full precision, which is loaded once more where `components` are quantized: over NF4 weights
    it would be off by 1.5% (measured on the tiny SDXL).
    """
    if not PROGRAMS[program].over_base or all(layer.magnitude is None for layer in layers):
        return list(layers)
    over = load_full(components) if components.quantization else components
    return [a if a.magnitude is None else replace(a, magnitude=a.magnitude / base_factor(a, over)) for a in layers]


def difference(layer: AdapterLayer, components: Components, dtype: torch.dtype) -> WeightDifference:
    return WeightDifference(
        layer.component,
        layer.module,
        (len(layer.up), *layer.down.shape[1:]),
        dtype,
        lambda: change(layer, components).to("cpu", dtype),
    )


def approximate(
    layers: Sequence[AdapterLayer], components: Components, rank: int
) -> tuple[list[AdapterLayer], dict[str, str]]:
    """LoRAs of the given rank nearest to W' - W of each DoRA layer (Eckart and Young: its first singular directions), and how far
    they are from it, |W' - W - B A| / |W' - W| in the Frobenius norm: of all layers together, and of each."""
    written, errors, missed, whole = [], {}, 0.0, 0.0
    for layer in layers:
        if layer.magnitude is None:
            written.append(layer)
            continue
        wanted = change(layer, components)
        matrix = wanted.flatten(1)
        kept = min(rank, *matrix.shape)
        turned = matrix.shape[1] > matrix.shape[0]  # LAPACK takes four times as long for wide matrices
        u, s, v = torch.linalg.svd(matrix.T if turned else matrix, full_matrices=False)
        u, v = (v.T, u.T) if turned else (u, v)
        root = s[:kept].sqrt()
        up, down = to_host(u[:, :kept] * root), to_host(root[:, None] * v[:kept])
        if wanted.ndim == 4:
            up, down = up.view(-1, kept, 1, 1), down.view(kept, *wanted.shape[1:])
        squares = (float(s[kept:].square().sum()), float(s.square().sum()))
        errors[f"{layer.component}.{layer.module}"] = round(relative(*squares), 4)
        missed, whole = missed + squares[0], whole + squares[1]
        written.append(AdapterLayer(layer.component, layer.module, down, up, float(kept)))
    worst_first = dict(sorted(errors.items(), key=lambda item: -item[1]))
    return written, {ERROR: f"{relative(missed, whole):.4f}", ERRORS: json.dumps(worst_first)}


def relative(missed: float, whole: float) -> float:
    """Of two squared norms; nothing is missed of nothing."""
    return (missed / whole) ** 0.5 if whole else 0.0


def difference_dtype(components: Components) -> torch.dtype:
    """float32, or float16 where the base is in 16 bits: bfloat16 would lose more than the base does."""
    return torch.float32 if components.unet.dtype == torch.float32 else torch.float16


def difference_bytes(layers: Sequence[AdapterLayer], components: Components) -> int:
    return sum(len(layer.up) * prod(layer.down.shape[1:]) for layer in layers) * difference_dtype(components).itemsize


def lora_bytes(layers: Sequence[AdapterLayer], rank: int) -> int:
    return 4 * sum(rank * (len(layer.up) + prod(layer.down.shape[1:])) for layer in layers)


def megabytes(size: int) -> str:
    return f"{size / MIB:,.1f} MiB"
