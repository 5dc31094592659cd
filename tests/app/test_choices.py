"""What the page offers: adapters as texts and back, runs, studies and what can be compared of them."""

import os

import pytest

from t2ilib.app.choices import (
    adapter_choices,
    base_choices,
    newest_for,
    read_adapter,
    runs_with_steps,
    studies,
    study_of,
    variant_choices,
    written_adapter,
)
from t2ilib.drawing.finding import list_adapters
from t2ilib.drawing.settings import AdapterChoice

FILE = "adapter/pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def runs(results):
    for when, name in enumerate(("words", "study-quick/pissa/seed0", "cat")):
        os.utime(results / name / FILE, (10**9 + when,) * 2)
    return list_adapters(results)


@pytest.mark.parametrize(
    ("text", "path", "step"),
    [
        ("results/cat", "results/cat", None),
        ("  results/my cat at step 500 ", "results/my cat", 500),
        ("a at step 1 at step 2", "a at step 1", 2),
        ("models:/cats-full@champion", "models:/cats-full@champion", None),
        ("look at step by step", "look at step by step", None),
        (" at step 5", "at step 5", None),
    ],
)
def test_an_adapter_is_a_text(text, path, step):
    assert read_adapter(text, 0.5) == {"path": path, "step": step, "strength": 0.5}
    if not text.startswith(" at"):
        assert read_adapter(written_adapter(AdapterChoice(path=path, step=step)))["path"] == path


def test_adapters_are_offered_newest_first_behind_none_and_the_registry(results, runs):
    labels, values = zip(*adapter_choices(runs, ["models:/x@champion"]), strict=True)
    assert values == (
        "",
        "models:/x@champion",
        str(results / "cat"),
        str(results / "study-quick/pissa/seed0"),
        str(results / "words"),
    )
    assert labels[0] == "none"
    assert labels[2].startswith("cat (lora, rank 2, over tiny-sdxl, ")


def test_a_page_begins_with_the_newest_that_goes_with_its_base(results, runs):
    assert newest_for(runs, "tiny-sdxl") == str(results / "cat")
    assert newest_for(runs, "tiny-sd15") == str(results / "words")
    assert newest_for(runs, "another") == ""
    assert base_choices(runs, "mine") == ["mine", "tiny-sdxl", "tiny-sd15"]


def test_a_run_that_still_goes_on_is_offered_as_it_is_now(results, runs, tmp_path):
    import shutil

    shutil.copytree(results / "cat", tmp_path / "going")
    shutil.rmtree(tmp_path / "going" / "adapter")
    (going,) = list_adapters(tmp_path)
    ((_, none), (label, value)) = adapter_choices([going], [])
    assert (none, value) == ("", f"{tmp_path / 'going'} at step 2")
    assert "at step 2 so far" in label
    assert newest_for([going], "tiny-sdxl") == "", "a page begins with what is finished"


def test_runs_of_a_study_are_compared_by_variant(results, runs):
    assert [study_of(run) for run in runs] == [None, "study-quick", None]
    assert studies(runs) == ["all runs", "study-quick"]
    assert variant_choices(runs, "study-quick") == [
        ("the base alone", ""),
        ("pissa/seed0", str(results / "study-quick/pissa/seed0")),
    ]
    assert [value for _, value in variant_choices(runs, "all runs", ["models:/x@champion"])][:2] == [
        "",
        "models:/x@champion",
    ]
    assert [value for _, value in runs_with_steps(runs)] == [str(run.path) for run in runs]
