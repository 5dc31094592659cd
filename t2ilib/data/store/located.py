"""Where the entries of a TensorStore lie, and reading them: a compact table over the headers of its shards."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from t2ilib.data.store.tensorfile import KEY_BYTES, Kind, StoreError, as_bytes, read_rows, read_shard


class MissingEntries(StoreError, KeyError):
    """Keys that are not in the store."""

    def __str__(self) -> str:  # KeyError's would put it in quotes
        return str(self.args[0])


def as_keys(keys: Sequence[bytes] | np.ndarray) -> np.ndarray:
    """(n,) S16; what is that already, as it is."""
    if isinstance(keys, np.ndarray) and keys.dtype == f"S{KEY_BYTES}":
        return keys
    if any(len(key) != KEY_BYTES for key in keys):
        raise ValueError(f"a key has {KEY_BYTES} bytes, as `content_key` makes it")
    return np.frombuffer(b"".join(keys), f"S{KEY_BYTES}")


@dataclass(frozen=True)
class Located:
    """Where entries lie, in the order in which they were asked for: 12 bytes each, and a line a shard. Can be pickled.

    `group`: (N,) int32, index into `groups`, of file and kind. `row`: (N,) int32, the entry's place there. `checksum`: (N,) uint32.
    """

    group: np.ndarray
    row: np.ndarray
    checksum: np.ndarray
    groups: tuple[tuple[Path, Kind], ...]

    def __len__(self) -> int:
        return len(self.row)

    def read(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Entries `rows` (B,), stacked: name -> (B, ...), in memory of their own. May be called by many threads.

        Raises ShardError for an entry that is damaged, ValueError for no rows or such as differ in names, dtypes or shapes, and
        IndexError.
        """
        wanted = np.asarray(rows, dtype=np.int64)
        if not wanted.size:
            raise ValueError("no rows were asked for")
        if wanted.min() < 0 or wanted.max() >= len(self):
            raise IndexError(f"rows are 0 to {len(self) - 1}, got {wanted.min()} to {wanted.max()}")
        group, row, checksum = self.group[wanted], self.row[wanted], self.checksum[wanted]
        kind = self.groups[group[0]][1]
        other = next((self.groups[index][1] for index in group if self.groups[index][1] != kind), None)
        if other:
            raise ValueError(f"entries of different shape cannot be stacked: {told(kind)} and {told(other)}")
        found = {c.name: torch.empty((len(wanted), *c.shape), dtype=c.dtype, device="cpu") for c in kind}
        out = [as_bytes(tensor) for tensor in found.values()]
        order = np.lexsort((row, group))
        for places in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
            path, kind = self.groups[group[places[0]]]
            read_rows(path, kind, row[places].tolist(), checksum[places].tolist(), out, places.tolist())
        return found


def told(kind: Kind) -> str:
    return ", ".join(f"{c.name} {tuple(c.shape)} {str(c.dtype).removeprefix('torch.')}" for c in kind)


@dataclass(frozen=True)
class Index:
    """What lies where, sorted by key. `keys`: (N,) S16, others as in Located; `sizes`: shard's name -> bytes."""

    keys: np.ndarray
    located: Located
    sizes: dict[str, int]

    @classmethod
    def empty(cls) -> "Index":
        return cls(np.empty(0, f"S{KEY_BYTES}"), Located(*(np.empty(0, t) for t in ("i4", "i4", "u4")), ()), {})

    def extended(self, paths: Sequence[Path], fingerprint: str) -> "Index":
        """With the shards `paths`; of a key that is there twice, the first is taken."""
        old, sizes, groups = self.located, dict(self.sizes), list(self.located.groups)
        keys, numbers, rows, checksums = [self.keys], [old.group], [old.row], [old.checksum]
        for path in paths:
            try:
                found, sizes[path.name] = read_shard(path, fingerprint)
            except FileNotFoundError:  # deleted since the folder was listed
                continue
            for group in found:
                keys.append(group.keys)
                numbers.append(np.full(len(group.keys), len(groups), "i4"))
                rows.append(np.arange(len(group.keys), dtype="i4"))
                checksums.append(group.checksums)
                groups.append((group.path, group.kind))
        unique, first = np.unique(np.concatenate(keys), return_index=True)
        columns = (np.concatenate(parts)[first] for parts in (numbers, rows, checksums))
        return Index(unique, Located(*columns, tuple(groups)), sizes)

    def find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each of `keys`, (n,) S16: where it is or would be, and whether it is there."""
        places = np.searchsorted(self.keys, keys)
        if not len(self.keys):
            return places, np.zeros(len(keys), bool)
        places = np.minimum(places, len(self.keys) - 1)
        return places, self.keys[places] == keys
