"""What a TensorStore takes: entries written and read a second, beside a cache of one file a picture, and an index of COCO's size.

    python experiments/benchmarks/store.py [FOLDER]

The other cache is the straightforward one: `torch.save` of each entry into a file of its own, `torch.load` and `torch.stack` for a
batch. It neither syncs nor verifies what it reads; the store does both. Both read the same batches in the same random order, first
with the files in the system's memory, then without (where the system lets them be dropped; the disk's own caches stay).
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from t2ilib.data.store import TensorStore, content_key

ENTRIES = {
    "latents of 512 x 512, float16": (2048, {"latents": (4, 64, 64)}),
    "SD1.5's text, float16": (1024, {"encoder_hidden_states": (77, 768)}),
    "SDXL's text, float16": (512, {"encoder_hidden_states": (77, 2048), "pooled": (1280,)}),
}
"""How many of what."""
PICTURES, CAPTIONS = 118_000, 590_000
ENTRIES_A_SHARD = 283
"""Of SD1.5's text in 32 MiB."""
AT_ONCE, BATCH, ROUNDS = 64, 8, 5


def main(folder: Path) -> None:
    torch.set_num_threads(1)  # copying small tensors, others only stand in the way
    print(f"{'':34}{'':12}{'one file each':>16}{'store':>12}   entries/s")
    for name, (count, shapes) in ENTRIES.items():
        compare(folder / name.split()[0], name, count, shapes)
    index(folder / "index")


def compare(folder: Path, name: str, count: int, shapes: Mapping[str, Sequence[int]]) -> None:
    """Prints the median of rounds, in each of which both are written and read anew."""
    generator = torch.Generator().manual_seed(0)
    values = {key: torch.randn((AT_ONCE, *shape), generator=generator).half() for key, shape in shapes.items()}
    keys = [content_key(name, number) for number in range(count)]
    order = np.random.default_rng(0).permutation(count).reshape(-1, BATCH).tolist()
    rates: dict[str, list[tuple[float, float]]] = {}
    for number in range(ROUNDS):
        files, store = folder / f"files{number}", TensorStore(folder / f"store{number}", {})
        files.mkdir(parents=True)

        def rate(work: Callable[[], object]) -> float:
            start = time.perf_counter()
            work()
            return count / (time.perf_counter() - start)

        def reading(read: Callable[[Sequence[int]], dict[str, Tensor]]) -> float:
            return rate(lambda: [read(rows) for rows in order])

        load = partial(load_files, files, keys)
        rates.setdefault("written", []).append(
            (rate(partial(save_files, files, keys, values)), rate(partial(write_store, store, keys, values)))
        )
        located = store.locate(keys)
        assert all(value.equal(located.read(order[0])[key]) for key, value in load(order[0]).items())
        rates.setdefault("read", []).append((reading(load), reading(located.read)))
        if hasattr(os, "posix_fadvise"):
            forget(folder)
            rates.setdefault("read cold", []).append((reading(load), reading(located.read)))
        shutil.rmtree(files)
        size = store.bytes
        shutil.rmtree(store.folder)
    for what, pairs in rates.items():
        theirs, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{name:34}{what:12}{theirs:16,.0f}{ours:12,.0f}   x {ours / theirs:.1f}", flush=True)
        name = ""
    print(f"{'':34}{size / count:,.0f} bytes an entry on disk")


def save_files(folder: Path, keys: Sequence[bytes], values: Mapping[str, Tensor]) -> None:
    for number, key in enumerate(keys):
        entry = {name: value[number % AT_ONCE].clone() for name, value in values.items()}
        torch.save(entry, folder / f"{key.hex()}.pt")


def write_store(store: TensorStore, keys: Sequence[bytes], values: Mapping[str, Tensor]) -> None:
    with store.writing() as writer:
        for start in range(0, len(keys), AT_ONCE):
            writer.add(keys[start : start + AT_ONCE], values)


def load_files(folder: Path, keys: Sequence[bytes], rows: Sequence[int]) -> dict[str, Tensor]:
    entries = [torch.load(folder / f"{keys[row].hex()}.pt") for row in rows]
    return {name: torch.stack([entry[name] for entry in entries]) for name in entries[0]}


def forget(folder: Path) -> None:
    """Has the system drop what it holds of the files in memory."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


INDEX = """
import gc, sys, time
import numpy as np, psutil
from t2ilib.data.store import TensorStore, content_key
from t2ilib.memory import process_peak_mib, reset_process_peak

folder, pictures, captions = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
resident = lambda: psutil.Process().memory_info().rss / 2**20
reset_process_peak()
before = resident()
start = time.perf_counter()
store = TensorStore(folder, {})
opened = time.perf_counter() - start
peak, held = process_peak_mib() - before, resident() - before
print(f"opened in {opened:.2f} s: {len(store):,} entries in {len(store.index.sizes):,} shards, {held:.0f} MiB more in the process, {peak:.0f} at the peak")
arrays = lambda located: located.group.nbytes + located.row.nbytes + located.checksum.nbytes
keys = [content_key(number) for number in range(pictures + captions)]
start = time.perf_counter()
some = store.locate(keys[:pictures]), store.locate(keys[pictures:])
found = time.perf_counter() - start
print(f"located in {found:.2f} s: {sum(map(arrays, some)) / 2**20:.1f} MiB; the store's own table {(arrays(store.index.located) + store.index.keys.nbytes) / 2**20:.1f} MiB")
start = time.perf_counter()
store.refresh()
print(f"looked for news in {time.perf_counter() - start:.3f} s")
"""


def index(folder: Path) -> None:
    """With entries of 4 bytes, for what lies in the shards is not read; and as many in a shard as there would be."""
    count = PICTURES + CAPTIONS
    store = TensorStore(folder, {})
    with store.writing() as writer:
        for start in range(0, count, ENTRIES_A_SHARD):
            keys = [content_key(number) for number in range(start, min(start + ENTRIES_A_SHARD, count))]
            writer.add(keys, {"x": torch.zeros(len(keys), 1)})
            writer.commit()
    print(f"an index of {PICTURES:,} pictures and {CAPTIONS:,} captions", flush=True)
    subprocess.run([sys.executable, "-c", INDEX, str(folder), str(PICTURES), str(CAPTIONS)], check=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as scratch:
        main(Path(scratch))
