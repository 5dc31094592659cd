"""What a safetensors file says about itself: names, types and shapes of its tensors, without reading a weight.

The format is 8 bytes with the header's length, the header in JSON, then the weights; so a whole file has a known size, and a
download that broke off is noticed here rather than in the middle of loading. Imports no torch.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from t2ilib.config import ConfigError

LARGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library itself."""


@dataclass(frozen=True)
class TensorInfo:
    """`dtype` as safetensors writes it: F32, BF16, F16, F8_E4M3, I64, ..."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path, what: str) -> dict[str, TensorInfo]:
    """Tensor name -> type and shape. `what` begins the sentence of the ConfigError for a damaged or truncated file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start.startswith(b"version "):
            raise ConfigError(f"{what} is a Git LFS pointer, not the weights: run `git lfs pull` where it was cloned")
        if len(start) < 8 or length > LARGEST_HEADER:
            raise ConfigError(f"{what} is no safetensors file, or is damaged: download it again")
        text = file.read(length)
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        tensors = {name: TensorInfo(e["dtype"], tuple(e["shape"])) for name, e in entries.items()}
        end = 8 + length + max((e["data_offsets"][1] for e in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        cut = " (it ends within its header)" if size < 8 + length else ""
        raise ConfigError(f"{what} is damaged{cut}: download it again") from None
    if size < end:
        raise ConfigError(f"{what} is cut off: it has {size:,} of {end:,} bytes; download it again")
    return tensors


def bytes_in_memory(tensors: Iterable[TensorInfo], itemsize: int) -> int:
    """What the tensors take once they are loaded with `itemsize` bytes an element, whatever type they are stored in."""
    return sum(math.prod(tensor.shape) for tensor in tensors) * itemsize
