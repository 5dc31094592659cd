"""Shards as others write them: tars made by Python's tarfile, read locally, over HTTP and from memory, whole and hostile."""

import gzip
import hashlib
import http.server
import io
import json
import os
import re
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest

from t2ilib.config import ConfigError, DataConfig
from t2ilib.data.manifest import examine, load_listings
from t2ilib.data.sources import shardindex, spans
from t2ilib.data.sources.spans import Span, expanded
from t2ilib.data.sources.webdataset import load


def png(picture, seed, size=(24, 16)):
    data = io.BytesIO()
    picture(seed, size).save(data, "PNG")
    return data.getvalue()


def tar_of(path, files, format=tarfile.PAX_FORMAT):
    """A tar of (name, bytes) or of TarInfos without a body."""
    with tarfile.open(path, "w", format=format) as tar:
        for file in files:
            if isinstance(file, tarfile.TarInfo):
                tar.addfile(file)
            else:
                info = tarfile.TarInfo(file[0])
                info.size = len(file[1])
                tar.addfile(info, io.BytesIO(file[1]))
    return path


def read(path, **fields):
    return load(DataConfig(source="webdataset", path=str(path), **fields))


def told(listing):
    """Reasons by the member's name, or the shard's."""
    return {path.member if isinstance(path, Span) else path.name: reason for path, reason in listing.rejected}


def captions(listing):
    return [(record.path.name, *record.captions) for record in listing]


@pytest.fixture
def pictured(picture):
    """Bytes of four pictures."""
    return [png(picture, seed) for seed in range(4)]


@pytest.fixture
def two(tmp_path, pictured):
    """A folder of two shards of two captioned pictures each."""
    (tmp_path / "shards").mkdir()
    for shard in range(2):
        files = [
            (f"{i:03d}.{ending}", data)
            for i in range(2 * shard, 2 * shard + 2)
            for ending, data in (("png", pictured[i]), ("txt", f"caption {i}\n".encode()))
        ]
        tar_of(tmp_path / "shards" / f"s-{shard}.tar", files)
    return tmp_path / "shards"


EXPECTED = [(f"{i:03d}.png", f"caption {i}") for i in range(4)]


@pytest.mark.parametrize(
    "path", ["", "s-{0..1}.tar", "s-{0,1}.tar", "s-*.tar", "s-[01].tar", "../shards"], ids=lambda path: path or "folder"
)
def test_paths_of_shards(two, pictured, path):
    listing = read(two / path if path else two)
    assert captions(listing) == EXPECTED
    assert [record.path.read_bytes() for record in listing] == pictured
    assert listing.rejected == ()


def test_one_shard_and_the_order_that_is_written(two):
    assert captions(read(two / "s-1.tar")) == EXPECTED[2:]
    assert captions(read(two / "s-{1..0}.tar")) == EXPECTED[2:] + EXPECTED[:2]


def test_braces_as_bash_expands_them():
    assert expanded("a{08..11}b{x,y}.tar") == [f"a{n}b{m}.tar" for n in ("08", "09", "10", "11") for m in "xy"]
    assert expanded("{9..11}") == ["9", "10", "11"]
    assert expanded("{000..002}") == ["000", "001", "002"]
    for wrong, why in (("{a}", "write {000000..000012}"), ("{0..9999999}", "more than"), ("{0..999}" * 3, "more than")):
        with pytest.raises(ConfigError, match=re.escape(why)):
            expanded(wrong)


def test_everything_in_a_folder_of_shards_is_accounted_for(two):
    (two / ".DS_Store").touch()
    (two / "README.md").touch()
    (two / "more").mkdir()
    listing = read(two)
    assert [path.name for path in listing.hidden] == [".DS_Store"]
    assert [path.name for path, _ in listing.aside] == ["README.md", "more"]
    assert "name its shards by a pattern" in listing.aside[1][1]


def test_shards_that_are_not_there(two, tmp_path):
    with pytest.raises(ConfigError, match=r"2 of 4 shards cannot be read:\n.*s-2\.tar: is not there\n.*s-3\.tar"):
        read(two / "s-{0..3}.tar")
    (tmp_path / "none" / "train").mkdir(parents=True)
    with pytest.raises(
        ConfigError, match=r"none has no shards \(\.tar\):\n.*train is a folder: name its shards by a pattern"
    ):
        read(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"no file fits this pattern"):
        read(two / "t-*.tar")
    with pytest.raises(ConfigError, match=r"commands are not run"):
        read("pipe:curl https://x/s-0.tar")
    with pytest.raises(ConfigError, match=r"data\.path is missing"):
        load(DataConfig(source="webdataset"))


def test_held_out_shards_may_lie_among_the_others(two):
    config = DataConfig(source="webdataset", path=str(two), validation_path=str(two / "s-1.tar"))
    training, held_out = load_listings(config)
    assert (captions(training), captions(held_out)) == (EXPECTED[:2], EXPECTED[2:])
    with pytest.raises(ConfigError, match="the same shards"):
        read(two, validation_path=f"{two}/s-*.tar")


@pytest.mark.parametrize("name", ["s-0.tar.gz", "s-0.tgz"])
def test_compressed_shards_are_refused_with_what_to_do(two, name):
    (two / name).write_bytes(gzip.compress((two / "s-0.tar").read_bytes()))
    for path in (two, two / name):
        with pytest.raises(ConfigError, match=rf"compressed.*\n.*{re.escape(name)}\nDecompress them once \(gunzip"):
            read(path)


def test_captions_of_every_kind(tmp_path, pictured):
    data = pictured[0]
    files = [
        ("./x/a.png", data), ("./x/a.txt", "ein Käfer\r\nim Gras\r\n".encode()),
        ("x/b.JPG", data), ("b.caption", b"of another"), ("x/b.caption", b"b"),
        ("c.json", b'{"caption": ["c1", " c2 "], "w": 0.5, "n": 3, "score": NaN}'), ("c.webp", data), ("c.mask.png", data),
        ("d.png", data), ("d.txt", b"d"), ("d.json", b'{"caption": "not this", "w": ""}'),
        ("e.png", data), ("e.json", b'{"text": "e", "scene": {"shape": "heart"}}'), ("e.cls", b"3"),
        ("f.png", data),
    ]  # fmt: skip
    tar_of(tmp_path / "s.tar", files)
    listing = read(tmp_path / "s.tar", weight_column="w", repeat_column="n")
    assert captions(listing) == [
        ("a.png", "ein Käfer\nim Gras"),
        ("b.JPG", "b"),
        ("c.webp", "c1", "c2"),
        ("d.png", "d"),
        ("e.png", "e"),
    ]
    c, e = listing[2], listing[4]
    assert (c.weight, c.repeats, c.mask.name, c.mask.read_bytes()) == (0.5, 3, "c.mask.png", data)
    assert e.scene == {"shape": "heart"}
    assert (e.weight, e.repeats, e.mask) == (1.0, 1, None)
    assert told(listing) == {
        "b.caption": "is a caption without a picture in its sample, which has caption",
        "f.png": "has no .txt, .caption, .text, .json with a caption in its sample",
    }
    assert [path.member for path, _ in listing.aside] == ["e.cls"]
    assert {path.member for path in listing.texts} >= {"./x/a.txt", "c.json", "d.json"}
    prompted = read(tmp_path / "s.tar", prompt="a thing ")
    assert captions(prompted)[-1] == ("f.png", "a thing")
    assert len(prompted.rejected) == 1
    named = read(tmp_path / "s.tar", caption_column="caption")
    assert dict(captions(named)[-1:]) == {"d.png": "not this"}
    assert "has no 'caption' in its sample (its .json has text, scene" in told(named)["e.png"]


def test_subfolders_have_weights_and_repeats(tmp_path, pictured):
    files = [(f"{folder}/1.{e}", d) for folder in ("10_cat", "dog") for e, d in (("png", pictured[0]), ("txt", b"it"))]
    listing = read(tar_of(tmp_path / "s.tar", files), weights={"dog": 2.0}, folder_repeats=True)
    assert [(record.weight, record.repeats) for record in listing] == [(1.0, 10), (2.0, 1)]


def test_columns_that_no_sample_has(two):
    for field, why in (("weight_column", "no .json of a sample has 'x'"), ("mask_column", "no sample has a picture")):
        with pytest.raises(ConfigError, match=f"data.{field}: {why}"):
            read(two, **{field: "x"})
    with pytest.raises(ConfigError, match=r"data\.split"):
        read(two, split="train")
    with pytest.raises(ConfigError, match=r"data\.streaming"):
        read(two, streaming=True)


@pytest.mark.parametrize(
    ("files", "rejected"),
    [
        ([("a.txt", b"alone")], {"a.txt": "is a caption without a picture"}),
        ([("a.png", b"any")], {"a.png": "has no .txt"}),
        ([("a.png", b"any"), ("a.txt", b" \n")], {"a.png": "has an empty caption"}),
        ([("a.png", b"any"), ("a.txt", b"caf\xe9")], {"a.png": "its .txt cannot be read: a.txt: byte 3 (0xe9, line 1) is not UTF-8"}),
        ([("a.png", b"any"), ("a.txt", b"1"), ("a.caption", b"2")], {"a.png": "has 2 captions (txt, caption): keep one"}),
        ([("a.png", b"any"), ("a.txt", b"x" * (2**20 + 1))], {"a.png": "has 1048577 bytes"}),
        ([("a.png", b"any"), ("a.json", b'{"caption": ')], {"a.png": "its .json is not JSON"}),
        ([("a.png", b"any"), ("a.json", b"[" * 100_000)], {"a.png": "nested too deep"}),
        ([("a.png", b"any"), ("a.json", b'["caption"]')], {"a.png": "holds no fields, but list"}),
        ([("a.png", b"any"), ("a.json", b'{"caption": 3}')], {"a.png": "neither text nor a list"}),
        ([("a.png", b"any"), ("a.json", b'{"caption": []}')], {"a.png": "neither text nor a list"}),
        ([("a.png", b"any"), ("a.json", b'{"caption": ["x", ""]}')], {"a.png": "its caption 2 of 2 is empty"}),
        ([("a.png", b"any"), ("a.json", b'{"caption": "\\ud83d"}')], {"a.png": "half a character"}),
        ([("a.png", b"any"), ("a.json", b'{"caption": "x", "w": -1}')], {"a.png": "-1 is no weight"}),
        ([("a.png", b"any"), ("a.json", b'{"caption": "x", "w": NaN}')], {"a.png": "nan is no weight"}),
        ([("a.png", b"any"), ("a.webp", b"any"), ("a.txt", b"x")], {"a.png": "one of 2 pictures of its sample (png, webp)"}),
        ([("ok.png", b"again"), ("ok.txt", b"again")], {"ok.png": "there again under the same name", "ok.txt": "there again"}),
        ([("../b.png", b"any")], {"../b.png": "leads out of the tar"}),
        ([("/etc/b.png", b"any")], {"/etc/b.png": "an absolute name"}),
        ([("a/../../b.png", b"any")], {"a/../../b.png": "leads out of the tar"}),
        ([("C:/b.png", b"any")], {"C:/b.png": "an absolute name"}),
        ([("..\\b.png", b"any")], {"..\\b.png": "leads out of the tar"}),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_sample_is_told(tmp_path, pictured, files, rejected):
    weights = {"weight_column": "w"} if any(b'"w"' in data for _, data in files) else {}
    whole = [
        ("ok.png", pictured[0]),
        ("ok.txt", b"whole"),
        *[("v.png", pictured[1]), ("v.json", b'{"text": "v", "w": 2}')] * bool(weights),
    ]
    listing = read(tar_of(tmp_path / "s.tar", whole + files), **weights)
    assert captions(listing)[0] == ("ok.png", "whole")
    assert listing[0].path.read_bytes() == pictured[0]  # of two under one name the first
    assert len(listing) == 1 + bool(weights)
    reasons = told(listing)
    assert reasons.keys() == rejected.keys()
    for name, why in rejected.items():
        assert why in reasons[name]


def odd(name, kind, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (tarfile.SYMTYPE, "is a link (to /etc/passwd), which is not followed"),
        (tarfile.LNKTYPE, "is a link (to /etc/passwd), which is not followed"),
        (tarfile.CHRTYPE, "is a device or a pipe"),
        (tarfile.BLKTYPE, "is a device or a pipe"),
        (tarfile.FIFOTYPE, "is a device or a pipe"),
        (b"Z", "is of tar's type b'Z'"),
    ],
)
@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_what_is_no_file_is_no_picture(tmp_path, pictured, kind, why, format):
    files = [odd("x.png", kind, "/etc/passwd"), odd("y.txt", kind, "/etc/passwd"), odd("folder", tarfile.DIRTYPE)]
    files += [("y.png", pictured[1]), ("ok.png", pictured[0]), ("ok.txt", b"whole")]
    listing = read(tar_of(tmp_path / "s.tar", files, format))
    assert captions(listing) == [("ok.png", "whole")]
    assert listing[0].path.read_bytes() == pictured[0]
    reasons = told(listing)
    assert reasons.keys() == {"x.png", "y.png"}
    assert why in reasons["x.png"]
    assert reasons["y.png"].startswith(f"its .txt cannot be read: {why}")


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_names_that_are_not_utf8(tmp_path, pictured, format):
    names = ["x" * 150 + "/" + "y" * 150, "ä" * 80, os.fsdecode(b"K\xfcche")]
    files = [(f"{name}.{e}", d) for name in names for e, d in (("png", pictured[0]), ("txt", b"it"))]
    with tarfile.open(tmp_path / "s.tar", "w", format=format) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    listing = read(tmp_path / "s.tar")
    assert [record.path.member for record in listing] == [f"{name}.png" for name in names]
    assert all(record.path.read_bytes() == pictured[0] for record in listing)


def test_members_lie_where_tarfile_says(tmp_path, pictured):
    """Against Python's own reader, over folders, long names and sizes that fill their blocks or not."""
    files = [
        (f"{'n' * length}.png", bytes(size)) for length in (3, 99, 120, 300) for size in (0, 1, 511, 512, 513, 5000)
    ]
    files = [(f"{index}/{name}", data) for index, (name, data) in enumerate(files)]
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tar_of(tmp_path / "s.tar", files, format)
        index = shardindex.scan(str(path), path.stat().st_size)
        with tarfile.open(path) as tar:
            expected = [(member.name, member.offset_data, member.size) for member in tar.getmembers()]
        assert [tuple(member)[:3] for member in index.members] == expected


def pax_header(records):
    data = b"".join(b"%d %s\n" % (len(record) + len(str(len(record) + 4)) + 2, record) for record in records)
    info = tarfile.TarInfo("PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)


def raw(name, data, size=None, kind=tarfile.REGTYPE):
    info = tarfile.TarInfo(name)
    info.size, info.type = len(data) if size is None else size, kind
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


WHOLE = b"".join(raw(f"ok.{ending}", data) for ending, data in (("png", b"any bytes"), ("txt", b"whole")))
END = bytes(1024)


def sparse_map(extended):
    """GNU's old sparse format: the header holds the first pieces, and blocks behind it more of them."""
    block = bytearray(raw("s.png", b"", size=512, kind=tarfile.GNUTYPE_SPARSE))
    block[386:410] = b"00000000000\0" + b"00000001000\0"
    block[482], block[483:495] = extended, b"00000010000\0"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + (bytes(512) if extended else b"") + bytes(512)


@pytest.mark.parametrize(
    "body",
    [
        sparse_map(False),
        sparse_map(True),
        pax_header([b"GNU.sparse.major=1", b"GNU.sparse.minor=0", b"GNU.sparse.name=s.png"]) + raw("s.png", b"packed"),
    ],
)
def test_sparse_files_are_refused_and_what_follows_is_read(tmp_path, body):
    (tmp_path / "s.tar").write_bytes(body + WHOLE + END)
    listing = read(tmp_path / "s.tar")
    assert captions(listing) == [("ok.png", "whole")]
    assert listing[0].path.read_bytes() == b"any bytes"
    assert [(path.name, "is a sparse file" in reason) for path, reason in listing.rejected] == [("s.png", True)]


def test_a_size_in_a_pax_header_counts(tmp_path):
    body = pax_header([b"size=9", b"path=renamed.png"]) + raw("x.png", b"any bytes", size=0)
    (tmp_path / "s.tar").write_bytes(body + raw("renamed.txt", b"it") + END)
    listing = read(tmp_path / "s.tar")
    assert captions(listing) == [("renamed.png", "it")]
    assert listing[0].path.read_bytes() == b"any bytes"


@pytest.mark.parametrize(
    ("tail", "why"),
    [
        (raw("x.png", b"abc", size=10**6), "is cut off: x.png is to have 1000000 bytes, and"),
        (raw("x.png", b"abc", size=2**62), "is cut off: x.png is to have"),
        (raw("x.png", bytes(range(256)) * 20, size=512) + END, "has no header at byte 3072"),  # says it is smaller than it is
        (raw("x.png", b"abc")[:300], "is cut off in a header (byte 2048)"),
        (b"not a header".ljust(512) + END, "has no header at byte 2048"),
        (raw("LongLink", b"", size=2**40, kind=tarfile.GNUTYPE_LONGNAME) + END, "is cut off"),
        (raw("LongLink", bytes(2**20 + 1), kind=tarfile.GNUTYPE_LONGNAME) + END, "has 1048577 bytes of names"),
        (raw("PaxHeader", b"999 path=x\n", kind=tarfile.XHDTYPE) + END, "a pax header at byte 2048 that cannot be read"),
        (raw("PaxHeader", b"path=x\n", kind=tarfile.XHDTYPE) + END, "a pax header at byte 2048 that cannot be read"),
        (pax_header([b"size=-512"]) + raw("x.png", b"") + END, "the size '-512'"),
        (pax_header([b"size=" + b"9" * 5000]) + raw("x.png", b"") + END, "pax header"),
    ],
)  # fmt: skip
def test_a_shard_that_breaks_off(tmp_path, tail, why):
    (tmp_path / "s.tar").write_bytes(WHOLE + tail)
    with pytest.raises(ConfigError, match=re.escape(why)) as error:
        read(tmp_path / "s.tar")
    assert "set data.on_error to skip to use what lies before" in str(error.value)
    listing = read(tmp_path / "s.tar", on_error="skip")
    assert captions(listing) == [("ok.png", "whole")]
    assert why in told(listing)["s.tar"]
    assert told(listing).keys() <= {"s.tar", "x.png"}


def test_a_size_below_zero(tmp_path):
    block = bytearray(raw("x.png", b""))
    block[124:136] = b"\xff" * 12  # -1 in base 256
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    (tmp_path / "s.tar").write_bytes(WHOLE + bytes(block) + END)
    with pytest.raises(ConfigError, match="a size below zero"):
        read(tmp_path / "s.tar")


@pytest.mark.parametrize("data", [b"", b"<html>Not found</html>", b"<html>" * 1000])
def test_what_is_no_tar(tmp_path, data):
    (tmp_path / "s.tar").write_bytes(data)
    with pytest.raises(ConfigError, match=r"s\.tar is no tar"):
        read(tmp_path / "s.tar")


def test_a_cut_that_leaves_whole_members_and_tars_behind_one_another(tmp_path):
    (tmp_path / "cut.tar").write_bytes(WHOLE)
    (tmp_path / "two.tar").write_bytes(WHOLE + bytes(10240) + WHOLE + END)
    assert "without an end mark" in told(read(tmp_path / "cut.tar"))["cut.tar"]
    assert "more behind its end mark" in told(read(tmp_path / "two.tar"))["two.tar"]


def test_a_member_that_would_fill_the_memory(tmp_path):
    with (tmp_path / "s.tar").open("wb") as file:
        file.write(WHOLE + raw("x.png", b"", size=2**30 + 512))
        file.truncate(len(WHOLE) + 512 + 2**30 + 512 + len(END))
    assert told(read(tmp_path / "s.tar")) == {"x.png": "has 1073742336 bytes: it cannot be a picture"}


def test_every_cut_of_a_tar_is_noticed(two):
    """Wherever a shard is cut off before its end mark, something is told."""
    whole, place = (two / "s-0.tar").read_bytes(), two / "cut.tar"
    end = len(whole.rstrip(b"\0"))
    for size in {*range(0, end + 512, 500), *range(0, end + 512, 512)}:
        place.write_bytes(whole[:size])
        try:
            listing = read(place)
        except ConfigError:
            continue
        assert listing.rejected, size


def test_hidden_members(tmp_path, pictured):
    files = [
        ("ok.png", pictured[0]),
        ("ok.txt", b"x"),
        ("._ok.png", b"any"),
        ("__MACOSX/ok.png", b"any"),
        ("README", b""),
    ]
    listing = read(tar_of(tmp_path / "s.tar", files))
    assert [path.member for path in listing.hidden] == ["._ok.png", "__MACOSX/ok.png"]
    assert [(path.member, why) for path, why in listing.aside] == [("README", "has no ending that says what it is")]
    assert listing.rejected == ()


def test_headers_are_read_once(two, monkeypatch):
    read(two)
    monkeypatch.setattr(shardindex, "scan", lambda *_: pytest.fail("scanned again"))
    assert captions(read(two)) == EXPECTED
    for kept in (shardindex.cache_folder() / "shards").iterdir():
        kept.write_bytes(b"{")
    monkeypatch.undo()
    assert captions(read(two)) == EXPECTED


def test_a_shard_that_was_written_anew_is_read_anew(two, pictured):
    read(two)
    old = (two / "s-0.tar").stat()
    tar_of(
        two / "s-0.tar",
        [("000.png", pictured[0]), ("000.txt", b"another 0"), ("001.png", pictured[1]), ("001.txt", b"another 1")],
    )
    assert (two / "s-0.tar").stat().st_size == old.st_size
    os.utime(two / "s-0.tar", ns=(old.st_atime_ns, old.st_mtime_ns + 1))
    assert captions(read(two)) == [("000.png", "another 0"), ("001.png", "another 1"), *EXPECTED[2:]]


def test_a_cache_that_cannot_be_written(two, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("T2ILIB_CACHE", str(tmp_path / "file"))
    assert captions(read(two)) == EXPECTED
    assert "cannot keep the index" in caplog.text


def test_spans_are_read_by_many_threads(tmp_path):
    contents = [hashlib.sha256(bytes([i])).digest() * 3000 for i in range(200)]
    tar_of(
        tmp_path / "s.tar",
        [(f"{i}.{e}", d) for i, data in enumerate(contents) for e, d in (("png", data), ("txt", b"x"))],
    )
    records = read(tmp_path / "s.tar").records
    order = [(i * 77) % 200 for i in range(1000)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda i: records[i].path.read_bytes() == contents[i], order))
    assert all(found)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder with ranges, as file servers give them; counts bytes, and fails when told to."""

    ranges, fail, status = True, 0, 503

    def do_GET(self):
        cls = type(self)
        if cls.fail:
            cls.fail -= 1
            self.send_error(cls.status)
            return
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = self.translate_path(self.path)
        if not match or not cls.ranges or not os.path.isfile(path):
            super().do_GET()
            return
        first, last = int(match[1]), int(match[2])
        with open(path, "rb") as file:
            file.seek(first)
            data = file.read(last + 1 - first)
        cls.served.append(len(data))
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{os.path.getsize(path)}")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def served(two):
    """The folder of two shards behind HTTP: its URL, and the handler."""
    handler = type("OwnHandler", (Handler,), {"served": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: handler(*args, directory=str(two))) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()


def test_shards_behind_http(served, pictured, monkeypatch, two):
    url, handler = served
    for path in ("/s-{0..1}.tar", "/", "/s-*.tar", "/s-{0..1}.tar?token=secret"):
        listing = read(url + path)
        assert captions(listing) == EXPECTED
        assert [record.path.read_bytes() for record in listing] == pictured
        assert "secret" not in str(listing[0].path)
    handler.served.clear()
    assert captions(read(f"{url}/s-{{0..1}}.tar")) == EXPECTED
    assert handler.served == []  # what lies where is known, by size and time
    assert listing[0].path.read_bytes() == pictured[0]
    assert handler.served == [len(pictured[0])]
    examined = examine(listing, DataConfig())
    assert len(examined.pictures) == 4


def test_remote_headers_in_small_blocks(served, monkeypatch, pictured):
    monkeypatch.setattr(shardindex, "REMOTE_BLOCK", 700)
    listing = read(f"{served[0]}/s-0.tar")
    assert [record.path.read_bytes() for record in listing] == pictured[:2]


def test_without_a_time_from_the_server_nothing_is_remembered(served, monkeypatch, pictured):
    url, handler = served
    monkeypatch.setattr(
        handler,
        "send_header",
        lambda self, name, value: name == "Last-Modified" or Handler.send_header(self, name, value),
    )
    for _ in range(2):
        handler.served.clear()
        assert captions(read(f"{url}/s-0.tar")) == EXPECTED[:2]
        assert sum(handler.served) > 0


def test_answers_that_fail(served, monkeypatch):
    url, handler = served
    monkeypatch.setattr(spans, "LONGEST_WAIT", 0)
    record = read(f"{url}/s-0.tar")[0]
    handler.fail = 2
    assert len(record.path.read_bytes()) == record.path.size
    handler.fail = 3
    with pytest.raises(OSError, match=r"cannot be read in 3 tries \(503"):
        record.path.read_bytes()
    handler.fail, handler.status = 1, 403
    with pytest.raises(OSError, match="the server refuses it"):
        record.path.read_bytes()
    handler.ranges = False
    with pytest.raises(OSError, match="knows no ranges"):
        record.path.read_bytes()
    with pytest.raises(ConfigError, match=r"s-9\.tar: is not there"):
        read(f"{url}/s-{{0,9}}.tar")


def test_shards_in_any_file_system(two, pictured):
    system = fsspec.filesystem("memory")
    for path in two.iterdir():
        system.pipe_file(f"/bucket/v1.0/{path.name}", path.read_bytes())
    for path in ("", "/s-*.tar", "/s-{0..1}.tar"):
        listing = read(f"memory://bucket/v1.0{path}")
        assert captions(listing) == EXPECTED
        assert [record.path.read_bytes() for record in listing] == pictured


def test_protocols_that_cannot_be_spoken():
    with pytest.raises(ConfigError, match=r"gs: needs a package.*gcsfs.*pip"):
        read("gs://bucket/s-0.tar")
    with pytest.raises(ConfigError, match=r"Protocol not known: foo"):
        read("foo://bucket/s-0.tar")


def test_messages_keep_secrets():
    span = Span("https://me:word@host/s.tar?sig=abc", 0, 1, "x/a.png")
    assert (str(span), span.name, span.parent) == ("https://host/s.tar/x/a.png", "a.png", "https://host/s.tar")


def test_json_captions_in_a_field_of_any_name(tmp_path, pictured):
    files = [("a.png", pictured[0]), ("a.json", json.dumps({"BLIP": ["one", "two"], "caption": "other"}).encode())]
    path = tar_of(tmp_path / "s.tar", files)
    assert captions(read(path, caption_column="BLIP")) == [("a.png", "one", "two")]
