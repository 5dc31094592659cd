import codecs
import os
from pathlib import Path

import pytest

from t2ilib.config import ConfigError
from t2ilib.runfile import load_yaml
from t2ilib.text import read_text, shown, write_whole

WORDS = "the cat’s café 猫 🐈\r\nsecond line\n"


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"]
)
def test_unicode_by_its_mark(tmp_path, encoding):
    marks = {
        "utf-16-le": codecs.BOM_UTF16_LE,
        "utf-16-be": codecs.BOM_UTF16_BE,
        "utf-32-le": codecs.BOM_UTF32_LE,
        "utf-32-be": codecs.BOM_UTF32_BE,
    }
    (tmp_path / "x.txt").write_bytes(marks.get(encoding, b"") + WORDS.encode(encoding))
    assert read_text(tmp_path / "x.txt") == WORDS


def test_an_empty_file_and_a_mark_alone(tmp_path):
    for data in (b"", codecs.BOM_UTF8, codecs.BOM_UTF16_LE):
        (tmp_path / "x.txt").write_bytes(data)
        assert read_text(tmp_path / "x.txt") == ""


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ("one\nthe cat’s".encode("cp1252"), ["byte 11 (0x92, line 2)", "is not UTF-8", "Windows-1252", "cat’s"]),
        (codecs.BOM_UTF8 + b"abc\xff", ["byte 6 (0xff, line 1)", "is not UTF-8", "its mark"]),
        (b"abc\x81\x8d", ["byte 3 (0x81, line 1)", "is not UTF-8", "encoding is unknown"]),
        (codecs.BOM_UTF16_LE + b"a\0b", ["byte 4 (0x62, line 1)", "is not UTF-16-LE", "its mark"]),
        (codecs.BOM_UTF16_LE + b"a\0\x3d\xd8b\0", ["byte 4 (0x3d, line 1)", "is not UTF-16-LE"]),
        ("ab".encode("utf-16-le"), ["byte 1 (0x00, line 1)", "UTF-16 without its mark"]),
        ("ab".encode("utf-16-be"), ["byte 0 (0x00, line 1)", "UTF-16 without its mark"]),
    ],
)
def test_other_bytes_are_told_with_file_byte_and_remedy(tmp_path, data, told):
    (tmp_path / "p03.txt").write_bytes(data)
    with pytest.raises(ConfigError) as error:
        read_text(tmp_path / "p03.txt")
    for part in ("p03.txt", "save it as UTF-8", *told):
        assert part in str(error.value)


def test_run_files_are_read_alike(tmp_path):
    path = tmp_path / "run.yaml"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_bytes("name: café\r\n".encode(encoding))
        assert load_yaml(path) == {"name": "café"}
    path.write_bytes("name: café\n".encode("cp1252"))
    with pytest.raises(ConfigError, match=r"run\.yaml: byte 9 \(0xe9, line 1\) is not UTF-8"):
        load_yaml(path)


def test_names_are_shown_in_letters_that_can_be_written():
    assert shown(Path("pics") / "cafés.png") == "pics/cafés.png"
    assert shown(os.fsdecode(b"K\xfcche.png")) == "K\\xfcche.png"
    assert shown("half \ud83d") == "half \\ud83d"
    assert shown("\udcfc and half \ud83d").encode()


def test_a_kill_leaves_a_file_as_it_was(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def half(self, text, **_):
        self.write_bytes(text.encode()[: len(text) // 2])
        raise Killed

    write_whole(tmp_path / "note.json", "before")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", half)
        with pytest.raises(Killed):
            write_whole(tmp_path / "note.json", "afterwards")
    assert (tmp_path / "note.json").read_text() == "before"
    write_whole(tmp_path / "note.json", WORDS)
    assert (tmp_path / "note.json").read_bytes().decode() == WORDS.replace("\n", os.linesep)
    assert [path.name for path in tmp_path.iterdir()] == ["note.json"]
