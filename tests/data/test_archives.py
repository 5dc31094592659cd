"""Archives that mean well come out as the standard tools have them; those that do not are refused before anything is written."""

import bz2
import gzip
import io
import lzma
import random
import stat
import struct
import tarfile
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest

from t2ilib.config import ConfigError
from t2ilib.data.download import archives
from t2ilib.data.download.archives import ArchiveError, Receipt, check_archive, extract, read_receipt

CONTENT = {"train/a.jpg": b"a" * 5000, "train/b.jpg": b"", "train/deeper/c.jpg": random.Random(0).randbytes(300_000)}
PLENTY = 2**30


def silent(*_) -> None:
    pass


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def zipped(path: Path, content: dict | list, **more) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items() if isinstance(content, dict) else content:
            archive.writestr(name, data, **more)
    return path


def tarred(path: Path, content: list[tuple[str | tarfile.TarInfo, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in content:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def everything(folder: Path) -> dict[str, bytes]:
    found = [path for path in folder.parent.rglob("*") if path.is_file() and ".t2ilib" not in path.parts]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found if path.is_relative_to(folder)}


def refused(archive: Path, folder: Path, most: int = PLENTY) -> str:
    """What is said; nothing may have been written anywhere, nor be found right by reading alone."""
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(ArchiveError) as told:
        extract(archive, folder, None, most, silent)
    assert sorted(folder.parent.rglob("*")) == before
    with pytest.raises(ArchiveError):
        check_archive(archive, most, silent)
    return str(told.value)


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_files_and_folders_come_out_as_they_went_in(kind, tmp_path, folder) -> None:
    archive = tmp_path / f"some.{kind}"
    if kind == "zip":
        zipped(archive, {"train/": b"", **CONTENT})
    else:
        above = tarfile.TarInfo("./train/")
        above.type = tarfile.DIRTYPE
        named = [(f"./{name}", data) for name, data in CONTENT.items()]
        tarred(archive, [(above, b""), *named], f"w:{kind.rpartition('.')[2]}" if kind != "tar" else "w")
    seen = []
    receipt = extract(archive, folder, "sha256:00", PLENTY, lambda *told: seen.append(told))
    assert everything(folder) == CONTENT
    assert receipt.members == {name: len(data) for name, data in CONTENT.items()}
    assert read_receipt(folder, archive.name) == receipt
    assert receipt.is_of(archive.stat().st_size, "sha256:00")
    assert not receipt.is_of(None, "sha256:01")
    total = sum(map(len, CONTENT.values()))
    assert seen[-1] == (f"extracting some.{kind}", total, total)
    check_archive(archive, PLENTY, silent)


NAMES = {
    "/etc/passwd": "leads out",
    "../beside.jpg": "leads out",
    "a/../../beside.jpg": "leads out",
    "..": "leads out",
    "a/../b.jpg": "leads out",
    "C:/a.jpg": "a drive",
    "C:a.jpg": "a drive",
    "..\\beside.jpg": "a drive",
    "\\\\host\\share": "a drive",
    "a.jpg:stream": "a drive",
    "a\nb.jpg": "a drive",
    "con.jpg": "some system",
    "a./b.jpg": "some system",
    "a" * 300: "some system",
    ".t2ilib/some.zip.extracted.json": "our own",
    "a/.T2ILIB-part": "our own",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_names_that_lead_elsewhere(kind, name, tmp_path, folder) -> None:
    content = [("good.jpg", b"1"), (name, b"2")]
    pack = zipped if kind == "zip" else tarred
    assert NAMES[name] in refused(pack(tmp_path / "bad", content), folder)


def test_a_name_with_a_zero_byte(tmp_path, folder) -> None:
    """Zipfile cuts it there, so that what is judged and what is said differ."""
    archive = zipped(tmp_path / "bad.zip", [("a.jpg@../../b", b"1")])
    archive.write_bytes(archive.read_bytes().replace(b"a.jpg@", b"a.jpg\0"))
    assert "leads out" in refused(archive, folder)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_tars(kind, tmp_path, folder) -> None:
    info = tarfile.TarInfo("link")
    info.type, info.linkname = kind, "../.."
    content = [("good.jpg", b"1"), (info, b""), ("link/beside.jpg", b"2")]
    assert "link, device" in refused(tarred(tmp_path / "bad.tar", content), folder)


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK])
def test_links_and_devices_in_zips(kind, tmp_path, folder) -> None:
    info = zipfile.ZipInfo("link")
    info.create_system, info.external_attr = 3, (kind | 0o777) << 16
    assert "link or device" in refused(zipped(tmp_path / "bad.zip", [(info, b"../.."), ("link/a.jpg", b"2")]), folder)


def test_links_that_are_in_the_folder_are_not_followed(tmp_path, folder) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "file").write_bytes(b"mine")
    (folder / "train").symlink_to(tmp_path / "elsewhere")
    archive = zipped(tmp_path / "some.zip", CONTENT)
    with pytest.raises(ConfigError, match="is a link or a file, and a folder is to be there"):
        extract(archive, folder, None, PLENTY, silent)
    assert list((tmp_path / "elsewhere").iterdir()) == []

    (folder / "train").unlink()
    (folder / "train").mkdir()
    (folder / "train" / "a.jpg").symlink_to(tmp_path / "file")
    (folder / "train" / archives.PARTIAL).symlink_to(tmp_path / "file")
    extract(archive, folder, None, PLENTY, silent)
    assert everything(folder) == CONTENT
    assert (tmp_path / "file").read_bytes() == b"mine"
    assert not (folder / "train" / "a.jpg").is_symlink()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("names", [("a.jpg", "a.jpg"), ("a.jpg", "./a.jpg"), ("a.jpg", "A.JPG"), ("ä", "a\u0308")])
@pytest.mark.parametrize("pack", [zipped, tarred])
def test_names_that_come_twice(pack, names, tmp_path, folder) -> None:
    assert "twice" in refused(pack(tmp_path / "bad", [(name, b"1") for name in names]), folder)


@pytest.mark.parametrize("names", [("a", "a/b"), ("a/b", "a"), ("a/b/c", "a/b")])
def test_files_that_are_folders_too(names, tmp_path, folder) -> None:
    assert "as a file and as a folder" in refused(zipped(tmp_path / "bad", [(name, b"") for name in names]), folder)


def test_a_file_in_the_way_of_a_folder_and_the_other_way_round(tmp_path, folder) -> None:
    archive = zipped(tmp_path / "some.zip", CONTENT)
    (folder / "train").write_text("a file")
    with pytest.raises(ConfigError, match="is a link or a file"):
        extract(archive, folder, None, PLENTY, silent)
    (folder / "train").unlink()
    (folder / "train" / "a.jpg").mkdir(parents=True)
    with pytest.raises(ConfigError, match="is a folder, and a file is to be there"):
        extract(archive, folder, None, PLENTY, silent)


def test_bombs_of_zeros(tmp_path, folder) -> None:
    zeros = bytes(40_000_000)
    assert "a bomb" in refused(zipped(tmp_path / "bomb.zip", {"a": zeros}), folder)
    assert "a bomb" in refused(tarred(tmp_path / "bomb.tar.gz", [("a", zeros)], "w:gz"), folder)
    assert "a bomb" in refused(zipped(tmp_path / "large.zip", CONTENT), folder, most=300_000)


def test_a_bomb_of_many_files(tmp_path, folder, monkeypatch) -> None:
    monkeypatch.setattr(archives, "MOST_MEMBERS", 10)
    assert "a bomb" in refused(zipped(tmp_path / "bomb.zip", {str(number): b"" for number in range(11)}), folder)


def test_a_bomb_of_overlapping_files(tmp_path, folder) -> None:
    """As in Fifield's, several entries of the directory point to the same compressed bytes, here with the same name in the file."""
    data = random.Random(1).randbytes(50_000)
    archive = zipped(tmp_path / "bomb.zip", {"one": data, "two": b"2"})
    raw = bytearray(archive.read_bytes())
    directory = raw.index(b"PK\1\2")
    second = raw.index(b"PK\1\2", directory + 4)
    raw[second + 42 : second + 46] = struct.pack("<I", 0)
    raw[second + 20 : second + 24] = raw[directory + 20 : directory + 24]
    archive.write_bytes(raw)
    assert "in the same bytes" in refused(archive, folder)


def test_a_zip_that_declares_less_than_it_holds(tmp_path, folder) -> None:
    archive = zipped(tmp_path / "liar.zip", {"a": bytes(1_000_000)})
    raw = bytearray(archive.read_bytes())
    directory = raw.index(b"PK\1\2")
    raw[directory + 24 : directory + 28] = struct.pack("<I", 1000)
    archive.write_bytes(raw)
    with pytest.raises(ArchiveError, match="Bad CRC-32"):
        extract(archive, folder, None, PLENTY, silent)
    assert everything(folder) == {}


def test_a_tar_with_a_header_that_would_fill_the_memory(tmp_path, folder) -> None:
    info = tarfile.TarInfo("x")
    info.type, content = tarfile.XHDTYPE, bytes(8_000_000)
    with gzip.open(tmp_path / "bomb.tar.gz", "wb") as stream:
        info.size = len(content)
        stream.write(info.tobuf() + content)
    assert "a header of 8," in refused(tmp_path / "bomb.tar.gz", folder)


def test_kinds_of_zips_that_are_not_read(tmp_path, folder) -> None:
    with zipfile.ZipFile(tmp_path / "lzma.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a", b"1")
    assert "neither stored nor deflated" in refused(tmp_path / "lzma.zip", folder)
    archive = zipped(tmp_path / "secret.zip", {"a": b"1"})
    raw = bytearray(archive.read_bytes())
    for magic, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        raw[raw.index(magic) + place] |= 1
    archive.write_bytes(raw)
    assert "encrypted" in refused(archive, folder)


@pytest.mark.parametrize("opener", [open, gzip.open, bz2.open, lzma.open])
def test_tars_that_are_cut_or_flipped(opener, tmp_path, folder) -> None:
    whole = tarred(tmp_path / "some.tar", list(CONTENT.items())).read_bytes()
    second = whole.index(b"train/deeper")
    for damaged in (whole[:second], whole[: second + 1000], whole[:second] + b"\1" + whole[second + 1 :]):
        with opener(tmp_path / "cut.tar", "wb") as stream:
            stream.write(damaged)
        assert "is damaged" in refused(tmp_path / "cut.tar", folder)
    (tmp_path / "cut.tar").write_bytes(b"\x1f\x8b" + bytes(100))
    assert "is damaged" in refused(tmp_path / "cut.tar", folder)


def test_zips_that_are_cut_or_flipped(tmp_path, folder) -> None:
    archive = zipped(tmp_path / "some.zip", CONTENT)
    whole = archive.read_bytes()
    for data in (b"", b"PK", b"<html>", whole[: len(whole) // 2]):
        archive.write_bytes(data)
        assert "is damaged" in refused(archive, folder)
    for place in range(100, len(whole) - 300, 20_003):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        archive.write_bytes(flipped)
        with pytest.raises(ArchiveError):
            check_archive(archive, PLENTY, silent)
        with pytest.raises(ArchiveError):
            extract(archive, folder, None, PLENTY, silent)
        assert "train/deeper/c.jpg" not in everything(folder), "what is damaged has no name"
        assert archives.PARTIAL not in {path.name for path in folder.rglob("*")}


def test_random_damage_is_never_another_error(tmp_path, folder) -> None:
    """However a zip or tar is damaged, it is an ArchiveError, or what came out is what went in."""
    chance = random.Random(2)
    small = [("a/b.jpg", b"12345" * 9), ("a/c.jpg", b"")]
    for pack in (zipped, tarred):
        whole = pack(tmp_path / "some", small).read_bytes()[:3000]
        for _ in range(150):
            damaged = bytearray(whole)
            for _ in range(chance.randint(1, 4)):
                damaged[chance.randrange(len(damaged))] = chance.randrange(256)
            (tmp_path / "bad").write_bytes(damaged)
            try:
                check_archive(tmp_path / "bad", PLENTY, silent)
            except ArchiveError:
                continue


def test_what_is_there_is_skipped_and_with_force_written_again(tmp_path, folder) -> None:
    archive = zipped(tmp_path / "some.zip", CONTENT)
    (folder / "train").mkdir()
    (folder / "train" / "a.jpg").write_bytes(b"b" * 5000)  # right by its size
    (folder / "train" / "b.jpg").write_bytes(b"wrong")
    extract(archive, folder, None, PLENTY, silent)
    assert everything(folder) == CONTENT | {"train/a.jpg": b"b" * 5000}
    receipt = read_receipt(folder, "some.zip")
    assert receipt.missing(folder) == []
    (folder / "train" / "b.jpg").unlink()
    assert receipt.missing(folder) == ["train/b.jpg"]
    extract(archive, folder, None, PLENTY, silent, force=True)
    assert everything(folder) == CONTENT


@pytest.mark.parametrize("force", [False, True])
def test_an_extraction_that_ends_early_has_no_complete_receipt(force, tmp_path, folder, monkeypatch) -> None:
    """And what it left goes on only with the same archive: of another one, the files may have the same sizes."""
    archive = zipped(tmp_path / "some.zip", CONTENT)
    if force:
        extract(archive, folder, None, PLENTY, silent)
    write = archives.write

    def fails(member, target):
        if target.name == "c.jpg":
            raise OSError(28, "No space left on device")
        write(member, target)

    with monkeypatch.context() as patched:
        patched.setattr(archives, "write", fails)
        with pytest.raises(OSError, match="No space"):
            extract(archive, folder, None, PLENTY, silent, force)
    assert not read_receipt(folder, "some.zip").is_of(None, None)
    assert "train/deeper/c.jpg" not in everything(folder)
    time = (folder / "train" / "a.jpg").stat().st_mtime_ns
    other = {**CONTENT, "train/a.jpg": b"o" * 5000}
    extract(archive, folder, None, PLENTY, silent)
    assert (folder / "train" / "a.jpg").stat().st_mtime_ns == time
    assert everything(folder) == CONTENT
    extract(zipped(archive, other), folder, None, PLENTY, silent)
    assert everything(folder) == other


def test_a_disk_that_is_too_small_is_told_first(tmp_path, folder, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(0, 0, 302_000))
    archive = zipped(tmp_path / "some.zip", CONTENT)
    with pytest.raises(ConfigError, match=r"some.zip holds 0.3 MB more, and 0.3 MB are free"):
        extract(archive, folder, None, PLENTY, silent)
    assert everything(folder) == {}
    (folder / "train").mkdir()
    (folder / "train" / "a.jpg").write_bytes(CONTENT["train/a.jpg"])
    extract(archive, folder, None, PLENTY, silent)


def test_receipts_that_are_none(folder) -> None:
    (folder / ".t2ilib").mkdir()
    for text in ("", "[]", "{}", '{"size": 1}', "\xff"):
        archives.receipt_path(folder, "a.zip").write_text(text, encoding="latin-1")
        assert read_receipt(folder, "a.zip") is None
    assert isinstance(Receipt(1, None, "", {}, True), Receipt)
