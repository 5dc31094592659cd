"""Data sets made by `datasets` itself, read back as people bring them."""

import io
import json
import logging
import pickle
import zipfile
from concurrent.futures import ThreadPoolExecutor

import datasets
import pyarrow
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from pyarrow import parquet
from pydantic import ValidationError

from t2ilib.config import ConfigError, DataConfig
from t2ilib.data.manifest import examine, load_listings
from t2ilib.data.pictures import open_picture
from t2ilib.data.sources import huggingface


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def rows(picture):
    """`rows(count, ...)`: columns of pictures, as PNG bytes, and of captions."""

    def make(count, start=0, **more):
        pictures = [{"bytes": png(picture(start + i)), "path": f"{i}.png"} for i in range(count)]
        return {"image": pictures, "text": [f" caption {start + i}" for i in range(count)]} | more

    return make


FEATURES = Features({"image": Image(), "text": Value("string")})


def saved(tmp_path, columns, features=FEATURES):
    Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def load(path, **fields):
    return huggingface.load(DataConfig(source="huggingface", path=path, **fields))


def pixels(listing):
    return [open_picture(record.path).tobytes() for record in listing]


@pytest.mark.parametrize("kind", ["save_to_disk", "parts", "parquet", "folder of parquet", "imagefolder", "jsonl"])
def test_every_form_gives_the_same_records(tmp_path, rows, picture, kind, caplog, capfd):
    path, columns = tmp_path / "data", rows(3)
    written = Dataset.from_dict(columns, features=FEATURES)
    path.mkdir()
    if kind == "save_to_disk":
        written.save_to_disk(path)
    elif kind == "parts":
        DatasetDict({"train": written, "test": Dataset.from_dict(rows(2, 5), features=FEATURES)}).save_to_disk(path)
    elif kind in ("parquet", "folder of parquet"):
        written.to_parquet(path / "train-00000-of-00001.parquet")
        path = path / "train-00000-of-00001.parquet" if kind == "parquet" else path
    else:
        table = []
        for index, text in enumerate(columns["text"]):
            picture(index).save(path / f"{index}.png")
            table.append({"file_name" if kind == "imagefolder" else "image": f"{index}.png", "text": text})
        lines = "".join(json.dumps(row) + "\n" for row in table)
        (path / ("metadata.jsonl" if kind == "imagefolder" else "train.jsonl")).write_text(lines)
        path = path if kind == "imagefolder" else path / "train.jsonl"
    capfd.readouterr()
    with caplog.at_level(logging.INFO):
        listing = load(str(path))
    assert [record.caption for record in listing] == ["caption 0", "caption 1", "caption 2"]
    assert [str(record.path) for record in listing] == ["train[0]", "train[1]", "train[2]"]
    assert pixels(listing) == [picture(index).tobytes() for index in range(3)]
    assert listing.rejected == ()
    assert capfd.readouterr().err == ""
    line, *warning = [record.getMessage() for record in caplog.records]
    assert len(warning) == (kind == "imagefolder")
    assert "3 rows of train" in line
    assert "pictures from column 'image', captions from column 'text'" in line


def test_parts_by_name(tmp_path, rows):
    parts = {"train": 3, "test": 2}
    DatasetDict({part: Dataset.from_dict(rows(n), features=FEATURES) for part, n in parts.items()}).save_to_disk(
        tmp_path / "p"
    )
    config = DataConfig(source="huggingface", path=tmp_path / "p", validation_split="test")
    assert [len(listing) for listing in load_listings(config)] == [3, 2]
    with pytest.raises(
        ConfigError, match=r"data.split of .*: 'tets' does not exist; choose from train, test.*mean 'test'"
    ):
        load(tmp_path / "p", split="tets")
    DatasetDict({"a": Dataset.from_dict(rows(1)), "b": Dataset.from_dict(rows(1))}).save_to_disk(tmp_path / "q")
    with pytest.raises(ConfigError, match=r"data.split is missing: .* has a, b, and no train"):
        load(tmp_path / "q")
    Dataset.from_dict(rows(1), features=FEATURES, split="validation").save_to_disk(tmp_path / "one")
    assert str(load(tmp_path / "one")[0].path) == "validation[0]"


def test_columns_are_found_by_type_and_usual_name(tmp_path, rows, caplog):
    columns = rows(2, text=["a", "b"], caption=[["x", " y "], ["z"]], label=[0, 1], url=["u", "v"])
    columns["picture_of_it"] = columns.pop("image")
    features = Features(
        {"picture_of_it": Image(), "text": Value("string"), "caption": List(Value("string")), "label": ClassLabel(2), "url": Value("string")}
    )  # fmt: skip
    path = saved(tmp_path, columns, features)
    with caplog.at_level(logging.INFO, "t2ilib"):
        listing = load(path)
    assert [record.captions for record in listing] == [("x", "y"), ("z",)]
    assert "pictures from column 'picture_of_it', captions from column 'caption' (not from 'text'" in caplog.text
    assert [record.caption for record in load(path, caption_column="url")] == ["u", "v"]
    with pytest.raises(ConfigError, match=r"data.caption_column 'label' of .* holds no text but ClassLabel"):
        load(path, caption_column="label")
    with pytest.raises(ConfigError, match=r"data.image_column 'label' of .* holds no pictures"):
        load(path, image_column="label")
    with pytest.raises(ConfigError, match=r"data.caption_column of .*: 'captoin' does not exist.*mean 'caption'"):
        load(path, caption_column="captoin")


def test_columns_that_cannot_be_found(tmp_path, rows):
    columns = rows(1)
    columns["words"] = columns.pop("text")
    path = saved(tmp_path, columns, Features({"image": Image(), "words": Value("string")}))
    with pytest.raises(
        ConfigError, match=r"has no column of captions by a usual name, but image, words: set data.caption_"
    ):
        load(path)
    assert load(path, prompt=" a cat")[0].captions == ("a cat",)
    Dataset.from_dict({"a": [1], "text": ["x"]}).save_to_disk(tmp_path / "none")
    with pytest.raises(
        ConfigError, match=r"has no column of pictures by type or usual name, but a, text: set data.image_col"
    ):
        load(tmp_path / "none")
    two = rows(1)
    two = {"left": two["image"], "right": two["image"], "text": two["text"]}
    Dataset.from_dict(
        two, features=Features({"left": Image(), "right": Image(), "text": Value("string")})
    ).save_to_disk(tmp_path / "two")
    with pytest.raises(ConfigError, match=r"has several columns of pictures \(left, right\)"):
        load(tmp_path / "two")
    assert len(load(tmp_path / "two", image_column="left")) == 1
    assert len(load(tmp_path / "two", mask_column="right")) == 1


def test_rows_that_cannot_be_used_are_rejected_by_number(tmp_path, rows):
    columns = rows(6, text=[["a"], [], None, ["b", None], ["c", " "], ["d"]])
    columns["image"][5] = {"bytes": b"no picture", "path": None}
    path = saved(tmp_path, columns, Features({"image": Image(), "text": List(Value("string"))}))
    listing = load(path)
    assert {str(cell): reason for cell, reason in listing.rejected} == {
        "train[1]": "has no caption (data.prompt is one for those that have none)",
        "train[2]": "has no caption (data.prompt is one for those that have none)",
        "train[3]": "its caption 2 of 2 is empty: write it, or take it out",
        "train[4]": "its caption 2 of 2 is empty: write it, or take it out",
    }
    examined = examine(listing, DataConfig(on_error="skip"))
    assert [str(record.path) for record in examined.pictures] == ["train[0]"]
    assert len(examined.pictures) + len(examined.rejected) == 6
    assert str(examined.rejected[-1][0]) == "train[5]"
    assert "it is not a picture" in examined.rejected[-1][1]
    prompted = load(path, prompt="a cat")
    assert [record.caption for record in prompted] == ["a", "a cat", "a cat", "d"]


def test_masks_weights_and_repeats(tmp_path, rows, picture):
    columns = rows(3, w=[0.5, None, 2], n=[None, 3, 1])
    columns["where"] = [{"bytes": png(picture(9)), "path": None}, None, None]
    features = Features(FEATURES | {"w": Value("float32"), "n": Value("int32"), "where": Image()})
    path = saved(tmp_path, columns, features)
    listing = load(path, mask_column="where", weight_column="w", repeat_column="n")
    assert [(record.weight, record.repeats) for record in listing] == [(0.5, 1), (1.0, 3), (2.0, 1)]
    assert [record.mask is not None for record in listing] == [True, False, False]
    assert open_picture(listing[0].mask).tobytes() == picture(9).tobytes()
    with pytest.raises(ConfigError, match=r"train\[0\]: 'a' is no weight: write a number from 0 up"):
        load(saved(tmp_path / "bad", rows(1, w=["a"]), Features(FEATURES | {"w": Value("string")})), weight_column="w")
    with pytest.raises(ConfigError, match=r"data.weights has no effect with data.source huggingface"):
        load(path, weights={"x": 2})


def test_a_mask_of_bytes_that_are_not_there(tmp_path, picture):
    there, absent = {"bytes": png(picture(0)), "path": "a.png"}, {"bytes": None, "path": None}
    table = {"image": [there] * 3, "text": ["x"] * 3, "mask": [absent, there, None]}
    parquet.write_table(pyarrow.table(table), tmp_path / "x.parquet")
    listing = load(tmp_path / "x.parquet", mask_column="mask")
    assert [record.mask is not None for record in listing] == [False, True, False]


def test_threads_read_pictures_at_once(tmp_path, rows, picture):
    listing = load(saved(tmp_path, rows(16)))
    wanted = [*range(16)] * 20
    with ThreadPoolExecutor(8) as pool:
        read = [*pool.map(lambda row: listing[row].path.read_bytes(), wanted)]
    assert read == [png(picture(row)) for row in wanted]


def test_bytes_and_paths_that_have_no_type(tmp_path, picture):
    parquet.write_table(pyarrow.table({"jpg": [png(picture(0))], "txt": ["a bee"]}), tmp_path / "x.parquet")
    listing = load(tmp_path / "x.parquet")
    assert listing[0].caption == "a bee"
    assert pixels(listing) == [picture(0).tobytes()]
    (tmp_path / "in").mkdir()
    picture(1).save(tmp_path / "outside.png")
    picture(1).save(tmp_path / "in/inside.png")
    paths = ["inside.png", "../outside.png", "gone.png", "https://x.org/a.png", None, str(tmp_path / "outside.png")]
    lines = [json.dumps({"image": path, "text": "x"}) for path in paths]
    (tmp_path / "in/x.jsonl").write_text("\n".join(lines))
    examined = examine(load(tmp_path / "in"), DataConfig(on_error="skip"))
    assert [str(record.path) for record in examined.pictures] == ["train[0]", "train[5]"]  # a path in full is meant
    told = {str(cell): reason for cell, reason in examined.rejected}
    assert "../outside.png lies outside: pictures must lie in the folder itself" in told["train[1]"]
    assert told["train[2]"] == told["train[4]"] == "missing"
    assert "https://x.org/a.png is not fetched: download the pictures first" in told["train[3]"]


def test_an_image_folder_is_better_read_as_one(tmp_path, picture, caplog):
    for name in ("a.png", "b.png"):
        picture(0).save(tmp_path / name)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,x\ngone.png,y\n")
    examined = examine(load(tmp_path), DataConfig(on_error="skip"))
    assert (next(iter(examined.pictures)).caption, *map(str, examined.rejected[0])) == ("x", "train[1]", "missing")
    assert len(examined.pictures) + len(examined.rejected) == 2  # of b.png no word
    assert "leaves out pictures that no row names, and says nothing; data.source: folder" in caplog.text


def test_an_image_folder_in_a_zip(tmp_path, picture):
    (tmp_path / "z").mkdir()
    with zipfile.ZipFile(tmp_path / "z/train.zip", "w") as file:
        for index in range(3):
            file.writestr(f"{index}.png", png(picture(index)))
        file.writestr("metadata.csv", "file_name,text\n0.png,a\n1.png,b\n2.png,c\n")
    listing = load(tmp_path / "z")
    assert [record.caption for record in listing] == ["a", "b", "c"]
    assert pixels(listing) == [picture(index).tobytes() for index in range(3)]
    assert pickle.loads(pickle.dumps(listing[1].path)).read_bytes() == png(picture(1))
    with pytest.raises(FileNotFoundError):
        huggingface.member_of(tmp_path / "z/train.zip", "gone.png")


def test_subsets_that_are_not_chosen(tmp_path):
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in "ab")
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text('{"image": "x.png", "text": "x"}\n')
    with pytest.raises(ConfigError, match=r"has several subsets \['a', 'b'\]: name one as data.subset"):
        load(tmp_path)
    (tmp_path / "b.jsonl").write_text('{"image": "x.png", "text": "of b"}\n')
    assert [record.caption for record in load(tmp_path, subset="b")] == ["of b"]
    with pytest.raises(ConfigError, match="BuilderConfig 'c' not found"):
        load(tmp_path, subset="c")
    with pytest.raises(ValidationError, match=r"subset is about data\.source huggingface, and source is folder"):
        DataConfig(subset="a")


def script(tmp_path):
    (tmp_path / "coded").mkdir()
    (tmp_path / "coded/coded.py").write_text("raise SystemExit('code was run')")
    return tmp_path / "coded"


@pytest.mark.parametrize(
    ("path", "told"),
    [
        (lambda _: "nobody/nothing", r"data.path nobody/nothing is not in the local cache, and HF_HUB_OFFLINE=1 forbids fetching"),
        (lambda _: "no/such/folder", r"data.path no/such/folder is no folder, no file of .parquet.*, and no id of the Hub"),
        (lambda tmp: tmp / "absent", r"absent is no folder"),
        (lambda tmp: tmp, r"cannot be loaded \(EmptyDatasetError: .*\); data.source: folder reads folders of pictures"),
        (script, r"coded is a Python script, and no code of data sets is run: save its rows as Parquet"),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_is_told_with_what_to_do(tmp_path, path, told, capfd):
    (tmp_path / "x").mkdir()
    with pytest.raises(ConfigError, match=told):
        load(path(tmp_path if path is script else tmp_path / "x"))
    assert capfd.readouterr().err == ""


def test_damaged_files(tmp_path, rows, capfd):
    path = tmp_path / "x.parquet"
    Dataset.from_dict(rows(2), features=FEATURES).to_parquet(path)
    path.write_bytes(path.read_bytes()[:200])
    capfd.readouterr()
    with pytest.raises(ConfigError, match=r"x.parquet cannot be loaded \(.*\)"):
        load(path)
    assert capfd.readouterr().err == ""
    with pytest.raises(ConfigError, match=r"data.path is missing: give the id"):
        huggingface.load(DataConfig(source="huggingface"))
    Dataset.from_dict({"image": [], "text": []}, features=FEATURES).to_parquet(path)
    with pytest.raises(ConfigError, match=r"x.parquet cannot be loaded \(.* no data!\)$"):
        load(path)


def test_what_was_set_before_is_set_again(tmp_path, rows):
    datasets.enable_progress_bars()
    level = datasets.logging.get_verbosity()
    load(saved(tmp_path, rows(1)))
    assert datasets.logging.get_verbosity() == level
    assert not datasets.are_progress_bars_disabled()
    assert datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
