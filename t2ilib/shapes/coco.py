"""The drawn world as a server of COCO 2017 has it: the whole way from a download to a picture can be walked in minutes, without a network.

    FOLDER/annotations/annotations_trainval2017.zip     captions_train2017.json, captions_val2017.json
    FOLDER/zips/train2017.zip, FOLDER/zips/val2017.zip

Each picture is a JPEG with a caption in every phrasing of the world. What is drawn a second time is equal to the byte. Leaves out what no
run looks at: instances, keypoints, licences.
"""

import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

from t2ilib.seeds import seed_for
from t2ilib.shapes.world import BLUEPRINT_PHRASES, SOLID_PHRASES, Scene, caption, mixed_scenes, render

QUALITY = 95
VAL_SHARE, LEAST_VAL = 8, 8
"""One picture of so many, and so many at least, are the part `val`."""
LONG_AGO = (2017, 9, 1, 0, 0, 0)


def write_coco(folder: Path, count: int, kinds: Sequence[str], seed: int = 0) -> dict[str, int]:
    """Writes the three zips under `folder`, with `count` pictures of `kinds` in the part `train` and others in `val`; gives how many there are
    of each. Raises ConfigError for a kind that does not exist."""
    counts = {"train": count, "val": max(LEAST_VAL, count // VAL_SHARE)}
    drawn = {
        part: mixed_scenes(number, "train" if part == "train" else "validation", seed, kinds)
        for part, number in counts.items()
    }
    for place in ("annotations", "zips"):
        (folder / place).mkdir(parents=True, exist_ok=True)
    tables = {}
    for part, scenes in drawn.items():
        names = [f"{1 + number:012d}.jpg" for number in range(len(scenes))]
        with zipfile.ZipFile(folder / "zips" / f"{part}2017.zip", "w") as pictures:
            for number, (name, scene) in enumerate(zip(names, scenes, strict=True)):
                add(pictures, f"{part}2017/{name}", jpeg(scene, seed_for(seed, "coco", part, number)))
        tables[f"annotations/captions_{part}2017.json"] = table(names, scenes)
    with zipfile.ZipFile(folder / "annotations" / "annotations_trainval2017.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in tables.items():
            add(packed, name, json.dumps(content).encode())
    return counts


def add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    """A member that tells nothing of when it was made."""
    member = zipfile.ZipInfo(name, LONG_AGO)
    member.compress_type = archive.compression
    archive.writestr(member, data)


def jpeg(scene: Scene, seed: int) -> bytes:
    stream = io.BytesIO()
    render(scene, seed).save(stream, "JPEG", quality=QUALITY, subsampling=0)
    return stream.getvalue()


def table(names: Sequence[str], scenes: Sequence[Scene]) -> dict[str, list[dict]]:
    """COCO's JSON of captions, a caption in each phrasing."""
    images = [{"id": 1 + number, "file_name": name} for number, name in enumerate(names)]
    captions = [
        (image["id"], caption(scene, phrasing))
        for image, scene in zip(images, scenes, strict=True)
        for phrasing in range(len(BLUEPRINT_PHRASES if scene.style == "blueprint" else SOLID_PHRASES))
    ]
    annotations = [{"id": 1 + k, "image_id": at, "caption": text} for k, (at, text) in enumerate(captions)]
    return {"images": images, "annotations": annotations}
