"""What an index of COCO's size costs: 118,287 pictures with 591,753 captions, in seconds and peak memory of a process of its own.

    python experiments/benchmarks/index.py [--pictures 118287] [--folder WHERE]

Beside t2ilib's `coco`, from a zip as downloaded and from a folder, stand a process that only imports what is timed, and `datasets`
reading the same pictures and captions as an image folder with metadata.jsonl: the first time, when it writes its own copy of the
table, and from that copy. Captions have the lengths of COCO's, and annotations the fields. All pictures are one tiny JPEG: nothing here
opens a picture, so the zip is of 120 MB, and the folder is hard links.
"""

import argparse
import importlib
import io
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

PICTURES, CAPTIONS = 118_287, 591_753
"""Of COCO's train2017."""
LINKS = 30_000
"""Of one file: file systems have limits (65,000 on ext4)."""
WORDS = [
    "a",
    "the",
    "man",
    "woman",
    "dog",
    "cat",
    "two",
    "sitting",
    "on",
    "in",
    "of",
    "table",
    "street",
    "near",
    "large",
    "holding",
]
MIB = 1024
"""Units of `ru_maxrss` in Linux."""


def build(folder: Path, num_pictures: int) -> None:
    """COCO's train2017 in small: its JSON, its zip and its folder; and the folder of `datasets`."""
    from PIL import Image

    names = [f"{index * 5 + 9:012d}.jpg" for index in range(num_pictures)]
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, format="JPEG")
    for place in ("zip", "folder/train2017", "imagefolder"):
        (folder / place).mkdir(parents=True)
    captions = write_annotations(folder, names)
    (folder / "zip/captions_train2017.json").symlink_to(folder / "captions_train2017.json")
    (folder / "folder/captions_train2017.json").symlink_to(folder / "captions_train2017.json")
    with zipfile.ZipFile(folder / "zip/train2017.zip", "w") as file:
        for name in names:
            file.writestr(f"train2017/{name}", buffer.getvalue())
    for index, name in enumerate(names):
        source = folder / f"{index // LINKS}.jpg"
        if not source.exists():
            source.write_bytes(buffer.getvalue())
        os.link(source, folder / "folder/train2017" / name)
        os.link(source, folder / "imagefolder" / name)
    with open(folder / "imagefolder/metadata.jsonl", "w") as file:
        for name in names:
            file.write(json.dumps({"file_name": name, "text": captions[name]}) + "\n")


def write_annotations(folder: Path, names: list[str]) -> dict[str, list[str]]:
    draw = random.Random(0)
    captions: dict[str, list[str]] = {name: [] for name in names}
    images = [
        {
            "license": 3,
            "file_name": name,
            "coco_url": f"http://images.cocodataset.org/train2017/{name}",
            "height": 480,
            "width": 640,
            "date_captured": "2013-11-14 17:02:52",
            "flickr_url": f"http://farm9.staticflickr.com/8186/{name[:10]}_{name[:9]}_z.jpg",
            "id": int(name[:12]),
        }
        for name in names
    ]
    annotations = []
    for number in range(len(names) * CAPTIONS // PICTURES):
        name = names[number % len(names)]
        text = " ".join(draw.choices(WORDS, k=draw.randint(9, 14))).capitalize() + "."
        captions[name].append(text)
        annotations.append({"image_id": int(name[:12]), "id": number + 37, "caption": text})
    whole = {"info": {"year": 2017}, "images": images, "licenses": [], "annotations": annotations}
    (folder / "captions_train2017.json").write_text(json.dumps(whole))
    return captions


def index_coco(folder: Path) -> tuple[int, int]:
    from t2ilib.config import DataConfig
    from t2ilib.data.manifest import load_listings

    listing, _ = load_listings(DataConfig(source="coco", path=str(folder)))
    assert not listing.rejected
    return len(listing), sum(len(record.captions) for record in listing)


def index_datasets(folder: Path) -> tuple[int, int]:
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.load_dataset(
        "imagefolder", data_dir=str(folder / "imagefolder"), cache_dir=str(folder / "cache"), split="train"
    )
    return len(rows), sum(map(len, rows["text"]))


def only_import(folder: Path) -> tuple[int, int]:
    importlib.import_module("t2ilib.data.manifest")
    return 0, 0


ROWS = {
    "importing t2ilib.data": only_import,
    "coco, zip": lambda folder: index_coco(folder / "zip"),
    "coco, folder": lambda folder: index_coco(folder / "folder"),
    "datasets, first time": index_datasets,
    "datasets, from its cache": index_datasets,
}


def measure(name: str, folder: Path) -> None:
    """One row, in this process."""
    start = time.perf_counter()
    pictures, captions = ROWS[name](folder)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB
    print(f"{name:26}{pictures:>10,}{captions:>10,}{seconds:>9.1f} s{peak:>9,.0f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=PICTURES)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--row", choices=("build", *ROWS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row == "build":
        build(arguments.folder, arguments.pictures)
    elif arguments.row:
        measure(arguments.row, arguments.folder)
    else:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            run = [sys.executable, __file__, "--folder", folder, "--pictures", str(arguments.pictures), "--row"]
            subprocess.run([*run, "build"], check=True)  # here it would count: a child's peak begins with its parent's
            print(f"{'':26}{'pictures':>10}{'captions':>10}{'time':>11}{'peak':>13}", flush=True)
            for name in ROWS:
                subprocess.run([*run, name], check=True)


if __name__ == "__main__":
    main()
