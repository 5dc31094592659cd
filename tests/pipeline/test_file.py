"""Pipeline files: what they say of each run, and every mistake told with its place before anything starts."""

from pathlib import Path

import pytest
import yaml

from t2ilib.config import ConfigError
from t2ilib.pipeline.file import NAMES, load_pipeline

ROOT = Path(__file__).parents[2]


def written(folder: Path, **changes) -> Path:
    values = {
        "output": str(folder / "out"),
        "download": {"dataset": "coco", "folder": str(folder / "coco")},
        "run": {"model": {"base": "tiny-sd15"}, "adapter": {"rank": 2}, "training": {"steps": 4, "batch_size": 2}},
        "variants": {"with": {}, "without": {"data": {"captions": ["drop_adverbs"]}, "training": {"steps": 5}}},
    }
    file = folder / "pipeline.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in (values | changes).items() if v is not None}))
    return file


def test_a_variant_lies_over_the_run_and_the_download_is_its_data(tmp_path: Path) -> None:
    pipeline, runs = load_pipeline(written(tmp_path))
    assert pipeline.steps == NAMES
    assert list(runs) == ["with", "without"]
    kept, dropped = runs.values()
    assert (kept.output, kept.name, dropped.output) == (tmp_path / "out" / "with", "with", tmp_path / "out" / "without")
    assert {(run.data.source, run.data.path) for run in runs.values()} == {("coco", str(tmp_path / "coco"))}
    assert (kept.data.captions, dropped.data.captions) == ((), ("drop_adverbs",))
    assert (kept.training.steps, dropped.training.steps, dropped.training.batch_size) == (4, 5, 2)


def test_without_variants_there_is_one_run_and_overrides_are_of_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, variants=None)
    pipeline, runs = load_pipeline(file, ["run.optimizer.learning_rate=3e-4", "download.parts=[val]", "draw.seed=3"])
    assert list(runs) == ["run"]
    assert runs["run"].optimizer.learning_rate == 3e-4
    assert (pipeline.download.parts, pipeline.draw.seed) == (("val",), 3)


def test_data_of_ones_own_needs_no_download(tmp_path: Path) -> None:
    own = {"data": {"path": "my-pictures"}, "adapter": {}}
    pipeline, runs = load_pipeline(written(tmp_path, download=None, steps=["train", "draw"], run=own, variants=None))
    assert pipeline.steps == ("train", "draw")
    assert (runs["run"].data.source, runs["run"].data.path) == ("folder", "my-pictures")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": ["train", "process"]}, "name each step once, in the order download, process, train, measure, draw"),
        ({"steps": ["dowload"]}, "steps.0: Input should be 'download'"),
        ({"steps": ["train"]}, "the download section is there, and steps does not name download"),
        ({"download": None}, "steps names download, and there is no section"),
        ({"download": {"folder": "coco", "parst": ["val"]}}, "download.parst: no such field. Did you mean 'parts'?"),
        ({"optimizer": {"learning_rate": 1}}, "optimizer: no such field of a pipeline: it is one of its run, run.optimizer"),
        ({"run": {"output": "elsewhere", "adapter": {}}}, "run: leave output out: runs lie under the pipeline's output"),
        ({"variants": {"a": {"name": "b"}}}, "variants.a: leave name out"),
        ({"variants": {"../a": {}}}, "variants.../a"),
        ({"variants": {"a": {"adapter": {"rnk": 3}}}}, r"pipeline.yaml, a:\n  adapter.rnk: no such field. Did you mean 'rank'\?"),
        ({"run": {"data": {"source": "shapes", "path": None}, "shapes": {"trains": "vae"}}, "variants": None}, "it trains vae, which draws nothing"),
        (
            {"run": {"adapter": {}, "data": {"source": "webdataset", "path": "s", "streaming": True}}, "variants": None},
            "there is nothing to process before: leave the step out",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_place(tmp_path: Path, changes: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_pipeline(written(tmp_path, **changes))


@pytest.mark.parametrize("name", ["coco-adverbs", "coco-adverbs-tiny"])
def test_the_files_that_ship_are_right_and_ask_the_same(name: str) -> None:
    """Both draw what they measure, hold out what they do not train on, and differ between variants in the captions alone."""
    pipeline, runs = load_pipeline(ROOT / "experiments" / f"{name}.yaml")
    assert pipeline.steps == NAMES
    kept, dropped = (run.flat() for run in runs.values())
    assert [key for key in kept if kept[key] != dropped[key]] == ["data.captions"]
    assert dropped["data.captions"] == ["drop_adverbs"]
    assert kept["data.validation_split"] == "val"
    assert not kept["data.edit_held_out"]
    assert list(pipeline.draw.prompts) == kept["evaluation.prompts"]
