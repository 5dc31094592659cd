"""How many pictures a second become samples of 512 x 512, beside the straightforward way: `datasets`' imagefolder and Pillow.

    python experiments/benchmarks/decoding.py
    python experiments/benchmarks/decoding.py --turns 9 --seconds 3

Pictures are drawn: structure of every size and a sensor's noise, as JPEGs of a camera's size (4000 x 3000, about 4 MB) and of COCO's (640 x
480, about 0.1 MB). Both ways decode all of them, scale the shorter side to 512 with LANCZOS, cut the centre and give an array. The two ways
take short turns, so that what else the machine does hits both; what counts is the median of the turns' ratios, and on a machine that
others use the ratio by processor time. Needs no network.
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
RESOLUTION = 512
KINDS = {"12 megapixels": (3000, 4000, 95, 6), "COCO": (480, 640, 92, 24)}
"""Height, width, JPEG quality, and how many pictures."""
THREADS = (1, 2)


def main(words: Sequence[str] | None = None) -> int:
    """Prints a line for every kind of picture and number of threads; returns 1 where large JPEGs are not twice as fast, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="that a turn of either way takes at least")
    options = parser.parse_args(words)
    sys.path.insert(0, str(ROOT))
    large = []
    with tempfile.TemporaryDirectory(prefix="t2ilib-decoding-") as scratch:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(Path(scratch) / "cache")}
        for kind, (height, width, quality, count) in KINDS.items():
            folder = Path(scratch) / kind.replace(" ", "-")
            size = draw(folder, height, width, quality, count)
            print(
                f"{kind}: {width} x {height}, {size / 1e6:.2f} MB a picture; pictures/s (median of {options.turns} turns)"
            )
            ways = {"datasets + PIL": straightforward(folder), "t2ilib": ours(folder)}
            cases = list(itertools.product(THREADS, ways))
            turns = [
                {case: rate(ways[case[1]], case[0], options.seconds) for case in cases} for _ in range(options.turns)
            ]
            for threads in THREADS:
                theirs, own = (np.array([turn[threads, way] for turn in turns]) for way in ways)
                ratio, processor = np.median(own / theirs, axis=0)
                print(
                    f"  {threads} thread(s): datasets + PIL {np.median(theirs[:, 0]):7.1f}   t2ilib {np.median(own[:, 0]):7.1f}"
                    f"   ratio {ratio:.2f}   by processor time {processor:.2f}"
                )
                large += [processor] * (kind != "COCO")
            for way in ways:
                gains = [turn[2, way][0] / turn[1, way][0] for turn in turns]
                print(f"  two threads against one, {way}: {statistics.median(gains):.2f}, at best {max(gains):.2f}")
    return int(min(large) < 2)


def draw(folder: Path, height: int, width: int, quality: int, count: int) -> float:
    """Writes `count` JPEGs; returns the mean size in bytes."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    structure = np.full((height, width, 3), 128, np.float32)
    for side in (4, 16, 64, 256, 1024):
        grid = rng.normal(size=(-(-height // side), -(-width // side), 3)).astype(np.float32)
        layers = [Image.fromarray(grid[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(3)]
        structure += np.stack([np.asarray(layer) for layer in layers], axis=-1) * 40 * (side / 1024) ** 0.5
    for number in range(count):
        noise = rng.normal(size=(height, width, 1)).astype(np.float32) * 3
        pixels = np.clip(np.roll(structure, 97 * number, axis=1) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.jpg", quality=quality)
    return sum(path.stat().st_size for path in folder.iterdir()) / count


Way = Callable[[Iterable[int], int], Iterable[np.ndarray]]
"""Samples of pictures by number, with so many threads."""


def straightforward(folder: Path) -> Way:
    import datasets

    datasets.disable_progress_bars()
    pictures = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")

    def sample(number: int) -> np.ndarray:
        image: Any = pictures[number % len(pictures)]["image"].convert("RGB")
        scale = RESOLUTION / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
        left, top = (image.width - RESOLUTION) // 2, (image.height - RESOLUTION) // 2
        return np.asarray(image.crop((left, top, left + RESOLUTION, top + RESOLUTION)))

    def samples(numbers: Iterable[int], threads: int) -> Iterable[np.ndarray]:
        if threads == 1:
            yield from map(sample, numbers)
            return
        with ThreadPoolExecutor(threads) as pool:  # in handfuls, for a pool's map takes all numbers at once
            while handful := list(itertools.islice(numbers, 4 * threads)):
                yield from pool.map(sample, handful)

    return samples


def ours(folder: Path) -> Way:
    from t2ilib.data.decoding import decoded
    from t2ilib.data.pictures import load_picture

    paths = sorted(folder.iterdir())
    return lambda numbers, threads: (
        picture.pixels
        for picture in decoded(numbers, lambda number: load_picture(paths[number % len(paths)], RESOLUTION), threads)
    )


def rate(way: Way, threads: int, seconds: float) -> tuple[float, float]:
    """Pictures a second over at least so many seconds, and a second of processor time."""
    samples = iter(way(itertools.count(), threads))
    begun, used, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - begun < seconds:
        assert next(samples).shape == (RESOLUTION, RESOLUTION, 3)
        count += 1
    return count / (time.perf_counter() - begun), count / (time.process_time() - used)


if __name__ == "__main__":
    sys.exit(main())
