"""A run's checkpoints in the page: what is drawn at each, and the one that is kept as a file."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from t2ilib.app.steps import (
    FORMATS,
    Moment,
    StepPictures,
    export_moment,
    export_name,
    find_run,
    formats_for,
    jobs_of,
    moments_of,
)
from t2ilib.config import ConfigError
from t2ilib.drawing.checkpoints import export_step
from t2ilib.drawing.desk import Desk
from t2ilib.drawing.finding import list_adapters
from t2ilib.drawing.settings import build_settings


@pytest.fixture(scope="module")
def runs(results):
    return {run.name: run for run in list_adapters(results)}


@pytest.fixture(scope="module")
def desk(results):
    return Desk(results, device=torch.device("cpu"))


def test_the_slider_goes_from_the_base_over_all_steps_to_the_end(runs):
    assert moments_of(runs["cat"]) == (Moment("The base alone", base=True), Moment("Step 1", 1), Moment("Step 2", 2))


def test_an_end_that_is_no_checkpoint_has_its_place(runs, results, tmp_path):
    shutil.copytree(results / "cat", tmp_path / "cat")
    last = next((tmp_path / "cat" / "checkpoints").glob("*000002"))
    shutil.rmtree(last)
    (run,) = list_adapters(tmp_path)
    assert [(one.label, one.step) for one in moments_of(run)[1:]] == [("Step 1", 1), ("The end of the run", None)]


def test_all_places_draw_the_same_prompts_and_noise(runs, desk):
    run = runs["words"]
    asked = build_settings(
        {"prompt": "p", "seed": 4, "num_pictures": 2, "num_inference_steps": 1, "adapters": [{"path": "x"}]}
    )
    moments = moments_of(run)
    jobs = jobs_of(run, moments, asked, "a <heart>\na square")
    assert [[a.step for a in job.adapters] for job in jobs] == [[], [], [1], [1], [2], [2]]
    assert {job.model.base for job in jobs} == {"tiny-sd15"}, "a run's own base"
    assert [(job.prompt, job.seed, job.first) for job in jobs[:2]] == [(j.prompt, j.seed, j.first) for j in jobs[2:4]]
    pictures = desk.draw(jobs).pictures
    drawn = StepPictures(run, moments, 4)
    places = [drawn.add(number, (str(number), "")) for number in range(len(pictures))]
    assert places == [0] * 4 + [1] * 4 + [2] * 4
    for number, picture in enumerate(pictures):
        assert [a.step for a in picture.settings.adapters] == [[], [1], [2]][places[number]]
    first, last = (np.asarray(pictures[number].image, int) for number in (4, 8))
    assert abs(first - last).max() > 0, "two steps draw two pictures"


@pytest.mark.parametrize(
    ("form", "format"), [("t2ilib, diffusers", "diffusers"), ("A1111, ComfyUI, Forge (kohya)", "kohya")]
)
def test_the_step_that_is_kept_is_the_one_that_is_shown(runs, desk, tmp_path, form, format):
    run = runs["cat"]
    drawn = StepPictures(run, moments_of(run), 1)
    (tmp_path / "folder").mkdir()
    (file,) = export_moment(desk, drawn, 1, form, tmp_path / "folder")
    assert file.name == "cat-step-000001.safetensors"
    expected = load_file(export_step(run.path, 1, tmp_path / "own.safetensors", format))
    found = load_file(file)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert desk.loaded.components is None, "its base has made room"


def test_words_are_written_beside_and_a_folder_is_listed_whole(runs, desk, tmp_path):
    run = runs["words"]
    drawn = StepPictures(run, moments_of(run), 1)
    for form, names in (("t2ilib, diffusers", {"words-step-000002.safetensors", "heart.safetensors"}), ("peft", set())):
        folder = tmp_path / form.split(",")[0]
        folder.mkdir()
        found = {file.name for file in export_moment(desk, drawn, 2, form, folder)}
        assert len(found) >= 2
        assert not names or {name for name in names if name.startswith("words")} <= found


def test_what_cannot_be_kept_is_told(runs, desk, tmp_path):
    run = runs["cat"]
    drawn = StepPictures(run, moments_of(run), 1)
    with pytest.raises(ConfigError, match="the base alone, without an adapter to keep"):
        export_moment(desk, drawn, 0, "peft", tmp_path)
    with pytest.raises(ConfigError, match="draw a run's checkpoints first"):
        export_moment(desk, None, 0, "peft", tmp_path)
    with pytest.raises(ConfigError, match="format 'zip': choose t2ilib, diffusers"):
        export_moment(desk, drawn, 1, "zip", tmp_path)
    with pytest.raises(ConfigError, match="choose a run first"):
        find_run(list(runs.values()), None)
    with pytest.raises(ConfigError, match="nowhere is no run with checkpoints any more"):
        find_run(list(runs.values()), "nowhere")


def test_every_kind_of_adapter_has_formats(runs):
    from t2ilib.config.sections import AdapterSpec

    kinds = AdapterSpec.model_fields["kind"].annotation.__args__
    assert set(kinds) == set(FORMATS)
    assert formats_for(runs["cat"])[0] == "t2ilib, diffusers"
    assert export_name(StepPictures(runs["study-quick/pissa/seed0"], moments_of(runs["cat"]), 1), 2) == (
        "study-quick-pissa-seed0-step-000002"
    )
