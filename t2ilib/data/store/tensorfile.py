"""One shard of a TensorStore: a safetensors file that holds entries, each a few named tensors, and says itself which.

Entries with equal names, dtypes and shapes are a group, and each name of a group is one tensor in the file, its entries along the
first dimension: `0/latents` (n, 4, 64, 64). Their keys and checksums are in the metadata, so that a header of some kilobytes tells
about thousands of entries and no other index can disagree with the file. Any program that reads safetensors reads a shard.

A flipped bit is noticed by neither safetensors nor torch. So the header has a checksum, verified when it is read, and each entry
has one, verified whenever the entry is. Entries are read by position into fresh memory, not mapped: mapped pages count as memory
of the process, and mapped tensors lie at any offset, which changes last bits of results on some CPUs.
"""

import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from t2ilib.text import shown

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""What safetensors calls them."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
KEY_BYTES, CHECKSUM_BYTES = 16, 4
HEADER_BYTES_PER_ENTRY = 2 * (KEY_BYTES + CHECKSUM_BYTES)
"""Both stand there in hexadecimal digits."""
MOST_HEADER_BYTES = 100_000_000
"""What safetensors reads."""
BEGIN, NO_SUM = b'{"__metadata__":{"sum":"', b"00000000"
"""How a header begins: with its own CRC-32, which is taken with zeros in its place."""


class StoreError(ValueError):
    """A store that cannot be read or is not the one that was asked for."""


class ShardError(StoreError):
    """A shard that cannot be used."""

    @classmethod
    def of(
        cls, path: Path, reason: str
    ) -> "ShardError":  # not the constructor: a loader's workers hand on the text alone
        return cls(f"{shown(path)} {reason}: delete this file, and what it held is encoded again")


@dataclass(frozen=True)
class Column:
    """One tensor of each entry of a group: `shape` is one entry's, `start` where the first one begins in the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = field(default=0, compare=False)  # columns that are equal can be stacked

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


Kind = tuple[Column, ...]
"""What an entry consists of, by name."""


@dataclass(frozen=True)
class Group:
    """Entries of one kind in one file. `keys`: (n,) S16. `checksums`: (n,) uint32."""

    path: Path
    kind: Kind
    keys: np.ndarray
    checksums: np.ndarray


@dataclass(frozen=True)
class Batch:
    """Entries that are still to be written, of one kind. `values`: name -> (B, bytes) uint8."""

    keys: Sequence[bytes]
    checksums: list[int]
    values: dict[str, np.ndarray]

    @classmethod
    def of(cls, keys: Sequence[bytes], tensors: Mapping[str, Tensor]) -> "Batch":
        """Copies `tensors`, each (B, ...), of any device and layout."""
        values = {}
        for name in sorted(tensors):
            copy = torch.empty(tensors[name].shape, dtype=tensors[name].dtype, device="cpu")
            values[name] = as_bytes(copy.copy_(tensors[name].detach()))
        checksums = []
        for row in range(len(keys)):
            checksum = 0
            for column in values.values():
                checksum = zlib.crc32(column[row], checksum)
            checksums.append(checksum)
        return cls(keys, checksums, values)


def as_bytes(tensor: Tensor) -> np.ndarray:
    """The memory of a contiguous CPU tensor (B, ...) as (B, bytes) uint8."""
    flat = tensor.reshape(-1).view(torch.uint8).numpy()
    return flat.reshape(len(tensor), flat.size // len(tensor))


def kind_of(tensors: Mapping[str, Tensor]) -> Kind:
    """Raises ValueError for a dtype that is not kept."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{name} is {tensor.dtype}; kept are {', '.join(map(str, DTYPE_NAMES))}")
    return tuple(Column(name, tensors[name].dtype, tuple(tensors[name].shape[1:])) for name in sorted(tensors))


def write_shard(stream: BinaryIO, batches: Mapping[Kind, Sequence[Batch]], fingerprint: str) -> None:
    """Writes the whole file. `fingerprint` says which store it belongs to."""
    metadata = {"sum": NO_SUM.decode(), "store": fingerprint}
    columns = []
    for index, (kind, own) in enumerate(batches.items()):
        metadata[f"{index}/keys"] = b"".join(key for batch in own for key in batch.keys).hex()
        checksums = [checksum for batch in own for checksum in batch.checksums]
        metadata[f"{index}/checksums"] = np.array(checksums, "<u4").tobytes().hex()
        columns += [(index, len(checksums), column, own) for column in kind]
    columns.sort(key=lambda item: -item[2].dtype.itemsize)  # so that each begins at a multiple of its items' size
    table: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for index, count, column, _ in columns:
        begin, end = end, end + column.row_bytes * count
        table[f"{index}/{column.name}"] = {
            "dtype": DTYPE_NAMES[column.dtype],
            "shape": [count, *column.shape],
            "data_offsets": [begin, end],
        }
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    header = header.replace(NO_SUM, b"%08x" % zlib.crc32(header), 1)
    stream.write(len(header).to_bytes(8, "little") + header)
    for _, _, column, own in columns:
        for batch in own:
            stream.write(batch.values[column.name])


def read_shard(path: Path, fingerprint: str) -> tuple[list[Group], int]:
    """What is in a shard, from its header alone, and its size in bytes. Raises ShardError, OSError as opening does."""
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if length > min(size - 8, MOST_HEADER_BYTES):
            raise ShardError.of(path, "is no safetensors file, or is cut off in its header")
        header = stream.read(length)
    if not header.startswith(BEGIN):
        raise ShardError.of(path, "is no safetensors file, or none of a store")
    told = header[len(BEGIN) : len(BEGIN) + len(NO_SUM)]
    if told != b"%08x" % zlib.crc32(BEGIN + NO_SUM + header[len(BEGIN) + len(NO_SUM) :]):
        raise ShardError.of(path, "is damaged (its header does not have the checksum that it tells)")
    table = json.loads(header)
    metadata = table.pop("__metadata__")
    if metadata["store"] != fingerprint:
        raise ShardError.of(path, "belongs to another store (format or description differ)")
    end = 8 + length + max(entry["data_offsets"][1] for entry in table.values())
    if size != end:
        raise ShardError.of(path, f"is {'cut off' if size < end else 'too long'} ({size:,} bytes, should be {end:,})")
    kinds: dict[str, list[Column]] = {}
    for name, entry in table.items():
        index, name = name.split("/", 1)
        column = Column(name, DTYPES[entry["dtype"]], tuple(entry["shape"][1:]), 8 + length + entry["data_offsets"][0])
        kinds.setdefault(index, []).append(column)
    groups = [
        Group(
            path,
            tuple(sorted(columns, key=lambda column: column.name)),
            np.frombuffer(bytes.fromhex(metadata[f"{index}/keys"]), f"S{KEY_BYTES}"),
            np.frombuffer(bytes.fromhex(metadata[f"{index}/checksums"]), "<u4"),
        )
        for index, columns in kinds.items()
    ]
    return groups, size


def read_rows(
    path: Path,
    kind: Kind,
    rows: Sequence[int],
    checksums: Sequence[int],
    out: Sequence[np.ndarray],
    places: Sequence[int],
) -> None:
    """Reads entries `rows` of one group into rows `places` of `out`, (B, bytes) for each column of `kind`, and verifies each.

    The file is opened for this alone, so nothing is shared between threads or inherited by processes, and however many shards
    there are, few files are open.
    """
    columns = [(column.start, column.row_bytes, values) for column, values in zip(kind, out, strict=True)]
    try:
        with path.open("rb", buffering=0) as stream:
            for row, expected, place in zip(rows, checksums, places, strict=True):
                checksum = 0
                for start, size, values in columns:
                    stream.seek(start + row * size)
                    if stream.readinto(values[place]) != size:
                        raise ShardError.of(path, "has been cut off since it was opened")
                    checksum = zlib.crc32(values[place], checksum)
                if checksum != expected:
                    raise ShardError.of(path, f"is damaged (entry {row} of its group does not have its checksum)")
    except FileNotFoundError:
        raise StoreError(
            f"{shown(path)} has been deleted since it was opened: start again, and it is encoded again"
        ) from None
