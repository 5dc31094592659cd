"""What reading batches from the cache takes, and what a run of COCO's size takes until its first step when everything is there.

    python experiments/benchmarks/epochs.py [--folder WHERE] [--pictures 118000]

Each row is a process of its own. Batches are those of a run: order, view, caption, conditioning and both reads, the text of SD1.5 in
float16. Beside them stand the same numbers out of `datasets`, as its users keep them: rows in Arrow files, memory-mapped, in torch's format, in the
same order. It verifies no checksums, draws no captions and makes no time ids.
"""

import argparse
import hashlib
import importlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from index import WORDS

from t2ilib.config import DataConfig
from t2ilib.data import known
from t2ilib.data.cache import EncodedDataset, Kept, KeptText, caption_keys
from t2ilib.data.captions import build_captions
from t2ilib.data.dataset import Dataset, build_dataset
from t2ilib.data.loader import Order
from t2ilib.data.manifest import examine
from t2ilib.data.pictures import Seen
from t2ilib.data.records import Listing, Record
from t2ilib.data.samples import Samples
from t2ilib.data.store import TensorStore
from t2ilib.memory import process_peak_mib, reset_process_peak

SIZES = {
    "tiny": (2048, 16, {"latents": (4, 8, 8)}, {"encoder_hidden_states": (77, 128), "pooled": (128,)}),
    "SD1.5 at 512": (512, 8, {"latents": (4, 64, 64)}, {"encoder_hidden_states": (77, 768)}),
}
"""Pictures, of a batch, and what is kept of one and of a caption."""
CAPTIONS = 5
BATCHES = 300


def records_of(folder: Path, count: int, captions: int = 1) -> list[Record]:
    draw = random.Random(0)
    records = []
    for number in range(count):
        first, *more = (" ".join(draw.choices(WORDS, k=10)) + f", {number}, {k}" for k in range(captions))
        records.append(Record(folder / f"{number:012d}.jpg", first, more=tuple(more)))
    return records


def seen_of(number: int) -> Seen:
    return Seen(hashlib.sha256(str(number).encode()).digest(), 480, 640)


def fill(store: TensorStore, keys: np.ndarray, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    raw = np.unique(keys).tobytes()
    distinct = [raw[start : start + 16] for start in range(0, len(raw), 16)]
    generator = torch.Generator().manual_seed(0)
    with store.writing() as writer:
        for start in range(0, len(distinct), 256):
            part = distinct[start : start + 256]
            writer.add(part, {name: torch.randn((len(part), *s), generator=generator).to(dtype) for name, s in shapes.items()})  # fmt: skip


def stores(folder: Path) -> tuple[TensorStore, TensorStore]:
    return TensorStore(folder / "latents", {"kind": "latents"}), TensorStore(folder / "text", {"kind": "text"})


def encoded(folder: Path, size: str, chance: bool) -> tuple[EncodedDataset, Order]:
    count, batch, of_picture, of_caption = SIZES[size]
    folder = folder / f"{size} {chance}"
    config = DataConfig(path=folder, resolution=of_picture["latents"][1] * 8, **({"crop": "random", "flip": 0.5, "views": 4} if chance else {}))  # fmt: skip
    records = records_of(folder, count, CAPTIONS if chance else 1)
    edits = build_captions(["shuffle_tags"]) if chance else None
    dataset = Dataset("x", tuple(records), "", seen=tuple(map(seen_of, range(count))), edits=edits)
    samples = Samples(dataset, config, 0)
    keys, words = samples.keys(), caption_keys(["", *samples.all_captions()])
    latents, text = stores(folder)
    fill(latents, keys, of_picture, torch.float32)
    fill(text, words, of_caption, torch.float16)
    return EncodedDataset(samples, Kept(latents, samples, keys), KeptText(text, words)), Order(0, batch, count)


def ours(folder: Path, size: str, chance: bool = False) -> str:
    data, order = encoded(folder, size, chance)
    batch = SIZES[size][1]

    def read(step: int) -> None:
        data.batch(order(step), step, [False] * batch, torch.device("cpu"))

    return rate(read, batch)


def theirs(folder: Path, size: str) -> str:
    import datasets

    datasets.disable_progress_bars()
    count, batch, of_picture, of_caption = SIZES[size]
    order = Order(0, batch, count)

    def rows() -> Iterator[dict]:
        generator = np.random.default_rng(0)
        for _ in range(count):
            latents = {name: generator.standard_normal(s, dtype=np.float32) for name, s in of_picture.items()}
            text = {name: generator.standard_normal(s, dtype=np.float32).astype(np.float16) for name, s in of_caption.items()}  # fmt: skip
            yield {name: value.reshape(-1) for name, value in (latents | text).items()}

    kinds = dict.fromkeys(of_picture, "float32") | dict.fromkeys(of_caption, "float16")
    shapes = of_picture | of_caption
    features = {name: datasets.Sequence(datasets.Value(kind)) for name, kind in kinds.items()}
    kept = datasets.Dataset.from_generator(rows, features=datasets.Features(features), cache_dir=str(folder / size))
    kept = kept.with_format("torch")

    def read(step: int) -> None:
        found = kept[order(step)]
        for name, shape in shapes.items():
            torch.as_tensor(found[name]).view(batch, *shape)

    return rate(read, batch)


def rate(read: Callable[[int], None], batch: int) -> str:
    for step in range(20):
        read(step)
    begun, used = time.perf_counter(), time.process_time()
    for step in range(BATCHES):
        read(step)
    seconds, used = time.perf_counter() - begun, time.process_time() - used
    return f"{1e3 * seconds / BATCHES:9.2f} ms a batch of {batch:2} ({1e3 * used / BATCHES:.2f} ms of a core), {BATCHES / seconds:6,.0f} batches/s"


def startup(folder: Path, count: int) -> str:
    """From a listing to the first step's samples; what is in the stores is small, for only their headers are read."""
    os.environ["T2ILIB_CACHE"] = str(folder)
    files = folder / "files"
    config = DataConfig(path=files, resolution=64)
    if not files.exists():
        files.mkdir(parents=True)
        for number, record in enumerate(records := records_of(files, count, CAPTIONS)):
            record.path.touch()
            os.utime(record.path, (1e9 + number, 1e9 + number))
        known.remember((known.key_of(record.path), seen_of(number)) for number, record in enumerate(records))
        samples = Samples(Dataset("x", tuple(records), "", seen=tuple(map(seen_of, range(count)))), config, 0)
        for store, keys in zip(
            stores(folder), (samples.keys(), caption_keys(["", *samples.all_captions()])), strict=True
        ):
            fill(store, keys, {"x": (1,)}, torch.float32)
        return "made"
    reset_process_peak()
    before, begun = process_peak_mib(), time.perf_counter()
    listing = Listing(files, tuple(records_of(files, count, CAPTIONS)))
    listed = time.perf_counter()
    examined = examine(listing, config)
    dataset = build_dataset("x", examined, examined.pictures, config, rest=True)
    del examined, listing
    samples = Samples(dataset, config, 0, 16)
    captions = ["", *samples.all_captions()]
    latents, text = stores(folder)
    keys, words = samples.keys(), caption_keys(captions)
    assert not latents.missing(keys)
    assert not text.missing(words)
    data = EncodedDataset(samples, Kept(latents, samples, keys), KeptText(text, words))
    Order(0, 16, len(data), samples.buckets)(0)
    done = time.perf_counter()
    return (
        f"{done - listed:9.1f} s, {process_peak_mib() - before:4.0f} MiB at the peak beside what is imported, of which"
        f" the listing itself takes {listed - begun:.1f} s"
    )


ROWS: dict[str, Callable[[Path, int], str]] = {
    "tiny, kept": lambda folder, _: ours(folder, "tiny"),
    "tiny, kept, views, 5 captions shuffled": lambda folder, _: ours(folder, "tiny", chance=True),
    "tiny, datasets": lambda folder, _: theirs(folder, "tiny"),
    "SD1.5 at 512, kept": lambda folder, _: ours(folder, "SD1.5 at 512"),
    "SD1.5 at 512, datasets": lambda folder, _: theirs(folder, "SD1.5 at 512"),
    "until the first step": lambda folder, count: startup(folder / "startup", count),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=118_000)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        torch.set_num_threads(1)
        importlib.import_module("t2ilib.training.setups")
        print(f"{arguments.row:40}{ROWS[arguments.row](arguments.folder, arguments.pictures)}", flush=True)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        run = [sys.executable, __file__, "--folder", folder, "--pictures", str(arguments.pictures), "--row"]
        subprocess.run([*run, "until the first step"], check=True, stdout=subprocess.DEVNULL)  # makes it
        for name in ROWS:
            subprocess.run([*run, name], check=True)


if __name__ == "__main__":
    main()
