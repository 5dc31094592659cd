import json

import pyarrow
import pytest
from pyarrow import parquet

from t2ilib.config import ConfigError, DataConfig
from t2ilib.data.sources.table import read_table

CONFIG = DataConfig()


def jsonl(tmp_path, text):
    (tmp_path / "metadata.jsonl").write_text(text)
    return tmp_path / "metadata.jsonl"


def table(tmp_path, text, encoding="utf-8"):
    (tmp_path / "metadata.csv").write_bytes(text.encode(encoding))
    return tmp_path / "metadata.csv"


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_missing_column_is_named_with_those_there_are(tmp_path, kind):
    if kind == "jsonl":
        rows = [{"file_name": "b.png", "text": "a bee"}, *({"file_name": n, "caption": "an ant"} for n in "acd")]
        path, row, others = jsonl(tmp_path, "".join(json.dumps(row) + "\n" for row in rows)), 2, 2
    else:
        path, row, others = table(tmp_path, "file_name,caption\nb.png,a bee\nc.png,a cat\n"), 1, 1
    with pytest.raises(ConfigError) as error:
        read_table(path, CONFIG)
    told = f"row {row} has no text in 'text' (it has file_name, caption): set data.image_column"
    assert told in str(error.value)
    assert f"{others} other row" in str(error.value)
    assert str(error.value).count("has no text") == 1


@pytest.mark.parametrize("value", ["3", "null", "true", "[]", "[3]", '["a", null]', '[["a"]]', '{"a": 1}'])
def test_what_is_no_text_is_not_made_text(tmp_path, value):
    with pytest.raises(ConfigError, match=r"row 1 has no text in 'text'"):
        read_table(jsonl(tmp_path, f'{{"file_name": "b.png", "text": {value}}}\n'), CONFIG)


def test_broken_json_is_told_with_its_line(tmp_path):
    whole = '{"file_name": "b.png", "text": "a bee"}\n'
    with pytest.raises(ConfigError, match=r"metadata.jsonl, line 3 is not JSON"):
        read_table(jsonl(tmp_path, whole + '\n{"file_name": "a.jpg", "text": \n'), CONFIG)
    with pytest.raises(ConfigError, match=r"row 1 has no text in 'file_name'.*list"):
        read_table(jsonl(tmp_path, '["b.png", "a bee"]\n'), CONFIG)
    with pytest.raises(ConfigError, match=r"line 2 is not JSON: 'text' is there twice"):
        read_table(jsonl(tmp_path, whole + '{"file_name": "b", "text": "a bee", "text": "an ant"}'), CONFIG)
    with pytest.raises(ConfigError, match=r"line 1 is not JSON: NaN"):
        read_table(jsonl(tmp_path, '{"file_name": "b", "text": "a bee", "score": NaN}'), CONFIG)
    with pytest.raises(ConfigError, match=r"line 1 is not JSON"):
        read_table(jsonl(tmp_path, "[" * 100_000), CONFIG)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("file_name,text\nb.png,a bee, striped\n", "row 1 has more fields than the header: put captions with commas in quotes"),
        ("file_name,text,note\nb.png,a bee,\nc.png,a cat\n", "row 2 has fewer fields than the header (2 of 3)"),
        ("file_name,text,text\nb.png,a bee,an ant\n", "the header has 'text' twice"),
        ("file_name,text,\nb.png,a bee,\n", "column 3 of the header has no name"),
        (",file_name,text\n0,b.png,a bee\n", "column 1 of the header has no name"),
        ("file_name;text\nb.png;a bee\n", "fields are separated by ';'"),
        ("file_name\ttext\nb.png\ta bee\n", r"fields are separated by '\t'"),
        ('file_name,text\nb.png,"a bee\nc.png,a cat\n', "is not CSV"),
        ('file_name,text\nb.png,"a" bee\n', "line 2 is not CSV"),
    ],
)  # fmt: skip
def test_nothing_of_a_csv_is_read_leniently(tmp_path, text, told):
    with pytest.raises(ConfigError) as error:
        read_table(table(tmp_path, text), CONFIG)
    assert told in str(error.value)
    assert "metadata.csv" in str(error.value)


def test_several_mistakes_are_told_together(tmp_path):
    with pytest.raises(ConfigError) as error:
        read_table(table(tmp_path, "file_name,text\na,b,c\nd\ne,f\ng,h,i\n"), CONFIG)
    assert "row 1 has more fields" in str(error.value)
    assert "row 2 has fewer fields" in str(error.value)
    assert "so has 1 other row" in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_csv_as_spreadsheets_write_it(tmp_path, encoding):
    path = table(tmp_path, 'file_name,text\r\nb.png,"a ""bee"", ä"\r\n\r\nc.png,\r\n', encoding)
    rows = [(1, {"file_name": "b.png", "text": 'a "bee", ä'}), (2, {"file_name": "c.png", "text": ""})]
    assert read_table(path, CONFIG) == rows


def test_tables_in_other_encodings_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"metadata.csv: byte 24 \(0xe9, line 2\) is not UTF-8.*save it as UTF-8"):
        read_table(table(tmp_path, "file_name,text\nb.png,caf\u00e9\n", "cp1252"), CONFIG)
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "b.png", "text": "caf\xe9"}')
    with pytest.raises(ConfigError, match=r"metadata.jsonl: byte 35 \(0xe9, line 1\)"):
        read_table(tmp_path / "metadata.jsonl", CONFIG)


def test_a_line_separator_inside_a_json_caption(tmp_path):
    path = jsonl(tmp_path, '{"file_name": "b.png", "text": "a bee\u2028on two lines"}\n')
    assert read_table(path, CONFIG)[0][1]["text"] == "a bee\u2028on two lines"


def test_other_column_names(tmp_path):
    config = DataConfig(image_column="image", caption_column="prompt")
    row = {"image": "b.png", "prompt": "a bee", "text": 5}
    assert read_table(jsonl(tmp_path, json.dumps(row)), config) == [(1, row)]


@pytest.fixture
def columns(tmp_path):
    """`columns(file_name=[...], ...)` writes them as metadata.parquet."""

    def write(**values):
        parquet.write_table(pyarrow.table(values), tmp_path / "metadata.parquet")
        return tmp_path / "metadata.parquet"

    return write


def test_parquet_is_read_like_the_others_and_only_where_it_counts(columns):
    path = columns(
        file_name=["b.png", "c.png"], text=[["a bee", "ä wasp"], ["a cat"]], image=[b"pixels", b""], w=[2.0, None]
    )
    assert read_table(path, CONFIG) == [
        (1, {"file_name": "b.png", "text": ["a bee", "ä wasp"]}),
        (2, {"file_name": "c.png", "text": ["a cat"]}),
    ]
    weighed = read_table(path, DataConfig(weight_column="w"))
    assert [row["w"] for _, row in weighed] == [2.0, None]
    with pytest.raises(
        ConfigError, match=r"has no column 'words' \(it has file_name, text, image, w\): set data.caption_c"
    ):
        read_table(path, DataConfig(caption_column="words"))
    with pytest.raises(ConfigError, match=r"row 2 has no text in 'text'"):
        read_table(columns(file_name=["b.png", "c.png"], text=["a bee", None]), CONFIG)


@pytest.mark.parametrize("kept", [0, 3, 60, 0.5, -1])
def test_parquet_that_is_cut_off(columns, kept):
    path = columns(file_name=["b.png"] * 100, text=["a bee"] * 100)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(ConfigError, match=r"metadata.parquet is not Parquet that can be read"):
        read_table(path, CONFIG)


COUNTS = DataConfig(weight_column="w", repeat_column="r")


@pytest.mark.parametrize(
    ("weight", "repeats", "read"),
    [(2, 3, (2.0, 3)), (0, 1, (0.0, 1)), (None, None, (None, None)), ("0.5", "2", (0.5, 2)), ("", "", (None, None)),
     (1.5, 2.0, (1.5, 2))],
)  # fmt: skip
def test_weights_and_repeats(tmp_path, weight, repeats, read):
    row = {"file_name": "b.png", "text": "a bee", "w": weight, "r": repeats}
    row = read_table(jsonl(tmp_path, json.dumps(row)), COUNTS)[0][1]
    assert (row["w"], row["r"]) == read


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [("w", -1, "-1 is no weight"), ("w", True, "True is no weight"), ("w", "much", "'much' is no weight"), ("w", "nan", "no weight"),
     ("w", [2], "is no weight"), ("r", 0, "0 is no number of repeats"), ("r", 1.5, "1.5 is no"), ("r", True, "True is no"),
     ("r", "inf", "'inf' is no"), ("r", "twice", "whole number from 1 up")],
)  # fmt: skip
def test_what_is_no_weight_or_repeat_is_told_with_its_row(tmp_path, column, value, told):
    rows = [
        {"file_name": "a.png", "text": "an ant", "w": 1, "r": 1},
        {"file_name": "b.png", "text": "a bee", "w": 1, "r": 1},
    ]
    rows[1][column] = value
    with pytest.raises(ConfigError) as error:
        read_table(jsonl(tmp_path, "".join(json.dumps(row) + "\n" for row in rows)), COUNTS)
    assert f"row 2 has a mistake in '{column}'" in str(error.value)
    assert told in str(error.value)


def test_a_column_that_is_named_must_be_there(tmp_path):
    path = jsonl(tmp_path, '{"file_name": "b.png", "text": "a bee"}')
    for field in ("mask_column", "weight_column", "repeat_column"):
        with pytest.raises(ConfigError, match=rf"row 1 has no 'x' \(it has file_name, text\): set data.{field}"):
            read_table(path, DataConfig(**{field: "x"}))
    with pytest.raises(ConfigError, match=r"row 1 has no file name in 'text2'"):
        read_table(jsonl(tmp_path, '{"file_name": "b.png", "text": "x", "text2": 3}'), DataConfig(mask_column="text2"))
