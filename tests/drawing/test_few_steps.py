"""What was distilled to few steps is drawn so wherever it is loaded, without being told, and otherwise where that is asked for."""

import json
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner

from t2ilib.adapters.detach import detach_adapters, remember
from t2ilib.adapters.export import export_adapter
from t2ilib.adapters.load import DRAWN_BY, FILE_NAME, load_adapter, read_drawn
from t2ilib.cli import app
from t2ilib.config import ConfigError, DrawnBy, EvaluationConfig, ModelConfig
from t2ilib.drawing.desk import Desk
from t2ilib.drawing.pngtext import read_picture
from t2ilib.drawing.settings import build_settings
from t2ilib.evaluation.references import base_pictures
from t2ilib.evaluation.sampling import draw, load_pictures
from t2ilib.hub.card import adapter_card
from t2ilib.models.files.locate import SHIPPED
from t2ilib.models.load import load_base
from t2ilib.runfile import build_run
from t2ilib.seeds import seed_for
from t2ilib.tracking.models import why_unloadable
from t2ilib.training.loop import train

PROMPT = "a large red circle on a white background"
ALONE = """
import json, sys
import numpy as np, torch
from diffusers import DiffusionPipeline, LCMScheduler

job = json.loads(sys.argv[1])
pipe = DiffusionPipeline.from_pretrained(job["base"])
pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
pipe.load_lora_weights(job["file"])
generator = torch.Generator().manual_seed(job["seed"])
picture = pipe(job["prompt"], generator=generator, num_inference_steps=4, guidance_scale=1.0, output_type="np").images[0]
assert "t2ilib" not in sys.modules
np.save(job["out"], picture)
"""


def pixels(picture) -> np.ndarray:
    return np.asarray(picture, int)


def same(one, other) -> bool:
    return abs(pixels(one) - pixels(other)).max() <= 1


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    values = {
        "output": str(tmp_path_factory.mktemp("results") / "fast"),
        "data": {"source": "shapes"},
        "shapes": {"scenes": ["base"], "num_pictures": 4},
        "adapter": {"rank": 2, "alpha": 2.0},
        "objective": {"consistency": {"guidance_scale": [2, 4]}},
        "optimizer": {"learning_rate": 1e-2},
        "training": {"steps": 2, "batch_size": 2},
        "evaluation": {"prompts": [PROMPT], "validate_every": 0, "sample_every": 0, "validation_pictures": 2, "validation_timesteps": 1},
    }  # fmt: skip
    run = build_run(values)
    return run, train(run).components


@pytest.fixture(scope="module")
def sample(distilled):
    """What the run drew last."""
    return load_pictures(distilled[0].output / "samples" / "step-000002")[0]


@pytest.fixture(scope="module")
def desk(distilled):
    return Desk(distilled[0].output.parent, device=torch.device("cpu"))


def asked(run, **values):
    return build_settings({"prompt": PROMPT, "adapters": [{"path": str(run.output)}], **values})


def test_a_run_draws_by_its_sampler_and_its_file_says_so(distilled, sample):
    run, components = distilled
    assert isinstance(components.scheduler, LCMScheduler)
    assert same(draw(components, [PROMPT], run.evaluation, resolution=64)[0], sample)
    with safe_open(run.output / "adapter" / FILE_NAME, "pt") as stored:
        told = stored.metadata()
    expected = {
        "scheduler": "LCMScheduler",
        "num_inference_steps": 4,
        "guidance_scale": 1.0,
        "original_inference_steps": 50,
    }
    assert json.loads(told[DRAWN_BY]) == expected
    assert told["modelspec.usage_hint"] == "LCMScheduler, 4 steps, guidance_scale 1"


def test_diffusers_alone_draws_the_exported_file(distilled, sample, tmp_path):
    run, _ = distilled
    file = export_adapter(run.output, tmp_path / "fast.safetensors", "diffusers")
    job = {"base": str(SHIPPED["tiny-sdxl"]), "file": str(file), "prompt": PROMPT, "seed": seed_for(0, "picture", 0), "out": str(tmp_path / "out.npy")}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", ALONE, json.dumps(job)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert abs(np.load(tmp_path / "out.npy") * 255 - pixels(sample)).max() <= 1.5
    components = load_base(ModelConfig())
    load_adapter(components, file)
    assert components.drawn_by.num_inference_steps == 4, "an exported file says it too"


def test_loaded_anywhere_it_is_drawn_so_and_settings_win(distilled, sample):
    run, _ = distilled
    components = load_base(ModelConfig())
    own, before = components.scheduler, remember(components)
    plain = draw(components, [PROMPT], EvaluationConfig())[0]
    load_adapter(components, run.output)
    assert same(draw(components, [PROMPT], EvaluationConfig())[0], sample)
    two = draw(components, [PROMPT], EvaluationConfig(num_inference_steps=2))[0]
    assert not same(two, sample)
    assert same(draw(components, [PROMPT], EvaluationConfig(num_inference_steps=2, guidance_scale=1))[0], two)
    detach_adapters(components, before)
    assert components.scheduler is own
    assert components.drawn_by is None
    assert (pixels(draw(components, [PROMPT], EvaluationConfig())[0]) == pixels(plain)).all()


def test_a_run_that_trains_nothing_is_measured_with_adapters_that_are_there(distilled, sample, tmp_path):
    run, _ = distilled
    values = run.model_dump(mode="json") | {"output": str(tmp_path / "drawn"), "adapter": None, "objective": {}}
    values["training"] = {"trains": "nothing", "steps": 0}

    def drawn(*adapters):
        evaluation = values["evaluation"] | {"adapters": adapters}
        components = train(build_run(values | {"evaluation": evaluation})).components
        return draw(components, [PROMPT], run.evaluation, resolution=64)[0]

    assert same(drawn({"path": str(run.output)}), sample)
    off = drawn({"path": str(run.output), "strength": 0.0})
    assert not same(off, sample)
    with pytest.raises(ConfigError, match="no adapter at"):
        drawn({"path": str(tmp_path / "nowhere")})
    with pytest.raises(ConfigError, match="adapters that are there already, and this run trains adapter"):
        build_run({"adapter": {}, "evaluation": {"adapters": [{"path": "a"}]}})


def test_the_desk_draws_it_so_and_the_base_beside_it_in_its_own_way(distilled, sample, desk, tmp_path):
    run, _ = distilled
    picture = desk.draw(asked(run), beside_base=True).pictures[0]
    assert same(picture.image, sample)
    assert (picture.sampler, picture.settings.num_inference_steps, picture.settings.guidance_scale) == ("LCM", 4, 1.0)
    path = picture.save(tmp_path)
    assert read_picture(path).settings == picture.settings
    assert same(desk.draw(read_picture(path).settings).pictures[0].image, sample)
    alone = read_picture(path.with_stem(f"{path.stem}-base")).settings
    assert (alone.num_inference_steps, alone.guidance_scale, alone.adapters) == (20, 5.0, ())
    assert same(desk.draw(alone).pictures[0].image, picture.base)
    assert desk.draw(build_settings({"prompt": PROMPT})).pictures[0].sampler == picture.base_sampler != "LCM"


def test_what_is_asked_for_wins(distilled, desk):
    run, _ = distilled
    slow = {"sampler": "Euler", "num_inference_steps": 3, "guidance_scale": 2.0}
    picture = desk.draw(asked(run, **slow)).pictures[0]
    assert picture.settings.model_dump(include=set(slow)) == slow
    assert picture.sampler == "Euler"
    with pytest.raises(ConfigError, match="sampler LCM cannot draw in 51 steps"):
        desk.draw(asked(run, num_inference_steps=51))
    with pytest.raises(ConfigError, match="at guidance_scale 1 there is none"):
        desk.draw(asked(run, negative_prompt="blue"))


def test_the_command_needs_not_be_told(distilled, sample, tmp_path):
    run, _ = distilled
    words = ["-q", "generate", "--prompt", PROMPT, "--adapter", str(run.output), "--out", str(tmp_path)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert same(Image.open(tmp_path / "00.png"), sample)


def test_what_is_held_against_the_base_is_what_the_base_draws_in_its_own_way(distilled, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run, components = distilled
    expected = draw(load_base(ModelConfig()), [PROMPT], EvaluationConfig(), resolution=64)[0]
    assert same(base_pictures(run, components, [PROMPT], {})[0], expected)


def test_merged_it_is_drawn_so_by_default_and_others_are_told_how(distilled, tmp_path, caplog):
    run, _ = distilled
    merged = export_adapter(run.output, tmp_path / "merged", "merged")
    assert json.loads((merged / "scheduler" / "scheduler_config.json").read_text())["_class_name"] == "LCMScheduler"
    assert "another" in why_unloadable(run, str(SHIPPED["tiny-sdxl"]))
    card = adapter_card(run, "me/fast", tmp_path / FILE_NAME, [PROMPT], {})
    assert "LCMScheduler.from_config(pipeline.scheduler.config, original_inference_steps=50)" in card
    assert "num_inference_steps=4, guidance_scale=1.0" in card
    with caplog.at_level(logging.INFO):
        load_adapter(load_base(ModelConfig()), run.output)
    assert "is drawn by LCMScheduler: in 4 steps" in caplog.text


def test_a_way_of_drawing_that_is_not_known_is_an_error(tmp_path):
    known = DrawnBy(scheduler="LCMScheduler", num_inference_steps=2, guidance_scale=1.0)
    assert read_drawn(known.model_dump_json(), tmp_path) == known
    for text in ("{}", "x", json.dumps({**known.model_dump(), "scheduler": "os.system"})):
        with pytest.raises(ConfigError, match="is not known here"):
            read_drawn(text, tmp_path)
