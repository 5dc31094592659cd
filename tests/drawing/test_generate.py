"""`t2ilib generate`: what the functions below it draw, by options; what it could do before, test_end_to_end and others show."""

import json

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from typer.testing import CliRunner

from t2ilib.cli import app
from t2ilib.drawing.desk import Desk
from t2ilib.drawing.pngtext import read_picture
from t2ilib.drawing.settings import build_settings
from t2ilib.evaluation.sampling import save_png
from t2ilib.tracking.models import MODEL_TAG, register_version
from t2ilib.tracking.store import tracking_uri

BRIEF = ("--steps", "2", "--guidance", "2")


def run(*words, out=None, code=0):
    done = CliRunner().invoke(app, ["-q", "generate", *map(str, words), *(("--out", str(out)) if out else ())])
    assert done.exit_code == code, done.output
    return done.output


def apart(one, other):
    return abs(np.asarray(one, int) - np.asarray(other, int)).max()


@pytest.fixture(scope="module")
def desk(results):
    return Desk(results, device=torch.device("cpu"))


def test_every_option_reaches_the_picture_and_its_file(results, tmp_path, desk):
    words = ("--prompt", "a heart", "--prompt", "a square", "--negative-prompt", "red", "--number", "2", "--seed", "7")
    words += ("--sampler", "euler A", "--width", "96", "--height", "64", "--adapter", results / "cat", "--scale", "0.5")
    told = run(*words, *BRIEF, "--beside-base", out=tmp_path)
    assert told.endswith(f"4 picture(s) in {tmp_path}\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        f"0{i}{end}.png" for i in range(4) for end in ("", "-base")
    )
    expected = build_settings(
        {
            "prompt": "a heart",
            "negative_prompt": "red",
            "num_pictures": 2,
            "seed": 7,
            "sampler": "Euler a",
            "width": 96,
            "height": 64,
            "num_inference_steps": 2,
            "guidance_scale": 2,
            "adapters": [{"path": str(results / "cat"), "strength": 0.5}],
        }
    )
    wanted = desk.draw([expected, expected.changed(prompt="a square", first=2)], beside_base=True).pictures
    for number, picture in enumerate(wanted):
        file = tmp_path / f"0{number}.png"
        assert apart(Image.open(file), picture.image) <= 1
        assert apart(Image.open(tmp_path / f"0{number}-base.png"), picture.base) <= 1
        assert read_picture(file).settings == picture.settings


def test_a_picture_like_another(results, tmp_path, desk):
    (first,) = desk.draw(
        build_settings(
            {
                "prompt": "a heart",
                "seed": 3,
                "num_inference_steps": 2,
                "adapters": [{"path": str(results / "words"), "step": 1}],
            }
            | {"model": {"base": "tiny-sd15"}, "sampler": "UniPC", "first": 4}
        )
    ).pictures
    path = first.save(tmp_path)
    run("--like", path, out=tmp_path)
    assert apart(Image.open(tmp_path / "01.png"), first.image) == 0
    assert read_picture(tmp_path / "01.png").settings == first.settings
    run("--like", path, "--seed", "4", "--scale", "0", "--quantization", "nf4", out=tmp_path)
    changed = read_picture(tmp_path / "02.png").settings
    assert (changed.seed, changed.first, changed.adapters[0].strength) == (4, 4, 0.0)
    assert (changed.model.base, changed.model.quantization) == ("tiny-sd15", "nf4")


def test_a_picture_like_one_of_a1111s_tells_what_it_could_not_take(tmp_path):
    text = "a heart <lora:ink:1>\nSteps: 2, Sampler: DPM adaptive, CFG scale: 2, Seed: 5, Size: 64x64, Model: tiny-sd15, ENSD: 1"
    save_png(Image.new("RGB", (4, 4)), tmp_path / "theirs.png", {"parameters": text})
    told = run("--like", tmp_path / "theirs.png", out=tmp_path / "out")
    assert "theirs.png: sampler 'DPM adaptive' is not known here: the base's own is taken" in told
    assert "theirs.png: adapter 'ink' of strength 1 is left out" in told
    assert "theirs.png: nothing here has Sampler, ENSD" in told
    settings = read_picture(tmp_path / "out" / "00.png").settings
    assert (settings.prompt, settings.seed, settings.model.base) == ("a heart", 5, "tiny-sd15")


def test_a_random_seed_is_told(tmp_path):
    told = run("--prompt", "x", "--seed", "random", *BRIEF, out=tmp_path)
    seed = int(told.splitlines()[0].removeprefix("seed "))
    assert read_picture(tmp_path / "00.png").settings.seed == seed


def test_a_grid_and_the_registrys_adapter_go_to_mlflow(results, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    client = MlflowClient(tracking_uri(None, results))
    (trained,) = client.search_runs([client.get_experiment_by_name("toys").experiment_id])
    register_version(client, "gen-full", trained.data.tags[MODEL_TAG], trained.info.run_id, "champion", {})
    words = (
        "--prompt",
        "a heart",
        "--adapter",
        "models:/gen-full@champion",
        "--results",
        results,
        "--experiment",
        "looked",
    )
    told = run(*words, *BRIEF, "--x", "strength: 0-1 [2]", "--y", "seed: 1, 2", out=tmp_path)
    assert told.endswith(f"1 picture(s) in {tmp_path}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["grid-00.png"]
    restored = read_picture(tmp_path / "grid-00.png")
    assert restored.grid == {"x": "strength: 0-1 [2]", "y": "seed: 1, 2"}
    assert restored.settings.adapters[0].path == "models:/gen-full@champion"
    run("--like", tmp_path / "grid-00.png", "--results", results, out=tmp_path)
    sheets = [Image.open(tmp_path / f"grid-0{number}.png") for number in range(2)]
    assert apart(*sheets) == 0, "a sheet can be drawn again"
    (logged,) = client.search_runs([client.get_experiment_by_name("looked").experiment_id])
    assert [item.path for item in client.list_artifacts(logged.info.run_id, "drawn")] == ["drawn/grid-00.png"]
    assert logged.data.params["prompt"] == "a heart"
    assert json.loads(logged.data.params["seed"]) == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "there is nothing to draw: give --prompt, or --like with a picture"),
        (("--prompt", "x", "--scale", "1"), "--checkpoint, --scale and --partial are about an adapter"),
        (
            ("--prompt", "x", "--adapter", "a", "--adapter", "b", "--checkpoint", "1"),
            "--checkpoint goes with one --adapter",
        ),
        (("--prompt", "x", "--adapter", "a", "--scale", "1", "--scale", "2"), "1 adapters and 2 scales"),
        (("--prompt", "x", "--seed", "many"), "seed: Input should be a valid integer"),
        (("--prompt", "x", "--steps", "0", "--sampler", "Eulr"), "2 mistakes in the command"),
        (("--prompt", "x", "--quantization", "nf5"), "model.quantization: 'nf5' does not exist"),
        (("--prompt", "x", "--x", "seed"), "axis 'seed': write what changes"),
        (("--prompt", "x", "--prompt", "y", "--x", "seed: 1"), "a grid has one --prompt"),
        (("--prompt", "x", "--number", "2", "--x", "seed: 1"), "a cell of a grid has one picture"),
        (("--prompt", "x", "--beside-base", "--x", "seed: 1"), "--beside-base goes with single pictures"),
        (("--like", "nowhere.png"), "nowhere.png does not exist"),
        (("--prompt", "x", "--adapter", "nowhere"), "no adapter at nowhere"),
    ],
)
def test_mistakes_are_one_message(words, told):
    assert told in run(*words, code=2)
