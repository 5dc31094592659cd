"""From a study file, or a run's folder, to the page about its checkpoints and to a ballot: really trained, measured and drawn, and only once."""

import json
import shutil

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from t2ilib.cli import app
from t2ilib.config import ConfigError
from t2ilib.drawing.desk import Desk
from t2ilib.drawing.kept import draw_kept
from t2ilib.drawing.settings import settings_of_run
from t2ilib.evaluation.measures import measure
from t2ilib.report.balloting import make_ballot
from t2ilib.report.keeping import Asked, choose_of_run, choose_of_study
from t2ilib.runfile import load_run
from t2ilib.studies.file import load_study
from t2ilib.studies.runs import plan_runs
from t2ilib.training.loop import train

STUDY = {
    "name": "toy",
    "question": "When to stop?",
    "reference": "lora",
    "base": "base",
    "run": {
        "data": {"source": "shapes"},
        "shapes": {"scenes": ["heart"], "num_pictures": 8, "checked_prompts": 3},
        "adapter": {"rank": 2},
        "training": {"steps": 2, "batch_size": 2, "checkpoint_every": 1, "keep_checkpoints": 1, "keep_adapters": "all"},
        "evaluation": {"validate_every": 1, "sample_every": 0, "validation_timesteps": 1, "validation_pictures": 3, "num_inference_steps": 1},
    },
    "presets": {"quick": {"seeds": [0, 1]}},
    "variants": {
        "base": {"title": "Untouched", "run": {"adapter": None, "training": {"trains": "nothing", "steps": 0}}},
        "lora": {"title": "LoRA"},
        "forgetful": {"title": "Keeps nothing", "run": {"training": {"steps": 1, "batch_size": 2, "keep_adapters": "last"}}},
    },
}  # fmt: skip
FEW = Asked(strengths=(1.0,), noises=(3,))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """LoRA finished with both seeds, another variant with one, whose checkpoints were deleted."""
    place = tmp_path_factory.mktemp("study")
    file, results = place / "toy.yaml", place / "results"
    file.write_text(yaml.safe_dump(STUDY, sort_keys=False))
    for run in plan_runs(load_study(file), file, "quick", results):
        if run.variant == "lora" or run.label == "forgetful seed 0":
            trained = train(run.config())
            metrics = measure(run.config(), trained.components, metrics=trained.metrics)
            told = {"digest": run.digest, "run": run.settings, "metrics": metrics}
            (run.folder / "result.json").write_text(json.dumps(told))
            if run.variant == "forgetful":
                shutil.rmtree(run.folder / "checkpoints")
    return file, results


def test_a_study_becomes_one_page_and_a_second_call_does_nothing_twice(study):
    file, results = study
    said = []
    kept = choose_of_study(file, "quick", [], [], FEW, results, said.append)
    folder = results / "toy-quick"
    assert (kept.page, kept.numbers) == (folder / "checkpoints.html", folder / "checkpoints.json")
    assert [own.name for own in kept.variants] == ["lora"]
    assert kept.variants[0].steps == (0, 1, 2)
    assert kept.variants[0].seeds == (0, 1)
    assert kept.left_out["forgetful seed 1"] == "it is new"
    assert "kept no checkpoint to choose from" in kept.left_out["forgetful"]
    assert "base" not in kept.left_out, "it is the column without an adapter"
    numbers = json.loads(kept.numbers.read_text())
    assert numbers["variants"]["lora"]["recommended"] in (1, 2)
    assert "keep_adapters" in kept.page.read_text()
    assert sum("step 1" in line and "held-out" not in line for line in said) == 2, "once for each run"
    before = {path: path.stat().st_mtime_ns for path in (folder / "drawn").iterdir()}
    assert len(before) == 6, "two prompts; the base and two steps"
    again = []
    assert choose_of_study(file, "quick", [], [], FEW, results, again.append).numbers.read_text() == json.dumps(
        numbers, indent=1
    )
    assert again == []
    assert {path: path.stat().st_mtime_ns for path in (folder / "drawn").iterdir()} == before
    with pytest.raises(ConfigError, match="no checkpoint can be chosen"):
        choose_of_study(file, "quick", ["forgetful"], [0], FEW, results, said.append)


def test_a_run_alone_has_a_page_too(study, tmp_path):
    run = shutil.copytree(study[1] / "toy-quick" / "lora" / "seed0", tmp_path / "moved", copy_function=shutil.copy2)
    kept = choose_of_run(run, Asked(steps=(2,), grids=False), tmp_path, print)
    assert kept.page == run / "checkpoints.html"
    assert kept.variants[0].choice.candidates == (2,)
    assert "It is the only checkpoint" in kept.page.read_text()
    with pytest.raises(ConfigError, match="neither a study file nor the folder of a run"):
        choose_of_run(tmp_path, FEW, tmp_path, print)


def test_the_command_tells_what_to_keep(study):
    file, results = study
    words = ["study", "checkpoints", str(file), "--results", str(results), "--strengths", "1", "--noises", "3"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "lora: keep step" in done.output
    assert "left out: forgetful seed 1: it is new" in done.output
    wrong = CliRunner().invoke(app, [*words[:-1], "one"])
    assert wrong.exit_code == 2


def test_pictures_are_drawn_once_and_say_nothing_of_how(study, tmp_path):
    folder = study[1] / "toy-quick" / "lora" / "seed0"
    plain = settings_of_run(load_run(folder / "run.yaml")).changed(prompt="a red heart")
    asked = [
        plain.changed(adapters=[{"path": str(folder), "step": step, "strength": strength}], seed=seed)
        for step, strength, seed in ((1, 1, 0), (2, 1, 0), (1, 0.5, 0), (1, 1, 7), (1, 1, 0))
    ]
    desk, said = Desk(tmp_path), []
    files = draw_kept(desk, [plain, *asked], tmp_path / "kept", said.append)
    assert files[1] == files[5]
    assert len(set(files)) == 5
    assert said[-1].endswith("5 of 5 pictures drawn")
    drawn = [picture.image for picture in desk.draw([plain, *asked]).pictures]
    for file, image in zip(files, drawn, strict=True):
        with Image.open(file) as kept:
            assert kept.info == {}
            assert max(abs(a - b) for a, b in zip(kept.tobytes(), image.tobytes(), strict=True)) <= 1
    said.clear()
    assert draw_kept(desk, asked, tmp_path / "kept", said.append) == files[1:]
    assert said == []


def test_a_ballot_between_an_end_and_a_checkpoint_is_drawn(study):
    file, results = study
    page, ballot = make_ballot(file, "quick", ["lora", "lora@1"], 3, results)
    assert ballot.names == ("lora", "lora@1")
    assert len(ballot.pairs()) == 3
    assert page.read_text(encoding="utf-8").count("data:image/png") == 6 + 1, "and what the page's script looks for"
    steps = [variant.settings.adapters[0].step for variant in ballot.variants]
    assert steps == [None, 1]
