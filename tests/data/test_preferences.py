"""Pairs as people bring them: a table beside pictures, and Pick-a-Pic's rows."""

import io
import json
import logging
import math

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from t2ilib.config import ConfigError, DataConfig
from t2ilib.data.dataset import load_datasets
from t2ilib.data.manifest import examine, load_listings
from t2ilib.data.pictures import open_picture
from t2ilib.data.sources import preferences
from t2ilib.runfile import build_run


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


@pytest.fixture
def folder(tmp_path, picture):
    """`folder(rows)`: six pictures, a.png to f.png, and a table of these rows."""

    def make(*rows, name="pairs"):
        place = tmp_path / name
        (place / "in").mkdir(parents=True, exist_ok=True)
        for number, letter in enumerate("abcdef"):
            picture(number).save(place / f"{letter}.png")
        lines = [json.dumps(row) if isinstance(row, dict) else row for row in rows]
        (place / "preferences.jsonl").write_text("".join(f"{line}\n" for line in lines))
        return place

    return make


def row(chosen, rejected, text="a bee", **more):
    return {"chosen": f"{chosen}.png", "rejected": f"{rejected}.png", "text": text, **more}


def load(path, **fields):
    return preferences.load(DataConfig(source="preferences", path=path, **fields))


def told(records):
    return [(record.path.name, record.rejected.name, record.caption) for record in records]


def test_a_table_and_all_that_lies_beside_it(folder, caplog):
    path = folder(row("a", "b", " a bee ", score=0.5), row("c", "d", "an ant"), row("a", "c"))
    (path / "notes.md").touch()
    (path / ".hidden").touch()
    with caplog.at_level(logging.INFO):
        listing = load(path)
    expected = [("a.png", "b.png", "a bee"), ("c.png", "d.png", "an ant"), ("a.png", "c.png", "a bee")]
    assert told(listing) == told(load(path / "preferences.jsonl")) == expected
    assert "not read of its rows: score" in caplog.text
    assert {path.name: why for path, why in listing.aside} == {
        "e.png": "no row of preferences.jsonl names it",
        "f.png": "no row of preferences.jsonl names it",
        "notes.md": "neither a picture nor the table of pairs",
    }
    assert [path.name for path in (*listing.texts, *listing.hidden)] == ["preferences.jsonl", ".hidden"]
    assert not listing.rejected


def test_rows_that_cannot_be_used_are_rejected_by_name(folder, caplog):
    rows = [
        row("a", "b"),
        row("a", "gone"),
        row("a", "../pairs/../x"),
        row("b", "b"),
        row("c", "d", "  "),
        row("a", "b"),
        row("b", "a"),
    ]
    listing = load(folder(*rows))
    assert told(listing) == [("a.png", "b.png", "a bee"), ("b.png", "a.png", "a bee")]
    assert [(path.name, why) for path, why in listing.rejected] == [
        ("gone.png", "missing (row 2 of preferences.jsonl)"),
        ("x.png", "lies outside: pictures must lie in the folder itself (row 3 of preferences.jsonl)"),
        ("b.png", "is chosen and rejected at once (row 4 of preferences.jsonl)"),
        ("c.png", "has an empty caption: write one (row 5 of preferences.jsonl)"),
        ("a.png", "is chosen over b.png in row 1 already: keep one (row 6 of preferences.jsonl)"),
    ]
    assert "2 rows contradict each other" in caplog.text


def test_a_table_that_is_none_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"row 2 has no text in 'rejected' \(it has chosen, text\): a row is chosen,"):
        load(folder(row("a", "b"), {"chosen": "a.png", "text": "x"}))
    with pytest.raises(ConfigError, match="line 1 is not JSON"):
        load(folder("{"))
    with pytest.raises(ConfigError, match="names no pair"):
        load(folder())
    with pytest.raises(ConfigError, match=r"data.split is about data sets with parts"):
        load(folder(row("a", "b")), split="test")
    with pytest.raises(ConfigError, match=r"data.mask_column has no effect with data.source preferences"):
        load(folder(row("a", "b")), mask_column="mask")
    with pytest.raises(ConfigError, match=r"data\.path is missing: give a folder with preferences"):
        load(None)
    (tmp_path / "votes.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"t2ilib data preferences OUT --votes .*votes.json, and give that folder"):
        load(tmp_path / "votes.json")
    with pytest.raises(ValueError, match="streaming is for huggingface and webdataset"):
        DataConfig(source="preferences", path=tmp_path, streaming=True)


def test_prompts_are_held_out_or_lie_apart(folder, tmp_path):
    letters = "abcdef"
    rows = [
        row(one, other, f"prompt {i % 4}")
        for i, (one, other) in enumerate((a, b) for a in letters for b in letters if a < b)
    ]
    path = folder(*rows)

    def parts(**data):
        return load_datasets(build_run({"adapter": {}, "data": {"source": "preferences", "path": str(path), **data}}))

    for data in ({"validation_share": 0.3}, {"validation_share": 0.3, "part": "tuning"}):
        training, held_out = parts(**data)
        assert training.records
        assert held_out.records
        assert not {*training.captions()} & {*held_out.captions()}
    apart = folder(row("a", "b", "another"), name="pairs/held-out")
    training, held_out = parts(validation_path=str(apart))
    assert (len(training), held_out.captions()) == (len(rows), ["another"])
    assert not training.rejected
    assert not any("held-out" in str(path) for path, _ in training.aside)


@pytest.fixture
def rows(picture):
    """`rows(labels)`: columns as Pick-a-Pic has them, of JPEGs of noise."""

    def jpg(seed):
        buffer = io.BytesIO()
        picture(seed).save(buffer, format="JPEG")
        return buffer.getvalue()

    def make(labels, **more):
        count = len(labels)
        columns = {
            "are_different": [True] * count,
            "caption": [f" caption {i}" for i in range(count)],
            "has_label": [True] * count,
            "jpg_0": [jpg(2 * i) for i in range(count)],
            "jpg_1": [jpg(2 * i + 1) for i in range(count)],
            "label_0": pyarrow.array(labels, pyarrow.float64()),
            "label_1": pyarrow.array([None if label is None else 1 - label for label in labels], pyarrow.float64()),
        }
        return pyarrow.table(columns | more)

    return make


def test_pick_a_pics_rows(tmp_path, rows, caplog):
    table = rows([1.0, 0.0, 0.5, 1.0, None, math.nan, 1.0], has_label=[True, True, True, False, True, True, True])
    path = tmp_path / "pick" / "train-00000-of-00001.parquet"
    path.parent.mkdir()
    parquet.write_table(table, path, row_group_size=2)
    with caplog.at_level(logging.INFO):
        listing = load(path)
    assert told(listing) == [
        ("train[0].jpg_0", "train[0].jpg_1", "caption 0"),
        ("train[1].jpg_1", "train[1].jpg_0", "caption 1"),
        ("train[6].jpg_0", "train[6].jpg_1", "caption 6"),
    ]
    assert "7 rows of train, of which 3 are pairs; left out: 1 ties and 3 without a label" in caplog.text
    assert [(str(cell), why.partition(":")[0]) for cell, why in listing.aside] == [
        ("train[2].jpg_0", "a tie"),
        ("train[3].jpg_0", "has no label"),
        ("train[4].jpg_0", "has no label"),
        ("train[5].jpg_0", "has no label"),
    ]
    for record, number in zip(listing, (0, 1, 6), strict=True):
        chosen, rejected = ("jpg_1", "jpg_0") if number == 1 else ("jpg_0", "jpg_1")
        assert record.path.read_bytes() == table[chosen][number].as_py()
        assert record.rejected.read_bytes() == table[rejected][number].as_py()
        assert open_picture(record.rejected).size == (24, 16)
    assert len(examine(listing, DataConfig()).pictures) == 3
    assert told(load(path.parent)) == told(listing), "a folder of files"


def test_rows_without_a_picture_a_caption_or_a_column(tmp_path, rows):
    table = rows([1.0, 1.0, 0.0])
    missing = table.set_column(4, "jpg_1", pyarrow.array([None, *table["jpg_1"].to_pylist()[1:]], pyarrow.binary()))
    missing = missing.set_column(1, "caption", pyarrow.array(["a", None, "c"]))
    parquet.write_table(missing, tmp_path / "x.parquet")
    listing = load(tmp_path / "x.parquet")
    assert [(str(cell), why) for cell, why in listing.rejected] == [
        ("train[1].jpg_0", "has an empty caption: write one")
    ]
    examined = examine(listing, DataConfig(on_error="skip"))
    assert examined.rejected[-1][1] == "its rejected picture train[0].jpg_1: missing"
    parquet.write_table(table.drop_columns(["label_0"]), tmp_path / "x.parquet")
    with pytest.raises(
        ConfigError, match=r"has no column 'label_0', but are_different, caption.*Pairs are a folder with"
    ):
        load(tmp_path / "x.parquet")


def test_parts_by_name(tmp_path, rows):
    for name, labels in (("train", [1.0] * 3), ("validation_unique", [0.0] * 2)):
        (tmp_path / "data").mkdir(exist_ok=True)
        parquet.write_table(rows(labels), tmp_path / "data" / f"{name}-00000-of-00001.parquet")
    assert len(load(tmp_path, split="validation_unique")) == 2
    config = DataConfig(source="preferences", path=tmp_path, validation_split="validation_unique")
    assert [len(part) for part in load_listings(config)] == [3, 2]
