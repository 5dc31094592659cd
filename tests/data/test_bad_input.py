"""What is wrong with people's files, through a whole source to the manifest: each thing is used as it is meant or rejected with its reason.

How pictures decode is test_pictures' matter, each source's own mistakes those of its file."""

import csv
import json
import tarfile
import zipfile
from collections import Counter

import pytest
from bad_pictures import GOOD, write_thirty

from t2ilib.config import ConfigError
from t2ilib.data.dataset import load_datasets, save_manifest
from t2ilib.runfile import build_run

NEWLINES = "first line,\nsecond line"


def run_of(**data):
    return build_run({"adapter": {}, "data": data})


def manifest(tmp_path, **data):
    """Rows of manifest.csv, and manifest.json, as a run keeps them."""
    training, held_out = load_datasets(run_of(**data))
    save_manifest(training, held_out, tmp_path / "manifest.csv")
    with (tmp_path / "manifest.csv").open(newline="") as file:
        return [*csv.DictReader(file)], json.loads((tmp_path / "manifest.json").read_text())


def test_fifteen_broken_ones_are_told_one_by_one(tmp_path):
    reasons = write_thirty(tmp_path / "pics")
    rows, summary = manifest(tmp_path, path=tmp_path / "pics", on_error="skip")
    told = {row["name"].removeprefix(f"{tmp_path}/pics/"): row["reason"] for row in rows if row["part"] == "rejected"}
    assert told.keys() == reasons.keys()
    assert all(why in told[name] for name, why in reasons.items())
    used = [row for row in rows if row["part"] in ("training", "held out")]
    assert len(used) == GOOD
    assert [row["reason"] for row in used if row["reason"]] == ["the first of 3 frames"]
    assert summary["pictures"]["rejected"] == sum(summary["rejected"].values()) == len(reasons) == 15
    assert summary["pictures"]["training"] + summary["pictures"]["held_out"] == GOOD


def test_more_than_the_share_stops_with_all_that_it_lists(tmp_path):
    write_thirty(tmp_path / "pics")
    with pytest.raises(ConfigError, match="15 files cannot be used, 15 pictures can") as error:
        load_datasets(run_of(path=tmp_path / "pics"))
    assert str(error.value).count("\n  ") == 11  # ten, and how many more
    assert "set data.max_rejected to 0.5 " in str(error.value)
    training, held_out = load_datasets(run_of(path=tmp_path / "pics", max_rejected=0.5))
    assert len(training) + len(held_out) == GOOD


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv"])
def test_newlines_in_captions_are_kept(tmp_path, captioned, kind):
    pics = captioned(tmp_path / "p", 4)
    if kind == "txt":
        (pics / "000.txt").write_bytes(NEWLINES.replace("\n", "\r\n").encode() + b"\r\n")
    else:
        rows = [{"file_name": f"{i:03d}.png", "text": NEWLINES if i == 0 else f"caption {i}"} for i in range(4)]
        with (pics / f"metadata.{kind}").open("w", newline="") as file:
            if kind == "jsonl":
                file.writelines(json.dumps(row) + "\n" for row in rows)
            else:
                writer = csv.DictWriter(file, ["file_name", "text"])
                writer.writeheader()
                writer.writerows(rows)
    rows, summary = manifest(tmp_path, path=pics)
    assert Counter(row["caption"] for row in rows if row["caption"]) == {
        NEWLINES: 1,
        **{f"caption {i}": 1 for i in (1, 2, 3)},
    }
    assert summary["captions"]["captions"] == 4


def test_captions_that_are_too_long_are_counted(tmp_path, captioned):
    pics = captioned(tmp_path / "p", 8)
    (pics / "000.txt").write_text("word " * 75)  # with beginning and end 77
    (pics / "001.txt").write_text("word " * 76)
    (pics / "002.txt").write_text("1" * 76)
    (pics / "003.txt").write_text("extraordinarily " * 60)
    _, summary = manifest(tmp_path, path=pics)
    assert (summary["captions"]["cut"], summary["captions"]["may_be_cut"]) == (2, 1)


def test_pictures_of_one_name_in_two_folders_are_two(tmp_path, captioned, picture):
    pics = captioned(tmp_path / "p", 6)
    captioned(pics / "more", 2)
    picture(90).save(pics / "more" / "000.png")
    (pics / "more" / "000.txt").write_text("another")
    rows, _ = manifest(tmp_path, path=pics)
    names = {row["name"].removeprefix(f"{pics}/"): row["caption"] for row in rows}
    assert len(names) == 8
    assert (names["000.png"], names["more/000.png"]) == ("caption 0", "another")


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize(
    "name", ["../secret.png", "{tmp}/secret.png", "x/../../secret.png", "C:\\secret.png", "..\\secret.png", "file:///secret.png"]
)  # fmt: skip
def test_names_that_lead_out_of_the_folder(tmp_path, captioned, picture, kind, name):
    pics = captioned(tmp_path / "p", 4)
    picture(9).save(tmp_path / "secret.png")
    name = name.replace("{tmp}", str(tmp_path))
    rows = [(f"{i:03d}.png", f"caption {i}") for i in range(4)] + [(name, "secret")]
    if kind == "jsonl":
        (pics / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": n, "text": t}) for n, t in rows))
    else:
        (pics / "metadata.csv").write_text("file_name,text\n" + "\n".join(f'"{n}",{t}' for n, t in rows))
    rows, summary = manifest(tmp_path, path=pics, on_error="skip")
    assert summary["pictures"]["rejected"] == 1
    assert all("secret" not in row["caption"] for row in rows)
    (told,) = [row for row in rows if row["part"] == "rejected"]
    assert told["name"].endswith("secret.png")


def test_members_of_archives_that_lead_out_or_are_links(tmp_path, captioned):
    """A tar of shards and the zip of a COCO download: what is not a plain file of the archive is rejected, and nothing is written."""
    from coco_shaped import unpack_coco, write_coco

    pics = captioned(tmp_path / "p", 4)
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for path in sorted(pics.iterdir()):
            tar.add(path, path.name)
        tar.add(pics / "000.png", "../out.png")
        absolute = tarfile.TarInfo("/tmp/t2ilib-absolute.png")
        tar.addfile(absolute)
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    rows, summary = manifest(tmp_path, source="webdataset", path=str(tmp_path / "s.tar"), on_error="skip")
    assert (summary["pictures"]["training"] + summary["pictures"]["held_out"], summary["pictures"]["rejected"]) == (
        4,
        3,
    )

    write_coco(tmp_path / "raw")
    unpack_coco(tmp_path / "raw", tmp_path / "coco", zips=True)
    with zipfile.ZipFile(tmp_path / "coco" / "train2017.zip", "a") as archive:
        archive.writestr("train2017/../../out.jpg", b"any")
        link = zipfile.ZipInfo("train2017/000000000003.jpg")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    rows, _ = manifest(tmp_path, source="coco", path=str(tmp_path / "coco"), on_error="skip")
    told = " ".join(row["name"] for row in rows if row["part"] in ("rejected", "left aside"))
    assert "out.jpg" in told
    assert "000000000003.jpg" in told
    assert not [*tmp_path.rglob("out.*")]


def test_a_table_that_is_no_table_is_told_whatever_else_is_there(tmp_path, captioned):
    pics = captioned(tmp_path / "p", 4)
    (pics / "metadata.jsonl").write_text('{"file_name": "000.png", "text": "x"}\nfile_name: 001.png\n')
    with pytest.raises(ConfigError, match=r"metadata\.jsonl.*2"):
        load_datasets(run_of(path=pics, on_error="skip"))
    (pics / "metadata.jsonl").unlink()
    (pics / "metadata.csv").write_text("picture,text\n000.png,x\n")
    with pytest.raises(ConfigError, match=r"no text in 'file_name' \(it has picture, text\)"):
        load_datasets(run_of(path=pics, on_error="skip"))
