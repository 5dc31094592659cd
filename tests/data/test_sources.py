"""Every source, on files in its form, through a whole run; and a source of one's own."""

import json
import logging
import zipfile
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from t2ilib.config import ConfigError, DataConfig
from t2ilib.data.dataset import load_datasets
from t2ilib.data.manifest import load_listings
from t2ilib.runfile import build_run
from t2ilib.training.loop import train

EXAMPLE = Path(__file__).parents[2] / "experiments" / "my_source.py"
PICTURES = 7
"""In every data set below there are so many pictures: one of them is broken, one has no caption, and one is told of and not there."""


def texts(index):
    return [f"picture {index}, caption {number}" for number in range(5)]


def draw(folder, picture):
    """Seven names of pictures, of which the last but one is broken and the last is not there."""
    folder.mkdir(parents=True)
    for index in range(PICTURES - 1):
        picture(index, (80, 72)).save(folder / f"{index}.jpg")
    (folder / "5.jpg").write_bytes(b"no picture")
    return [f"{index}.jpg" for index in range(PICTURES)]


def make_folder(path, picture):
    names = draw(path, picture)
    rows = {"file_name": names, "text": [texts(index) if index != 3 else [""] for index in range(PICTURES)]}
    parquet.write_table(pyarrow.table(rows), path / "metadata.parquet")


def make_coco(path, picture):
    names = draw(path / "train2017", picture)
    images = [{"id": index, "file_name": name} for index, name in enumerate(names)]
    captions = [
        {"image_id": index, "caption": text} for index in range(PICTURES) for text in texts(index) if index != 3
    ]
    (path / "captions_train2017.json").write_text(json.dumps({"images": images, "annotations": captions}))
    with zipfile.ZipFile(path / "train2017.zip", "w") as file:
        for picture_file in sorted((path / "train2017").iterdir()):
            file.write(picture_file, f"train2017/{picture_file.name}")
            picture_file.unlink()
    (path / "train2017").rmdir()


def make_flickr30k(path, picture):
    names = draw(path / "flickr30k_images", picture)
    rows = [
        f"{name}| {number}| {text}"
        for index, name in enumerate(names)
        for number, text in enumerate(texts(index))
        if index != 3
    ]
    (path / "results.csv").write_text("\n".join(["image_name| comment_number| comment", *rows]))


def make_huggingface(path, picture):
    names = draw(path / "drawn", picture)
    pictures = [{"bytes": (path / "drawn" / name).read_bytes(), "path": name} for name in names[:-1]]
    rows = {"image": [*pictures, None], "caption": [texts(index) if index != 3 else None for index in range(PICTURES)]}
    (path / "rows").mkdir()
    parquet.write_table(pyarrow.table(rows), path / "rows" / "train.parquet")
    return {"path": str(path / "rows")}


def make_own(path, picture):
    names = draw(path, picture)
    (path / "captions.json").write_text(json.dumps({name: texts(i) for i, name in enumerate(names) if i != 3}))
    return {"source": f"{EXAMPLE}:load"}


MAKERS = {
    "folder": make_folder,
    "coco": make_coco,
    "flickr30k": make_flickr30k,
    "huggingface": make_huggingface,
    "own": make_own,
}


@pytest.fixture
def settings(tmp_path, picture, monkeypatch):
    """`settings(source)` makes its data set, and gives a run of two steps on it."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")

    def make(source):
        data = {"source": source, "path": str(tmp_path / "data"), "on_error": "skip"}
        return {
            "output": str(tmp_path / "run"),
            "model": {"base": "tiny-sd15"},
            "adapter": {"rank": 1, "alpha": 1.0},
            "data": data | (MAKERS[source](tmp_path / "data", picture) or {}),
            "training": {"steps": 2, "batch_size": 2},
            "evaluation": {
                "validate_every": 0,
                "validation_timesteps": 1,
                "sample_every": 0,
                "num_inference_steps": 1,
                "prompts": ["a picture"],
            },
        }

    return make


@pytest.mark.parametrize("source", MAKERS)
def test_a_whole_run_whose_manifest_adds_up(settings, source, caplog):
    run = build_run(settings(source))
    training, held_out = load_datasets(run)
    used = [*training.records, *held_out.records]
    assert sorted(record.captions for record in used) == [tuple(texts(index)) for index in (0, 1, 2, 4)]
    assert len(used) + len(training.rejected) == PICTURES
    assert all(str(record.path.parent) for record in used)  # which MLflow is told
    reasons = sorted(reason.split(",")[0].split(":")[0] for _, reason in training.rejected)
    assert any("missing" in reason for reason in reasons), reasons
    assert "cannot be decoded" in reasons
    with caplog.at_level(logging.INFO, "t2ilib"):
        train(run)
    steps = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    assert sum("grad_norm" in step and step["loss"] > 0 for step in steps) == 2
    assert "4 pictures used" in caplog.text
    assert "3 rejected:" in caplog.text
    assert [*(run.output).rglob("*.safetensors")]
    kept = json.loads((run.output / "manifest.json").read_text())
    assert kept["pictures"]["training"] + kept["pictures"]["held_out"] + kept["pictures"]["rejected"] == PICTURES
    assert kept["digest"] == {"training": training.digest, "held_out": held_out.digest}


def test_too_many_rejections_stop(settings):
    values = settings("coco")
    values["data"]["on_error"] = "stop"
    with pytest.raises(ConfigError, match=r"3 files cannot be used, 4 pictures can"):
        load_datasets(build_run(values))


def test_the_example_tells_what_it_cannot_use(tmp_path, picture):
    def load(**fields):
        return load_listings(DataConfig(source=f"{EXAMPLE}:load", path=tmp_path, **fields))

    with pytest.raises(ConfigError, match=r"give a folder with captions.json"):
        load()
    for index, name in enumerate(("a.png", "b.png", "c.png", "d.png")):
        picture(index).save(tmp_path / name)
    found = {"b.png": " a bee ", "a.png": ["an ant", "two ants"], "c.png": "", "../x.png": "x", "gone.png": "x"}
    (tmp_path / "captions.json").write_text(json.dumps(found))
    (tmp_path / "notes.md").touch()
    listing, apart = load()
    assert apart is None
    assert [(record.path.name, record.captions) for record in listing] == [
        ("a.png", ("an ant", "two ants")),
        ("b.png", ("a bee",)),
    ]
    assert {path.name: reason.split(":")[0] for path, reason in listing.rejected} == {
        "c.png": "has an empty caption",
        "x.png": "lies outside",
        "gone.png": "missing (captions.json names it)",
        "d.png": "is not in captions.json",
    }
    assert listing.aside == ((tmp_path / "notes.md", "no picture"),)
    for broken in ('{"a.png": "an a', "[]"):
        (tmp_path / "captions.json").write_text(broken)
        with pytest.raises(ConfigError, match=r"captions.json is no"):
            load()
    with pytest.raises(ConfigError, match=r"data.source: .*my_source.py has no function lode"):
        load_listings(DataConfig(source=f"{EXAMPLE}:lode", path=tmp_path))
