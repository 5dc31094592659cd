"""Quality by the number of sampling steps: the pictures of a plain pipeline at each, judged as all are, for a base that trains nothing too."""

import json
from pathlib import Path

import pytest

from t2ilib.config import ConfigError, EvaluationConfig
from t2ilib.evaluation import clip
from t2ilib.evaluation.measures import measure
from t2ilib.evaluation.metrics import DECLARATIONS
from t2ilib.evaluation.rows import read_rows
from t2ilib.evaluation.sampling import draw
from t2ilib.models.load import load_base
from t2ilib.runfile import build_run
from t2ilib.shapes import checker
from t2ilib.shapes.world import caption

COUNTS = (1, 3)


def run_of(folder: Path, **sections):
    evaluation = {"num_inference_steps": 2, "guidance_scale": 2.0, "step_counts": COUNTS, "measures": ["step_counts"]}
    return build_run({"output": str(folder), "training": {"trains": "nothing", "steps": 0}, "evaluation": evaluation | sections.pop("evaluation", {}), **sections})  # fmt: skip


def settings_of(count: int) -> EvaluationConfig:
    return EvaluationConfig(num_inference_steps=count, guidance_scale=2.0)


@pytest.fixture(scope="module")
def components():
    return load_base(build_run({"adapter": {}}).model)


def test_the_checker_judges_pictures_of_each_number_of_steps(components, tmp_path):
    folder = tmp_path / "steps-quick" / "base" / "seed0"
    run = run_of(folder, data={"source": "shapes"}, shapes={"scenes": ["base", "heart"], "checked_prompts": 4})
    folder.mkdir(parents=True)
    found = measure(run, components)
    group, scenes = next(iter(checker.checked_scenes(run).items()))
    assert group == "concept"
    rows = [row for row in read_rows(folder) if row.group == group]
    for count in COUNTS:
        pictures = draw(components, [caption(scene) for scene in scenes], settings_of(count), resolution=64)
        right = checker.checked(group, scenes, pictures)[f"{group}/all"]
        assert [row.values[f"steps/{count}/all"] for row in rows] == right
        assert found[f"steps/{count}/all"] == pytest.approx(sum(right) / len(right))
        assert found[f"steps/{count}/seconds"] > 0
    assert found["steps/1/seconds"] < found["steps/3/seconds"]
    assert not any(name.startswith("steps/") for row in read_rows(folder) if row.group != group for name in row.values)
    about = json.loads((folder / DECLARATIONS).read_text())["steps/3/all"]
    assert (about["title"], about["table"]) == ("all right, steps: 3", "Sampling steps")


def test_elsewhere_it_is_the_clip_score(components, tmp_path):
    prompts = ["a red circle", "a large blue square"]
    found = measure(run_of(tmp_path, evaluation={"prompts": prompts}), components)
    model, tokenizer = clip.load_clip(run_of(tmp_path), components.device)
    for count in COUNTS:
        pictures = draw(components, prompts, settings_of(count), resolution=64)
        scores = clip.clip_scores(model, tokenizer, pictures, prompts)
        assert found[f"steps/{count}/clip_score"] == pytest.approx(sum(scores) / 2, abs=0.05)
    assert "steps/1/all" not in found


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"measures": ["clip"]}, "measures does not name it"),
        ({"step_counts": [2, 2]}, "a number twice"),
        ({"step_counts": [0]}, "greater than or equal to 1"),
    ],
)
def test_numbers_of_steps_that_cannot_be_are_refused(evaluation, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run_of(tmp_path, evaluation=evaluation)


def test_a_distilled_run_asks_for_no_more_steps_than_it_was_taught():
    values = {"adapter": {}, "objective": {"consistency": {"solver_steps": 10}}}
    with pytest.raises(ConfigError, match=r"evaluation\.step_counts 20 is more"):
        build_run(values | {"evaluation": {"step_counts": [1, 20]}})
