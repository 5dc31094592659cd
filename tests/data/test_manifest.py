import hashlib
import json
import logging
import os

import numpy as np
import pytest
from PIL import Image

from t2ilib.config import ConfigError, DataConfig
from t2ilib.data.dataset import FEW_HELD_OUT, build_dataset, load_datasets
from t2ilib.data.manifest import examine
from t2ilib.data.pictures import open_picture
from t2ilib.data.records import Listing, Record
from t2ilib.runfile import build_run

STOP, SKIP = DataConfig(), DataConfig(on_error="skip")


def run_of(**data):
    return build_run({"adapter": {}, "data": data})


def listing_of(folder, *names):
    return Listing(folder, tuple(Record(folder / name, f"caption of {name}") for name in names))


@pytest.fixture
def damaged(pictures, picture):
    """Two whole pictures and four that cannot be used."""
    picture(1, (96, 96)).save(pictures / "a.jpg")
    jpeg = (pictures / "a.jpg").read_bytes()
    (pictures / "half.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (pictures / "noise.png").write_bytes(np.random.default_rng(0).bytes(300))
    (pictures / "empty.png").write_bytes(b"")
    return listing_of(pictures, "a.jpg", "gone.png", "b.png", "half.jpg", "noise.png", "empty.png")


def test_every_unusable_picture_is_named(damaged):
    with Image.open(damaged[3].path) as image:
        image.verify()  # passes half a JPEG, which is why it is not what the manifest uses
    with pytest.raises(ConfigError) as error:
        examine(damaged, STOP)
    text = str(error.value)
    assert text.startswith(f"{damaged.folder}: 4 files cannot be used, 2 pictures can")
    assert "gone.png: missing" in text
    assert all(f"{name}: cannot be decoded" in text for name in ("half.jpg", "noise.png", "empty.png"))
    assert "a.jpg" not in text
    assert "b.png" not in text
    assert "data.max_rejected to " in text


def test_skip_counts_and_logs_what_it_rejects(damaged, caplog):
    with caplog.at_level(logging.WARNING, "t2ilib"):
        examined = examine(damaged, SKIP)
    assert [r.path.name for r in examined.pictures] == ["a.jpg", "b.png"]
    assert [path.name for path, _ in examined.rejected] == ["gone.png", "half.jpg", "noise.png", "empty.png"]
    assert "2 pictures used, 4 rejected:" in caplog.text
    assert "half.jpg: cannot be decoded" in caplog.text


def test_skip_is_not_advised_where_it_is_set(damaged):
    with pytest.raises(ConfigError, match="1 file cannot be used, 0 pictures can") as error:
        examine(Listing(damaged.folder, damaged[1:2]), SKIP)
    assert "max_rejected" not in str(error.value)


def test_ten_are_listed_and_the_rest_counted(pictures):
    rejected = tuple((pictures / f"{i:02d}.txt", "is alone") for i in range(13))
    with pytest.raises(ConfigError, match="13 files cannot be used") as error:
        examine(Listing(pictures, rejected=rejected), STOP)
    assert "09.txt: is alone\n  ... and 3 more" in str(error.value)
    assert "10.txt" not in str(error.value)


def test_what_the_folder_rejects_stops_or_is_skipped_like_pictures(captioned, tmp_path, caplog):
    pics = captioned(tmp_path / "p", 8)
    (pics / "007.txt").unlink()
    (pics / "001.png").write_bytes(b"")
    (pics / "._002.png").touch()
    (pics / "notes.md").touch()
    with pytest.raises(ConfigError, match=r"2 files cannot be used, 6 pictures can") as error:
        load_datasets(run_of(path=pics))
    assert "007.png: has no .txt caption" in str(error.value)
    assert "001.png: cannot be decoded: the file is empty" in str(error.value)
    with caplog.at_level(logging.INFO, "t2ilib"):
        training, held_out = load_datasets(run_of(path=pics, on_error="skip"))
    assert (len(training), len(held_out), len(training.rejected)) == (5, 1, 2)
    assert "6 pictures used, 1 hidden file ignored, 1 left aside" in caplog.text
    assert "neither a picture nor a caption: notes.md" in caplog.text
    assert "2 rejected:" in caplog.text


def test_a_whole_folder_is_told_in_one_line(captioned, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "t2ilib"):
        load_datasets(run_of(path=captioned(tmp_path / "p", 8)))
    used, split, warning = [record.getMessage() for record in caplog.records]
    assert used == f"{tmp_path / 'p'}: 8 pictures used"
    assert split == "held out: 002.png (1 of 8)"
    assert warning.startswith("only 1 picture is held out")


def test_the_split_is_told_with_names_and_a_warning_where_few_are_held_out(captioned, tmp_path, caplog):
    pics = captioned(tmp_path / "p", 24)

    def told(**data):
        caplog.clear()
        with caplog.at_level(logging.INFO, "t2ilib"):
            _, held_out = load_datasets(run_of(path=pics, **data))
        return [record.path.name for record in held_out.records], caplog.records[-2:]

    names, (split, warning) = told(validation_share=0.2)
    assert 1 < len(names) < FEW_HELD_OUT
    assert split.getMessage() == f"held out: {', '.join(names)} ({len(names)} of 24)"
    assert warning.levelno == logging.WARNING
    assert warning.getMessage().startswith(f"only {len(names)} pictures are held out")
    names, (_, split) = told(validation_share=0.6)
    assert len(names) > FEW_HELD_OUT
    assert split.getMessage() == f"held out: {', '.join(names[:8])} and {len(names) - 8} more ({len(names)} of 24)"
    assert split.levelno == logging.INFO
    _, (_, split) = told(validation_share=0)
    assert split.getMessage() == "held out: none of 24, so there is no held-out loss"


def test_any_one_picture_may_be_bad_and_some_are_still_held_out(captioned, tmp_path):
    pics = captioned(tmp_path / "p", 8)
    for path in sorted(pics.glob("*.png")):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        training, held_out = load_datasets(run_of(path=pics, on_error="skip"))
        assert len(training) + len(held_out) == 7
        assert len(held_out) >= 1
        assert [rejected.name for rejected, _ in training.rejected] == [path.name]
        path.write_bytes(whole)


def test_what_a_plugin_raises_names_its_picture(pictures, monkeypatch):
    for error in (KeyError("tag"), MemoryError(), EOFError(), IndexError("x"), OverflowError("y")):
        monkeypatch.setattr(Image.Image, "convert", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        with pytest.raises(ConfigError, match=r"b\.png: cannot be decoded: "):
            examine(listing_of(pictures, "b.png"), STOP)


def test_a_picture_that_may_not_be_read(pictures, monkeypatch):
    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", forbidden)
    with pytest.raises(ConfigError, match=r"b\.png: cannot be .*Permission denied"):
        examine(listing_of(pictures, "b.png"), STOP)


def test_names_that_are_not_utf8_are_shown_and_hashed(captioned, tmp_path, caplog):
    pics = captioned(tmp_path / os.fsdecode(b"caf\xe9"), 4)
    for ending in ("png", "txt"):
        (pics / f"000.{ending}").rename(pics / os.fsdecode(b"K\xfcche." + ending.encode()))
    (pics / os.fsdecode(b"M\xfcll.txt")).write_text("no picture")
    with pytest.raises(ConfigError, match=r"M\\xfcll\.txt: is a caption without a picture") as error:
        load_datasets(run_of(path=pics))
    str(error.value).encode()
    with caplog.at_level(logging.INFO, "t2ilib"):
        training, held_out = load_datasets(run_of(path=pics, on_error="skip"))
    caplog.text.encode()
    assert len(training) + len(held_out) == 4
    assert training.name == "caf\\xe9"


def test_the_digest_covers_pixels_captions_and_order(pictures):
    def digest(records, config=STOP):
        return build_dataset("x", examine(Listing(pictures, tuple(records)), config), records, config, rest=True).digest

    records = [Record(pictures / name, f"caption of {name}") for name in ("a.jpg", "b.png")]
    before = digest(records)
    expected = hashlib.sha256()
    for record in records:
        expected.update(hashlib.sha256(record.path.read_bytes()).digest() + record.caption.encode() + b"\0")
    assert before == expected.hexdigest()  # checkpoints hold it: another way to make it would resume none of them
    assert digest([Record(records[0].path, "another"), records[1]]) != before
    assert digest(records[::-1]) != before
    pixels = np.asarray(open_picture(pictures / "b.png")).copy()
    pixels[3, 3, 1] ^= 1
    Image.fromarray(pixels).save(pictures / "b.png")
    assert digest(records) != before


def test_the_ground_comes_along(captioned, tmp_path):
    parts = load_datasets(run_of(path=captioned(tmp_path / "p", 8), ground="#102030"))
    assert [part.ground for part in parts] == ["#102030"] * 2


def test_datasets_by_source(captioned, tmp_path):
    training, held_out = load_datasets(run_of(path=captioned(tmp_path / "pets", 8)))
    assert (training.name, len(training), held_out.name, len(held_out)) == ("pets", 7, "pets-held-out", 1)
    apart = run_of(path=tmp_path / "pets", validation_path=captioned(tmp_path / "v", 3))
    assert [len(part) for part in load_datasets(apart)] == [8, 3]
    with pytest.raises(ConfigError, match=r"data.source: 'foldr' does not exist; choose folder.*Did you mean 'folder'"):
        run_of(source="foldr")


def test_one_picture(captioned, tmp_path):
    pics = captioned(tmp_path / "one", 1)
    with pytest.raises(ConfigError, match=r"set data\.validation_share: 0"):
        load_datasets(run_of(path=pics))
    training, held_out = load_datasets(run_of(path=pics, validation_share=0))
    assert (len(training), len(held_out)) == (1, 0)


def test_bad_held_out_pictures_of_their_own_folder(captioned, tmp_path):
    validation = captioned(tmp_path / "v", 2)
    (validation / "000.png").write_bytes(b"")
    apart = {"path": captioned(tmp_path / "p", 2), "validation_path": validation}
    with pytest.raises(ConfigError, match=r"000\.png: cannot be decoded: the file is empty"):
        load_datasets(run_of(**apart))
    training, held_out = load_datasets(run_of(**apart, on_error="skip"))
    assert (len(training.rejected), len(held_out.rejected), len(held_out)) == (0, 1, 1)


def test_a_table_is_read_strictly_whatever_on_error_says(captioned, tmp_path):
    pics = captioned(tmp_path / "p", 2)
    (pics / "metadata.jsonl").write_text(json.dumps({"file_name": "000.png", "text": 3}))
    with pytest.raises(ConfigError, match="row 1 has no text in 'text'"):
        load_datasets(run_of(path=pics, on_error="skip"))
