"""COCO 2017 in its real form, small: the zips as their server has them, made here."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

SUBJECTS = ("dog", "cat", "bus", "pizza", "clock", "horse", "kite")
MANNERS = ("quietly", "slowly", "brightly", "barely", "happily")


def write_coco(folder: Path, num_train: int = 12, num_val: int = 4) -> dict[str, dict[str, list[str]]]:
    """Writes zips/train2017.zip, zips/val2017.zip and annotations/annotations_trainval2017.zip under `folder`, and gives the captions
    of the pictures that have some: split -> file name -> five of them.

    Of the training pictures the last has no captions, and one caption is of a picture that is not there.
    """
    captions = {"train": {}, "val": {}}
    (folder / "zips").mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    tables = {}
    for split, count in (("train", num_train), ("val", num_val)):
        images, annotations = [], []
        with zipfile.ZipFile(folder / "zips" / f"{split}2017.zip", "w", zipfile.ZIP_STORED) as pictures:
            pictures.writestr(f"{split}2017/", "")
            for index in range(count):
                number = 9 + 16 * index + 100_000 * (split == "val")
                name, size = f"{number:012d}.jpg", (64 + 8 * (index % 3), 48 + 8 * (index % 2))
                pictures.writestr(f"{split}2017/{name}", jpeg(number, size))
                images.append(described(number, name, size, split))
                if split == "train" and index == num_train - 1:
                    continue
                captions[split][name] = [sentence(number, k) for k in range(5)]
                annotations += [(number, text) for text in captions[split][name]]
        if split == "train":
            annotations.append((number + 7, "A caption of a picture that is not there."))
        annotations = [{"image_id": at, "id": 38 + k, "caption": text} for k, (at, text) in enumerate(annotations)]
        tables[split] = {"info": {"year": 2017}, "licenses": [], "images": images, "annotations": annotations}
    with zipfile.ZipFile(folder / "annotations" / "annotations_trainval2017.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for split, table in tables.items():
            packed.writestr(f"annotations/captions_{split}2017.json", json.dumps(table))
            packed.writestr(f"annotations/instances_{split}2017.json", json.dumps(table | {"annotations": []}))
    return captions


def unpack_coco(folder: Path, target: Path, zips: bool = False) -> None:
    """What `t2ilib data download coco TARGET` leaves of `write_coco(folder)`; with `zips` the pictures stay in them."""
    for archive in (*folder.glob("annotations/*.zip"), *folder.glob("zips/*.zip")):
        if zips and archive.parent.name == "zips":
            target.mkdir(exist_ok=True)
            (target / archive.name).write_bytes(archive.read_bytes())
        else:
            zipfile.ZipFile(archive).extractall(target)


def jpeg(seed: int, size: tuple[int, int]) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def described(number: int, name: str, size: tuple[int, int], split: str) -> dict:
    return {
        "license": 4,
        "file_name": name,
        "coco_url": f"http://images.cocodataset.org/{split}2017/{name}",
        "height": size[1],
        "width": size[0],
        "date_captured": "2013-11-14 17:02:52",
        "id": number,
    }


def sentence(number: int, k: int) -> str:
    """Every fifth ends in a newline, as some of COCO's do."""
    subject = SUBJECTS[(number + k) % len(SUBJECTS)]
    return f"A {subject} {MANNERS[k]} beside number {number}." + "\n" * (k == 4)
