import itertools
import json
import logging
import os
import unicodedata

import pyarrow
import pytest
from pyarrow import parquet

from t2ilib.config import ConfigError, DataConfig
from t2ilib.data.manifest import load_listings
from t2ilib.data.sources import folder
from t2ilib.data.sources.folder import read_folder

CONFIG = DataConfig()


def write_jsonl(path, rows):
    (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def told(listing):
    return {path.relative_to(listing.folder).as_posix(): reason for path, reason in listing.rejected}


def accounted(listing):
    """Every file under the folder is in exactly one part of the account; gives the names by part."""
    parts = {
        "used": [path for record in listing for path in (record.path, record.mask) if path],
        "texts": listing.texts,
        "hidden": listing.hidden,
        "aside": [path for path, _ in listing.aside],
        "rejected": [path for path, _ in listing.rejected],
    }
    there = sorted(path for path in listing.folder.rglob("*") if not path.is_dir())
    assert sorted(itertools.chain(*parts.values())) == there
    return {name: sorted(p.relative_to(listing.folder).as_posix() for p in paths) for name, paths in parts.items()}


def test_jsonl_csv_and_sidecars_read_alike(pictures):
    texts = {"b.png": "a bee, striped", "a.jpg": " an ant\n", "c.webp": "ä cat"}
    rows = [{"file_name": name, "text": text} for name, text in texts.items()]
    expected = [("a.jpg", "an ant"), ("b.png", "a bee, striped"), ("c.webp", "ä cat")]
    for row in rows:
        (pictures / row["file_name"]).with_suffix(".txt").write_text(row["text"])
    assert [(r.path.name, r.caption) for r in read_folder(pictures, CONFIG)] == expected
    (pictures / "metadata.csv").write_text('file_name,text\nb.png,"a bee, striped"\na.jpg, an ant\nc.webp,ä cat\n')
    assert [(r.path.name, r.caption) for r in read_folder(pictures, CONFIG)] == expected
    write_jsonl(pictures, rows)
    listing = read_folder(pictures, CONFIG)
    assert [(r.path.name, r.caption) for r in listing] == expected
    assert accounted(listing)["aside"] == ["a.txt", "b.txt", "c.txt", "metadata.csv"]
    assert {reason for _, reason in listing.aside} == {"the captions are in metadata.jsonl"}


def test_every_file_is_accounted_for(pictures, picture):
    for name in ("a.txt", "b.txt", "orphan.txt", "clip.txt"):
        (pictures / name).write_text("words")
    (pictures / "clip.mp4").touch()
    (pictures / "empty.txt").write_text(" \n")
    for name in ("empty.png", "sub/x.tif", "sub/deep/y.jfif", "._a.jpg", ".DS_Store/z.png", "photo.avif"):
        (pictures / name).parent.mkdir(parents=True, exist_ok=True)
        picture(3).save(pictures / name, format="PNG")
    (pictures / "sub/x.txt").write_text("a tiff")
    (pictures / "README.md").write_text("# cats")
    (pictures / "phone.HEIC").write_bytes(b"any")
    os.mkfifo(pictures / "fifo.png")
    (pictures / "nowhere.png").symlink_to(pictures / "gone.png")
    listing = read_folder(pictures, CONFIG)
    assert accounted(listing) == {
        "used": ["a.jpg", "b.png", "sub/x.tif"],
        "texts": ["a.txt", "b.txt", "empty.txt", "sub/x.txt"],
        "hidden": [".DS_Store/z.png", "._a.jpg"],
        "aside": ["README.md", "clip.mp4"],
        "rejected": sorted(
            ("c.webp", "clip.txt", "orphan.txt", "empty.png", "sub/deep/y.jfif", "photo.avif", "phone.HEIC", "fifo.png", "nowhere.png")
        ),
    }  # fmt: skip
    reasons = told(listing)
    assert reasons["c.webp"].startswith(
        "has no .txt caption beside it, and the folder no metadata.jsonl or metadata.csv"
    )
    assert reasons["orphan.txt"] == "is a caption without a picture beside it"
    assert "clip.mp4 is none by its ending" in reasons["clip.txt"]
    assert "empty caption" in reasons["empty.png"]
    assert reasons["fifo.png"] == "is not a file"
    assert reasons["nowhere.png"] == "is a link to nothing"


@pytest.mark.parametrize(
    "name",
    ["._000.png", "._000.txt", ".DS_Store", "Thumbs.db", "desktop.ini", "Desktop.ini", "__MACOSX/000.png", "__MACOSX/._000.png",
     ".ipynb_checkpoints/000-checkpoint.png", ".git/objects/ab/cd", "@eaDir/000.png", "Icon\r"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["captions", "table"])
def test_hidden_files_are_ignored_and_counted(captioned, tmp_path, name, kind):
    pics = captioned(tmp_path / "pics", 2)
    if kind == "table":
        write_jsonl(pics, [{"file_name": f"00{i}.png", "text": "x"} for i in range(2)])
    (pics / name).parent.mkdir(parents=True, exist_ok=True)
    (pics / name).write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X\xa0")
    listing = read_folder(pics, CONFIG)
    assert len(listing) == 2
    assert accounted(listing)["hidden"] == [name]
    assert listing.rejected == ()


def test_a_folder_that_is_itself_hidden_is_read(captioned, tmp_path):
    assert len(read_folder(captioned(tmp_path / ".cache", 2), CONFIG)) == 2


def test_captions_in_any_unicode_and_no_other(captioned, tmp_path):
    pics = captioned(tmp_path / "p", 4)
    (pics / "000.txt").write_bytes("a café\r\nby night\r\n".encode("utf-16"))
    (pics / "001.txt").write_bytes("a café".encode("utf-8-sig"))
    (pics / "002.txt").write_bytes("a café".encode("cp1252"))
    listing = read_folder(pics, CONFIG)
    assert [record.caption for record in listing] == ["a café\nby night", "a café", "caption 3"]
    assert "002.txt: byte 5 (0xe9, line 1) is not UTF-8" in told(listing)["002.png"]
    assert "save it as UTF-8" in told(listing)["002.png"]
    accounted(listing)


def test_two_captions_of_one_picture(captioned, tmp_path):
    pics = captioned(tmp_path / "p", 2)
    (pics / "001.TXT").write_text("which of them?")
    listing = read_folder(pics, CONFIG)
    assert told(listing) == {"001.png": "has 2 captions (001.TXT, 001.txt): keep one"}
    (pics / "000.txt").rename(pics / "000.Txt")
    assert [record.path.name for record in read_folder(pics, CONFIG)] == ["000.png"]


def test_table_and_folder_are_compared_both_ways(captioned, tmp_path):
    pics = captioned(tmp_path / "p", 4)
    names = ["000.png", "gone.png", "./000.png", "001.PNG", "", "a\0b", "x" * 300, ".hidden.png", "sub"]
    (pics / ".hidden.png").touch()
    (pics / "sub").mkdir()
    write_jsonl(pics, [{"file_name": name, "text": f"row {n}"} for n, name in enumerate(names, 1)])
    listing = read_folder(pics, CONFIG)
    assert [(record.path.name, record.caption) for record in listing] == [("000.png", "row 1")]
    reasons = told(listing)
    assert reasons["gone.png"] == "missing (row 2 of metadata.jsonl)"
    assert reasons["000.png"] == "row 3 of metadata.jsonl names it again, after row 1: keep one"
    assert reasons["001.PNG"].startswith("missing; there is 001.png: write its name as it is")
    assert reasons["."] == "names no picture (row 5 of metadata.jsonl)"
    assert reasons["a\0b"].startswith("is no file name")
    assert reasons["x" * 300].startswith("is no file name")
    assert "hidden" in reasons[".hidden.png"]
    assert "is a folder" in reasons["sub"]
    assert {name: reasons[name] for name in ("001.png", "002.png", "003.png")} == dict.fromkeys(
        ("001.png", "002.png", "003.png"), "no row of metadata.jsonl names it"
    )
    assert len(reasons) == 11


def test_a_row_with_an_empty_caption(captioned, tmp_path):
    pics = captioned(tmp_path / "p", 2)
    (pics / "metadata.csv").write_text("file_name,text\n000.png,\n001.png,words\n")
    assert told(read_folder(pics, CONFIG)) == {"000.png": "has an empty caption: write one"}


@pytest.mark.parametrize(("on_disk", "in_table"), [("NFD", "NFC"), ("NFC", "NFD"), ("NFC", "NFC"), ("NFD", "NFD")])
def test_names_are_found_however_accents_are_written(tmp_path, picture, on_disk, in_table):
    name = unicodedata.normalize(on_disk, "cafés.png")
    picture(0).save(tmp_path / name)
    write_jsonl(tmp_path, [{"file_name": unicodedata.normalize(in_table, "cafés.png"), "text": "x"}])
    listing = read_folder(tmp_path, CONFIG)
    assert [record.path.name for record in listing] == [name]
    assert listing.rejected == ()
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / unicodedata.normalize(in_table, "cafés.txt")).write_text("beside it")
    assert [record.caption for record in read_folder(tmp_path, CONFIG)] == ["beside it"]


def test_a_name_that_may_be_two_files(tmp_path, picture):
    both = [unicodedata.normalize(form, "e\u0323\u0301.png") for form in ("NFC", "NFD")]
    other = "\u00e9\u0323.png"  # the same letter, put together in a third way
    for name in both:
        picture(0).save(tmp_path / name)
    write_jsonl(tmp_path, [{"file_name": other, "text": "x"}, {"file_name": both[0], "text": "y"}])
    listing = read_folder(tmp_path, CONFIG)
    assert [record.path.name for record in listing] == [both[0]]
    assert "rename one" in told(listing)[other]
    assert told(listing)[both[1]] == "no row of metadata.jsonl names it"


def test_names_that_are_not_utf8(tmp_path, picture, captioned):
    pics = captioned(tmp_path / "p", 2)
    odd = os.fsdecode(b"K\xfcche")
    (pics / "000.png").rename(pics / f"{odd}.png")
    (pics / "000.txt").rename(pics / f"{odd}.txt")
    listing = read_folder(pics, CONFIG)
    assert [record.path.name for record in listing] == ["001.png", f"{odd}.png"]
    assert sum(map(len, folder.hold_out(listing, 1e-9))) == 2
    write_jsonl(pics, [{"file_name": "001.png", "text": "x"}, {"file_name": "half \ud83d.png", "text": "x"}])
    listing = read_folder(pics, CONFIG)
    assert "its name is not UTF-8: rename it" in told(listing)[f"{odd}.png"]
    assert told(listing)["half \ud83d.png"].startswith("is no file name")


def test_half_a_character_in_a_caption(captioned, tmp_path):
    pics = captioned(tmp_path / "p", 2)
    rows = [
        '{"file_name": "000.png", "text": "a cat \\ud83d\\ude00"}',
        '{"file_name": "001.png", "text": "a cat \\ud83d"}',
    ]
    (pics / "metadata.jsonl").write_text("\n".join(rows))
    listing = read_folder(pics, CONFIG)
    assert [record.caption for record in listing] == ["a cat 😀"]
    assert "half a character (\\ud83d) at position 6" in told(listing)["001.png"]


def test_folders_without_pictures(tmp_path):
    with pytest.raises(ConfigError, match="is not a folder"):
        read_folder(tmp_path / "absent", CONFIG)
    with pytest.raises(ConfigError, match="lists no picture"):
        read_folder(tmp_path, CONFIG)
    (tmp_path / ".DS_Store").touch()
    with pytest.raises(ConfigError, match=r"lists no picture \(1 hidden file"):
        read_folder(tmp_path, CONFIG)
    with pytest.raises(ConfigError, match=r"data.path is missing"):
        folder.load(CONFIG)


@pytest.mark.parametrize("name", ["../outside.png", "/etc/hostname", "sub/../../outside.png", "link.png"])
def test_pictures_outside_the_folder_are_refused(tmp_path, picture, name, monkeypatch):
    picture(0).save(tmp_path / "outside.png")
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "link.png").symlink_to(tmp_path / "outside.png")
    write_jsonl(inner, [{"file_name": name, "text": "a bee"}])
    monkeypatch.chdir(inner)
    for place in (inner, type(inner)(".")):
        listing = read_folder(place, CONFIG)
        assert len(listing) == 0
        assert any("must lie in the folder itself" in reason for _, reason in listing.rejected)


def test_links_to_folders_are_not_followed_in_silence(captioned, tmp_path):
    pics = captioned(tmp_path / "p", 1)
    (pics / "more").symlink_to(captioned(tmp_path / "q", 2))
    assert told(read_folder(pics, CONFIG))["more"].startswith("is a link to a folder, which is not followed")


def test_pictures_in_a_subfolder_are_fine(tmp_path, picture):
    (tmp_path / "sub").mkdir()
    picture(0).save(tmp_path / "sub" / "x.png")
    (tmp_path / "sub" / "x.txt").write_text("beside it")
    assert [r.caption for r in read_folder(tmp_path, CONFIG)] == ["beside it"]
    write_jsonl(tmp_path, [{"file_name": "sub/x.png", "text": "a bee"}])
    assert [r.caption for r in read_folder(tmp_path, CONFIG)] == ["a bee"]


def test_tables_of_subfolders_and_odd_names(captioned, tmp_path):
    pics = captioned(tmp_path / "p", 1)
    (pics / "sub").mkdir()
    write_jsonl(pics / "sub", [])
    assert read_folder(pics, CONFIG).aside == ((pics / "sub" / "metadata.jsonl", "tables of subfolders are not read"),)
    (pics / "000.png").rename(pics / "a\x1fb.png")
    (pics / "000.txt").rename(pics / "a\x1fb.txt")
    assert [len(part) for part in folder.hold_out(read_folder(pics, CONFIG), 0)] == [1, 0]


def test_a_scene_of_ones_own_is_not_one_of_the_drawn_world(captioned, tmp_path):
    pics = captioned(tmp_path / "p", 1)
    (pics / "metadata.csv").write_text("file_name,text,scene\n000.png,words,kitchen\n")
    assert read_folder(pics, CONFIG)[0].scene is None


def test_held_out_pictures_inside_the_folder_are_not_trained_on(captioned, tmp_path):
    pics = captioned(tmp_path / "p", 3)
    config = CONFIG.model_copy(update={"path": pics, "validation_path": captioned(pics / "held-out", 2)})
    training, held_out = load_listings(config)
    assert [len(training), len(held_out)] == [3, 2]
    assert {record.path.parent for record in training} == {pics}
    inward = config.model_copy(update={"path": pics / "held-out", "validation_path": pics})
    assert [len(part) for part in load_listings(inward)] == [2, 3]


def test_the_held_out_share(captioned, tmp_path):
    listing, apart = load_listings(CONFIG.model_copy(update={"path": captioned(tmp_path / "p", 16)}))
    assert apart is None
    training, held_out = folder.hold_out(listing, 0.125)
    assert len(held_out) == 2
    assert len(training) == 14
    assert {r.path for r in training}.isdisjoint(r.path for r in held_out)
    assert folder.hold_out(listing, 0.125) == (training, held_out)
    training, held_out = folder.hold_out(listing, 0.0)
    assert len(training) == 16
    assert held_out == []


def test_one_picture_is_told_the_way_out(captioned, tmp_path):
    listing = read_folder(captioned(tmp_path / "one", 1), CONFIG)
    with pytest.raises(ConfigError, match=r"leave none to train on: set data\.validation_share: 0"):
        folder.hold_out(listing, 0.125)
    assert folder.hold_out(listing, 0.0) == ([*listing], [])


def test_a_new_picture_moves_no_other(tmp_path):
    records = [folder.Record(tmp_path / f"{i:03d}.png", "x") for i in range(40)]
    held_out = [{r.path.name for r in folder.hold_out(records[:count], 0.125)[1]} for count in range(16, 41)]
    assert all(
        (before ^ after) <= {f"{16 + i:03d}.png"} for i, (before, after) in enumerate(itertools.pairwise(held_out))
    )


def test_the_share_is_the_same_on_every_system(tmp_path):
    names = [f"café {i}.png" for i in range(40)]
    parts = [
        [folder.Record(tmp_path / unicodedata.normalize(form, name), "x") for name in names] for form in ("NFC", "NFD")
    ]
    composed, decomposed = (
        [unicodedata.normalize("NFC", r.path.name) for r in folder.hold_out(records, 0.125)[1]] for records in parts
    )
    assert composed == decomposed
    assert 0 < len(composed) < 40


def test_several_captions_in_one_column(captioned, tmp_path):
    pics = captioned(tmp_path / "p", 3)
    rows = [("000.png", [" a bee ", "a wasp"]), ("001.png", "an ant"), ("002.png", ["a cat", " "])]
    write_jsonl(pics, [{"file_name": name, "text": text} for name, text in rows])
    listing = read_folder(pics, CONFIG)
    assert [record.captions for record in listing] == [("a bee", "a wasp"), ("an ant",)]
    reason = "its caption 2 of 2 is empty: write it, or take it out (row 3 of metadata.jsonl)"
    assert told(listing) == {"002.png": reason}
    parquet.write_table(
        pyarrow.table({"file_name": [name for name, _ in rows[::2]], "text": [texts for _, texts in rows[::2]]}),
        pics / "metadata.parquet",
    )
    (pics / "metadata.jsonl").unlink()
    again = read_folder(pics, CONFIG)
    assert [record.captions for record in again] == [("a bee", "a wasp")]
    assert told(again)["002.png"] == reason.replace("row 3 of metadata.jsonl", "row 2 of metadata.parquet")
    accounted(again)


def test_masks_are_files_of_the_folder(captioned, tmp_path):
    pics = captioned(tmp_path / "p", 9)
    for path in pics.glob("*.txt"):
        path.unlink()
    (pics / "masks").mkdir()
    for name in ("005", "006", "007", "008"):
        (pics / f"{name}.png").rename(pics / "masks" / f"{name}.png")
    masks = ["masks/005.png", None, "masks/gone.png", "masks/005.png", "000.png", "masks/007.png"]
    rows = [{"file_name": f"{i:03d}.png", "text": "x", "m": mask} for i, mask in enumerate(masks)]
    rows[5] |= {"file_name": "absent.png"}
    rows += [{"file_name": "masks/008.png", "text": ["", "x"], "m": "masks/006.png"}]
    write_jsonl(pics, rows)
    listing = read_folder(pics, DataConfig(mask_column="m"))
    assert [(record.path.name, record.mask) for record in listing] == [
        ("000.png", pics / "masks/005.png"),
        ("001.png", None),
    ]
    assert told(listing) == {
        "002.png": "its mask masks/gone.png: missing (row 3 of metadata.jsonl)",
        "003.png": "its mask 005.png is that of row 1 too (row 4 of metadata.jsonl)",
        "004.png": "its mask 000.png is the picture of row 1 (row 5 of metadata.jsonl)",
        "absent.png": "missing (row 6 of metadata.jsonl)",
        "masks/006.png": "no row of metadata.jsonl names it",
        "masks/007.png": "no row of metadata.jsonl names it",
        "masks/008.png": "its caption 1 of 2 is empty: write it, or take it out (row 7 of metadata.jsonl)",
    }
    write_jsonl(pics, [*rows[:2], {"file_name": "002.png", "text": " ", "m": "masks/007.png"}])
    listing = read_folder(pics, DataConfig(mask_column="m"))
    assert (pics / "masks/007.png", "the mask of a picture that is not used") in listing.aside
    accounted(listing)
    write_jsonl(pics, [{"file_name": "000.png", "text": "x", "m": "../outside.png"}])
    assert "its mask ../outside.png: lies outside" in told(read_folder(pics, DataConfig(mask_column="m")))["000.png"]


def test_columns_of_weights_and_repeats(captioned, tmp_path):
    pics = captioned(tmp_path / "p", 2)
    (pics / "metadata.csv").write_text("file_name,text,w,r\n000.png,x,0.5,3\n001.png,x,,\n")
    listing = read_folder(pics, DataConfig(weight_column="w", repeat_column="r"))
    assert [(record.weight, record.repeats) for record in listing] == [(0.5, 3), (1.0, 1)]
    (pics / "metadata.csv").unlink()
    with pytest.raises(ConfigError, match=r"data.weight_column names a column, and .* has no metadata.jsonl or"):
        read_folder(pics, DataConfig(weight_column="w"))


def test_one_prompt_for_pictures_without_captions(captioned, tmp_path, caplog):
    pics = captioned(tmp_path / "p", 4)
    (pics / "001.txt").unlink()
    (pics / "002.txt").unlink()
    (pics / "003.txt").write_text(" ")
    prompted = DataConfig(prompt=" a photo of sks cat")
    with caplog.at_level(logging.INFO, "t2ilib"):
        listing = read_folder(pics, prompted)
    assert [record.caption for record in listing] == ["caption 0", "a photo of sks cat", "a photo of sks cat"]
    assert told(listing) == {"003.png": "has an empty caption: write one"}
    assert (
        "2 of 4 pictures have no .txt beside them and take data.prompt as their caption: a photo of sks" in caplog.text
    )
    accounted(listing)
    write_jsonl(pics, [{"file_name": "000.png", "text": "x"}])
    listing = read_folder(pics, prompted)
    assert told(listing)["001.png"] == "no row of metadata.jsonl names it"
    assert "data.prompt is not used" in caplog.text
    with pytest.raises(ConfigError, match=r"data.prompt is empty"):
        read_folder(captioned(tmp_path / "q", 1), DataConfig(prompt=" "))


@pytest.fixture
def nested(captioned, tmp_path):
    """Pictures in 10_cat, 10_cat/black, 2_dog and in the folder itself."""
    for place in ("", "10_cat", "10_cat/black", "2_dog"):
        captioned(tmp_path / "n" / place, 1)
    return tmp_path / "n"


def emphasis(folder, **fields):
    found = {}
    for record in read_folder(folder, DataConfig(**fields)):
        found[record.path.parent.relative_to(folder).as_posix()] = (record.weight, record.repeats)
    return found


def test_subfolders_and_patterns_say_how_much_pictures_count(nested, caplog):
    caplog.set_level(logging.INFO, "t2ilib")
    once = (1.0, 1)
    assert set(emphasis(nested).values()) == {once}
    hints = [record.getMessage() for record in caplog.records if "folder_repeats" in record.getMessage()]
    assert len(hints) == 1
    assert "subfolders such as 10_cat" in hints[0]
    by_name = emphasis(nested, weights={"10_cat": 2, "black/": 0.5}, repeats={"2_dog/*.png": 4})
    assert by_name == {".": once, "10_cat": (2.0, 1), "10_cat/black": (0.5, 1), "2_dog": (1.0, 4)}
    assert "an epoch shows its 4 pictures 7 times in all" in caplog.text
    assert emphasis(nested, weights={"*": 3, "10_cat/black": 1})["10_cat/black"] == once
    kohyas = emphasis(nested, folder_repeats=True, repeats={"2_dog": 3})
    assert {place: repeats for place, (_, repeats) in kohyas.items()} == {
        ".": 1,
        "10_cat": 10,
        "10_cat/black": 10,
        "2_dog": 3,
    }


def test_patterns_that_match_nothing_are_told(nested, captioned, tmp_path):
    with pytest.raises(ConfigError, match=r"data.weights: '10_cats' matches no picture.*Did you mean '10_cat'"):
        emphasis(nested, weights={"10_cats": 2})
    with pytest.raises(ConfigError, match=r"data.repeats: 'x/\*' matches no picture.*\(10_cat, 10_cat/black, 2_dog\)"):
        emphasis(nested, repeats={"x/*": 2})
    with pytest.raises(
        ConfigError, match=r"data.folder_repeats: .*no subfolder with pictures that is called like 10_cat"
    ):
        emphasis(captioned(tmp_path / "flat", 1), folder_repeats=True)


def test_a_rows_own_numbers_are_multiplied(captioned, tmp_path):
    pics = captioned(tmp_path / "p" / "3_cat", 2).parent
    rows = [{"file_name": f"3_cat/00{i}.png", "text": "x", "w": i or None, "r": i + 1} for i in range(2)]
    write_jsonl(pics, rows)
    config = DataConfig(weight_column="w", repeat_column="r", weights={"3_cat": 0.5}, folder_repeats=True)
    assert [(r.weight, r.repeats) for r in read_folder(pics, config)] == [(0.5, 3), (0.5, 6)]
