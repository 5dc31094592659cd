import io
import pickle
import stat
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from t2ilib.config import ConfigError
from t2ilib.data.sources import archived
from t2ilib.data.sources.archived import open_zip


def entry(name, mode=0, **attributes):
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    for attribute, value in attributes.items():
        setattr(info, attribute, value)
    return info


def write(path, entries, prefix=b""):
    """`entries`: (info or name, bytes) pairs."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in entries:
            file.writestr(name, data)
    path.write_bytes(prefix + buffer.getvalue())
    return path


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_are_what_zipfile_reads_whoever_reads_them(tmp_path):
    draw = np.random.default_rng(0)
    data = {f"a/{i:02d}.jpg": draw.bytes(50_000 + i) for i in range(20)} | {"long.txt": b"words " * 20_000, "none": b""}
    packed = [
        (entry(name, compress_type=zipfile.ZIP_DEFLATED if index % 2 else zipfile.ZIP_STORED), content)
        for index, (name, content) in enumerate(data.items())
    ]
    archive = open_zip(
        write(tmp_path / "x.zip", packed, prefix=b"#!/bin/sh\n")
    )  # as those that extract themselves begin
    assert list(archive.members) == sorted(data)
    assert (archive.refused, archive.hidden) == ({}, ())
    with ThreadPoolExecutor(8) as pool:
        wanted = [*archive.members.values()] * 10
        assert [*pool.map(archived.Member.read_bytes, wanted)] == [data[member.inside] for member in wanted]
    member = archive.members["a/03.jpg"]
    assert (member.name, str(member)) == ("03.jpg", "x.zip/a/03.jpg")
    assert pickle.loads(pickle.dumps(member)).read_bytes() == data["a/03.jpg"]
    assert len({member, pickle.loads(pickle.dumps(member))}) == 1


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_that_are_not_plain_files_are_refused(tmp_path):
    hostile = ["/etc/passwd", "../up.jpg", "a/../../up.jpg", "..", "C:/x.jpg", "c:x.jpg", "a\\..\\x.jpg", "a/.."]
    entries = [(entry(name), b"x") for name in hostile]
    entries += [
        (entry("link.jpg", stat.S_IFLNK | 0o777), b"/etc/passwd"),
        (entry("pipe.jpg", stat.S_IFIFO), b""),
        (entry("twice.jpg"), b"1"),
        (entry("twice.jpg"), b"2"),
        (entry("good.jpg", stat.S_IFREG | 0o644), b"y"),
        (entry("dots..jpg"), b"y"),
        (entry("folder/"), b""),
        (entry("__MACOSX/._good.jpg"), b"z"),
        (entry("bz.jpg", compress_type=zipfile.ZIP_BZIP2), b"x" * 100),
    ]
    archive = open_zip(write(tmp_path / "x.zip", entries))
    assert list(archive.members) == ["dots..jpg", "good.jpg"]
    assert [member.inside for member in archive.hidden] == ["__MACOSX/._good.jpg"]
    reasons = {name: reason for name, (_, reason) in archive.refused.items()}
    assert {reasons[name] for name in hostile} == {"has a name that leads out of its archive"}
    assert reasons["link.jpg"] == "is a link, which is not followed"
    assert reasons["pipe.jpg"] == "is not a file"
    assert reasons["twice.jpg"] == "is in its archive 2 times: keep one"
    assert "method 12" in reasons["bz.jpg"]
    assert len(reasons) == len(hostile) + 4


def test_sizes_that_no_picture_has(tmp_path, monkeypatch):
    path = write(tmp_path / "x.zip", [(entry("bomb.jpg", compress_type=zipfile.ZIP_DEFLATED), b"\0" * 10**6)])
    monkeypatch.setattr(archived, "LARGEST", 10**6 - 1)
    assert open_zip(path).refused["bomb.jpg"][1].startswith("has 1000000 bytes, more than")


def test_a_size_that_the_archive_states_wrongly_is_not_exceeded(tmp_path):
    path = write(tmp_path / "x.zip", [(entry("bomb.jpg", compress_type=zipfile.ZIP_DEFLATED), b"\0" * 10**6)])
    data = path.read_bytes()
    size = (10**6).to_bytes(4, "little")
    assert data.count(size) == 2
    path.write_bytes(data.replace(size, (10).to_bytes(4, "little")))
    with pytest.raises(ValueError, match=r"damaged in x.zip: its size or checksum differs"):
        open_zip(path).members["bomb.jpg"].read_bytes()


def test_damage_is_noticed_where_it_is(tmp_path):
    draw = np.random.default_rng(0).bytes(300)
    path = write(
        tmp_path / "x.zip", [("a.jpg", draw), (entry("b.jpg", compress_type=zipfile.ZIP_DEFLATED), b"b" * 1000)]
    )
    members, whole = open_zip(path).members, path.read_bytes()
    for name, place in (("a.jpg", whole.index(draw) + 5), ("b.jpg", members["b.jpg"].offset + 30 + len("b.jpg") + 1)):
        flipped = bytearray(whole)
        flipped[place] ^= 0xFF
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"damaged in x.zip"):
            members[name].read_bytes()
    path.write_bytes(whole[:20])
    with pytest.raises(ValueError, match=r"x.zip is cut off, or not what it was"):
        members["a.jpg"].read_bytes()


@pytest.mark.parametrize("kept", [0, 10, 200, -1, -10])
def test_half_a_download_is_told(tmp_path, kept):
    path = write(tmp_path / "x.zip", [("a.jpg", b"x" * 300)])
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ConfigError, match=r"x.zip is not a whole zip .*: download it again"):
        open_zip(path)
    with pytest.raises(ConfigError, match=r"gone.zip cannot be read: No such file"):
        open_zip(Path(tmp_path / "gone.zip"))
