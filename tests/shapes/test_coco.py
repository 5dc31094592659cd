"""The drawn world in COCO's form: what `data download` fetches of it, and a run reads, is what was drawn."""

import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from t2ilib.cli import app
from t2ilib.config import DataConfig
from t2ilib.data.captions import build_captions
from t2ilib.data.pictures import open_picture
from t2ilib.data.sources import coco as source
from t2ilib.shapes import checker
from t2ilib.shapes.coco import write_coco
from t2ilib.shapes.world import caption, mixed_scenes

KINDS = ("base", "heart", "blueprint")


def invoke(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["-q", *map(str, words)])
    assert done.exit_code == code, done.output
    return done.output


def test_what_is_downloaded_and_read_is_what_was_drawn(tmp_path: Path) -> None:
    words = [word for kind in KINDS for word in ("--scenes", kind)]
    told = invoke("data", "shapes", tmp_path / "served", "--count", 12, "--layout", "coco", *words)
    assert "12 pictures to train on and 8 others" in told
    told = invoke("data", "download", "coco", tmp_path / "coco", "--server", tmp_path / "served")
    assert "data: {source: coco" in told
    for split, world_split, count in (("train", "train", 12), ("val", "validation", 8)):
        listing = source.load(DataConfig(source="coco", path=str(tmp_path / "coco"), split=split))
        scenes = mixed_scenes(count, world_split, 0, KINDS)
        assert len(listing) == count
        for record, scene in zip(listing, scenes, strict=True):
            phrasings = 3 if scene.style == "blueprint" else 4
            assert record.captions == tuple(caption(scene, phrasing) for phrasing in range(phrasings))
            assert all(checker.judge(scene, checker.read(open_picture(record.path))).values()), record


def test_its_captions_have_adverbs_to_be_taken(tmp_path: Path) -> None:
    write_coco(tmp_path / "served", 24, ["base"])
    invoke("data", "download", "coco", tmp_path / "coco", "--server", tmp_path / "served")
    listing = source.load(DataConfig(source="coco", path=str(tmp_path / "coco"), split="train"))
    captions = [record.captions for record in listing]
    edited = build_captions(["drop_adverbs"]).edit_all(captions)
    changed = [(before, after) for before, after in zip(captions, edited, strict=True) if before != after]
    assert 8 < len(changed) < 24
    adverbs = ("very", "slightly", "strongly")
    assert all(any(word in text for word in adverbs) for before, _ in changed for text in before)
    assert not any(word in text for after in edited for text in after for word in adverbs)


def test_what_is_drawn_again_is_equal_to_the_byte(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_coco(tmp_path / name, 8, ["heart"], seed=3)
    for file in ("annotations/annotations_trainval2017.zip", "zips/train2017.zip", "zips/val2017.zip"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
        assert zipfile.ZipFile(tmp_path / "one" / file).testzip() is None


@pytest.mark.parametrize(
    ("words", "says"),
    [(["--layout", "cocoa"], "Did you mean 'coco'?"), (["--layout", "coco", "--split", "test"], "leave --split out")],
)
def test_what_cannot_be_is_refused(tmp_path: Path, words: list[str], says: str) -> None:
    assert says in invoke("data", "shapes", tmp_path / "served", *words, code=2)
    assert not (tmp_path / "served").exists()
