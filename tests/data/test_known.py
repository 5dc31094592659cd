"""What was seen of pictures is kept between runs, and is never older than the pictures."""

import os
import sqlite3
import subprocess
import sys
import time

import pytest

from t2ilib.config import DataConfig
from t2ilib.data import known, manifest
from t2ilib.data.manifest import examine
from t2ilib.data.sources.folder import read_folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("T2ILIB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "seen.sqlite"


@pytest.fixture
def decoded(monkeypatch):
    """The names of what is decoded."""
    names = []
    for function in ("examine_picture", "examine_mask"):
        whole = getattr(manifest, function)
        monkeypatch.setattr(
            manifest,
            function,
            lambda path, *rest, whole=whole, **named: names.append(path.name) or whole(path, *rest, **named),
        )
    return names


def written_before(folder, seconds=60):
    for path in folder.rglob("*"):
        then = time.time() - seconds
        os.utime(path, (then, then))


@pytest.fixture
def folder(tmp_path, captioned):
    path = captioned(tmp_path / "pets", 4)
    written_before(path)
    return path


def look(folder, **data):
    config = DataConfig(path=folder, workers=1, **data)
    return examine(read_folder(folder, config), config)


def test_pictures_that_have_not_changed_are_not_decoded_again(folder, decoded):
    first = look(folder)
    assert sorted(decoded) == ["000.png", "001.png", "002.png", "003.png"]
    decoded.clear()
    assert look(folder) == first
    assert not decoded
    assert [seen.sha256 for seen in look(folder).pictures.values()] == [seen.sha256 for seen in first.pictures.values()]


def test_one_that_has_changed_is(folder, decoded, picture):
    first = look(folder)
    decoded.clear()
    picture(9, (30, 20)).save(folder / "002.png")
    written_before(folder, seconds=30)  # all have another time now, and are looked at again
    assert len(look(folder).pictures) == 4
    assert len(decoded) == 4
    decoded.clear()
    size, then = (folder / "001.png").stat().st_size, time.time() - 20
    (folder / "001.png").write_bytes((folder / "000.png").read_bytes().ljust(size, b"\0")[:size])
    os.utime(folder / "001.png", (then, then))  # another time alone
    second = look(folder)
    assert decoded == ["001.png"]
    shas = [[seen.sha256 for seen in examined.pictures.values()] for examined in (first, second)]
    assert [a == b for a, b in zip(*shas, strict=True)] == [True, False, False, True]


def test_what_was_written_just_now_is_not_remembered(folder, decoded):
    """Another writing may leave the same size and time."""
    os.utime(folder / "003.png")
    look(folder)
    decoded.clear()
    look(folder)
    assert decoded == ["003.png"]


def test_a_file_that_is_replaced_while_it_is_looked_at_is_looked_at_again(folder, decoded, picture, monkeypatch):
    """What is kept, is kept under what the file was before it was read, not under what it became."""
    look_at = manifest.look_at

    def replaced(job):
        found = look_at(job)
        picture(9).save(job[0].path)
        written_before(folder, seconds=30)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "look_at", replaced)
        before = look(folder)
    decoded.clear()
    after = look(folder)
    assert len(decoded) == 4
    assert {seen.sha256 for seen in before.pictures.values()}.isdisjoint(
        seen.sha256 for seen in after.pictures.values()
    )


def test_what_cannot_be_used_is_looked_at_again(folder, decoded):
    (folder / "001.png").write_bytes(b"no picture")
    written_before(folder)
    for _ in range(2):
        decoded.clear()
        assert len(look(folder, on_error="skip").rejected) == 1
        assert "001.png" in decoded
    assert decoded == ["001.png"]


def test_masks_are_remembered_as_masks(folder, decoded, picture):
    """A mask has checks of its own, which a picture that was seen has not been through."""
    lines = [f'{{"file_name": "{i:03d}.png", "text": "x", "mask": "{i + 1:03d}.png"}}' for i in (0, 2)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    for file in (*folder.glob("*.txt"),):
        file.unlink()
    picture(0).point(lambda _: 0).save(folder / "003.png")  # black
    written_before(folder)
    data = {"mask_column": "mask", "on_error": "skip"}
    first = look(folder, **data)
    assert [record.path.name for record in first.pictures] == ["000.png"]
    assert any("black everywhere" in why for _, why in first.rejected)
    assert sorted(decoded) == ["000.png", "001.png", "002.png", "003.png"]
    decoded.clear()
    again = look(folder, **data)
    assert again == first
    assert [seen.mask for seen in again.pictures.values()] == [seen.mask for seen in first.pictures.values()] != [b""]
    assert sorted(decoded) == ["002.png", "003.png"]


def test_a_file_that_is_no_database_or_is_damaged_is_passed_over_and_told(folder, cache, decoded, caplog):
    cache.parent.mkdir()
    cache.write_bytes(b"no database" * 1000)
    first = look(folder)
    assert len(decoded) == 4
    assert f"{cache} cannot be used, so pictures are looked at again: " in caplog.text
    cache.unlink()
    look(folder)
    assert look(folder) == first
    whole = cache.read_bytes()
    with sqlite3.connect(cache) as database:
        page_size = database.execute("PRAGMA page_size").fetchone()[0]
    cache.write_bytes(whole[:page_size] + b"\xff" * (len(whole) - page_size))  # what it holds, not what it begins with
    caplog.clear()
    decoded.clear()
    assert look(folder) == first
    assert len(decoded) == 4
    assert "cannot be used" in caplog.text


def test_a_cache_folder_that_cannot_be_written_is_no_reason_to_stop(folder, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("T2ILIB_CACHE", str(tmp_path / "file"))
    assert len(look(folder).pictures) == 4
    assert "cannot be used" in caplog.text


def test_another_process_that_writes_is_waited_for_and_then_passed_over(folder, cache, caplog, monkeypatch):
    look(folder)
    os.utime(folder / "000.png", (1, 1))
    monkeypatch.setattr(known, "SECONDS", 0.05)
    with sqlite3.connect(cache) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert len(look(folder).pictures) == 4
    assert "database is locked" in caplog.text


LOOKS = """
import sys
from pathlib import Path
from t2ilib.data.known import key_of, recall, remember
from t2ilib.data.pictures import examine_picture
for path in sorted(Path(sys.argv[1]).glob("*.png")) * 20:
    key = key_of(path)
    remember([(key, examine_picture(path))])
    assert recall([key])[0] is not None
"""


def test_two_processes_at_once(folder, decoded):
    processes = [
        subprocess.Popen([sys.executable, "-c", LOOKS, str(folder)], stderr=subprocess.PIPE, text=True) for _ in "ab"
    ]
    for process in processes:
        _, told = process.communicate()
        assert process.returncode == 0, told
    look(folder)
    assert not decoded


def test_many_are_recalled_in_order(cache):
    from t2ilib.data.pictures import Seen

    keys = [number.to_bytes(16, "big") for number in range(1200)]
    seen = [Seen(bytes([number % 256] * 32), number, 2, ("a note",) * (number % 2)) for number in range(1200)]
    known.remember(zip(keys[::-1], seen[::-1], strict=True))
    asked = [*keys[5:], None, b"x" * 16, *keys[:5]]
    assert known.recall(asked) == [*seen[5:], None, None, *seen[:5]]
