"""Flickr30k's results.csv in the form of the published file, with its one odd row, and broken in all ways."""

import logging

import pytest

from t2ilib.config import ConfigError, DataConfig
from t2ilib.data.manifest import load_listings
from t2ilib.data.sources import flickr30k

HEADER = "image_name| comment_number| comment"
NAMES = ("1000092795.jpg", "10002456.jpg", "2199200615.jpg")
ODD = "2199200615.jpg| 4   A dog runs across the grass ."
"""The row of the published file that lacks its second separator."""


def rows_of(name):
    return [
        f"{name}| 0| Two young guys with shaggy hair look at their hands while hanging out in the yard .",
        f'{name}| 1| A man in a " Superman " shirt , and a dog , wait .',
        f"{name}| 2| Two men in green shirts are standing in a yard .",
        f"{name}| 3| A man in a blue shirt standing in a garden .",
        f"{name}| 4| Two friends enjoy time spent together .",
    ]


@pytest.fixture
def folder(tmp_path, picture):
    """Three pictures and results.csv."""
    (tmp_path / "flickr30k_images").mkdir()
    for index, name in enumerate(NAMES):
        picture(index).save(tmp_path / "flickr30k_images" / name)
    write(tmp_path, whole())
    return tmp_path


def whole():
    rows = [row for name in NAMES for row in rows_of(name)]
    return [*rows[:-1], ODD]


def write(folder, rows, header=HEADER, end="\n"):
    (folder / "results.csv").write_text(end.join([header, *rows, ""]), newline="")


def load(folder, **fields):
    return flickr30k.load(DataConfig(source="flickr30k", path=folder, **fields))


def told(listing):
    return [reason for _, reason in listing.rejected]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_published_form(folder, caplog, end):
    write(folder, whole(), end=end)
    with caplog.at_level(logging.INFO, "t2ilib"):
        listing = load(folder)
    assert [record.path.name for record in listing] == list(NAMES)
    assert {len(record.captions) for record in listing} == {5}
    assert listing[0].caption.startswith("Two young guys with shaggy hair look")
    assert listing[1].captions[1] == 'A man in a " Superman " shirt , and a dog , wait .'
    assert listing[2].captions[4] == "A dog runs across the grass ."
    assert "1 row(s) lack their second separator and are read as number and caption: row 15" in caplog.text
    assert "3 pictures with 15 captions, from results.csv" in caplog.text
    assert (listing.rejected, listing.aside) == ((), ())


@pytest.mark.parametrize("layout", ["beside", "inside"])
def test_where_pictures_and_table_may_lie(folder, layout):
    if layout == "beside":
        for name in NAMES:
            (folder / "flickr30k_images" / name).rename(folder / name)
        (folder / "flickr30k_images").rmdir()
    else:
        (folder / "results.csv").rename(folder / "flickr30k_images/results.csv")
    listing = load(folder)
    assert [record.path.name for record in listing] == list(NAMES)
    assert (listing.rejected, listing.aside) == ((), ())


def test_captions_are_in_the_order_of_their_numbers(folder):
    before = load(folder).records
    write(folder, whole()[::-1])
    assert load(folder).records == before


def test_rows_that_cannot_be_used_are_told_by_number(folder):
    broken = [
        NAMES[0],
        f"{NAMES[0]}| some caption",
        f"{NAMES[0]}| four| A caption .",
        f"{NAMES[0]}| 2| The same number .",
        f"{NAMES[0]}| 7|",
        "",
        "| 0| Of no picture .",
        f"{NAMES[0]}| ²| A caption .",
        f"{NAMES[0]}| {'9' * 5000}| A caption .",
        f"{NAMES[1]}| 6| With | a bar .",
    ]
    write(folder, [*whole(), *broken])
    listing = load(folder)
    assert told(listing) == [
        f"row 16 has 1 of 3 fields (picture | number | caption): {NAMES[0]}",
        f"row 17 has 2 of 3 fields (picture | number | caption): {NAMES[0]}| some caption",
        "row 18 has no number in its second field: four",
        f"row 19 is caption 2 of {NAMES[0]} again",
        f"row 20 ({NAMES[0]}): has an empty caption: write one",
        "row 23 has no number in its second field: ²",
        f"row 24 has no number in its second field: {'9' * 60}",
        "names no picture, and its 1 caption with it (results.csv names it)",
    ]
    assert [len(record.captions) for record in listing] == [5, 6, 5]
    assert listing[1].captions[5] == "With | a bar ."


def test_captions_and_pictures_are_compared_both_ways(folder, picture):
    picture(5).save(folder / "flickr30k_images/more.jpg")
    rows = [*whole(), *rows_of("gone.jpg"), *rows_of("../outside.jpg"), *rows_of("/etc/passwd")]
    picture(5).save(folder / "outside.jpg")
    write(folder, rows)
    listing = load(folder)
    assert len(listing) == 3
    outside = "lies outside: pictures must lie in the folder itself, and its 5 captions with it (results.csv names it)"
    assert sorted(told(listing)) == sorted(
        [
            "has no caption in results.csv",
            outside,
            outside,
            "missing, and its 5 captions with it (results.csv names it)",
        ]
    )


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", r"results.csv is not Flickr30k's: its first line is ''"),
        (b"file_name,text\na.jpg,x\n", r"first line is 'file_name,text', not 'image_name\| comment_number\| comment'"),
        (f"{HEADER}\na.jpg| 0| caf\xe9 .\n".encode("cp1252"), r"is not UTF-8.*save it as UTF-8"),
        (f"{HEADER}\n".encode(), r"has no picture, and results.csv names none"),
    ],
)
def test_another_table(tmp_path, content, told):
    (tmp_path / "results.csv").write_bytes(content)
    with pytest.raises(ConfigError, match=told):
        load(tmp_path)


def test_what_it_has_not(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"data.split 'val': Flickr30k's results.csv has no parts"):
        load_listings(DataConfig(source="flickr30k", path=folder, validation_split="val"))
    with pytest.raises(ConfigError, match=r"data.prompt has no effect with data.source flickr30k"):
        load(folder, prompt="x")
    (folder / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty has no results.csv, nor has flickr30k_images in it"):
        load(folder / "empty")
