"""The step `process`: each caption before and after, as a run will have it."""

import csv
import json
from pathlib import Path

import pytest
from coco_shaped import unpack_coco, write_coco
from PIL import Image

from t2ilib.data.dataset import load_datasets
from t2ilib.pipeline.captioning import depends, do, made
from t2ilib.pipeline.file import load_pipeline
from t2ilib.pipeline.job import Job, Options


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("coco")
    write_coco(folder / "served", 12, 6)
    unpack_coco(folder / "served", folder / "coco")
    return folder / "coco"


def job_of(coco: Path, folder: Path, captions: list, **data) -> Job:
    file = folder / "pipeline.yaml"
    section = {
        "source": "coco",
        "path": str(coco),
        "validation_split": "val",
        "captions": captions,
        "max_rejected": 0.5,
    }
    run = {"adapter": {}, "data": section | data}
    file.write_text(json.dumps({"output": str(folder / "out"), "steps": ["process", "train"], "run": run}))
    config, runs = load_pipeline(file)
    return Job(config, Options(), runs, "run", {})


def rows(job: Job) -> list[dict[str, str]]:
    with (job.run.output / "captions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("edit_held_out", [True, False])
def test_what_is_written_is_what_a_run_trains_on(coco, tmp_path, edit_held_out) -> None:
    job = job_of(coco, tmp_path, ["drop_adverbs"], edit_held_out=edit_held_out)
    assert not made(job)
    told = do(job)
    assert made(job)
    found, datasets = rows(job), load_datasets(job.run)
    for part, dataset in zip(("training", "held out"), datasets, strict=True):
        after = [(r["picture"], r["after"]) for r in found if r["part"] == part]
        assert after == [(record.path.name, text) for record in dataset.records for text in record.captions]
    assert told["digests"] == [dataset.digest for dataset in datasets]
    assert told["pictures"] == [11, 6], "of one of the twelve nobody says anything"
    assert told["captions"] == len(found) == 5 * 17
    changed = [row for row in found if row["before"] != row["after"]]
    assert told["changed"] == len(changed) == (5 * 17 if edit_held_out else 5 * 11)
    assert ("quietly" in changed[0]["before"], "quietly" in changed[0]["after"]) == (True, False)
    assert json.loads((job.run.output / "captions.json").read_text())["tagger"] == "pattern"


def test_captions_that_become_fewer_stand_in_one_row(coco, tmp_path) -> None:
    told = do(job := job_of(coco, tmp_path, [{"choose": "first"}]))
    first = rows(job)[0]
    assert told["captions"] == 17
    assert first["before"].split(" / ")[0] == first["after"]
    assert len(first["before"].split(" / ")) == 5


def test_what_nothing_is_left_of_is_counted_and_not_among_the_pictures(tmp_path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(12):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text("quietly" if number == 3 else f"a dog of number {number}")
    section = {"source": "folder", "path": str(folder), "validation_split": None, "validation_share": 0.0}
    told = do(job := job_of(folder, tmp_path, ["drop_adverbs"], **section))
    assert (told["to_nothing"], told["pictures"]) == (1, [11, 0])
    assert [row["after"] for row in rows(job)][3] == ""


def test_it_depends_on_what_it_does_and_not_on_how(coco, tmp_path) -> None:
    plain = depends(job_of(coco, tmp_path, ["drop_adverbs"]))
    assert depends(job_of(coco, tmp_path, ["drop_adverbs"], workers=3, cache="latents")) == plain
    assert depends(job_of(coco, tmp_path, ["drop_nouns"])) != plain
