"""Between the page's fields and settings: nothing is lost on the way, and mistakes are in the page's words."""

import pytest
from PIL import Image

from t2ilib.app.asking import ADAPTERS, NAMES, SLOTS, changed_files, form_of, prompts_of, settings_of, take_settings
from t2ilib.app.visitors import Visitor
from t2ilib.app.wording import told_error
from t2ilib.config import ConfigError, ModelConfig
from t2ilib.drawing.desk import Picture
from t2ilib.drawing.pngtext import read_picture, texts_of
from t2ilib.drawing.settings import DrawSettings, build_settings
from t2ilib.evaluation.sampling import save_png

RICH = build_settings(
    {
        "prompt": "a red heart\nand <b>a square</b>",
        "negative_prompt": "blurry",
        "seed": 2**62 + 1,
        "first": 3,
        "num_pictures": 2,
        "num_inference_steps": 7,
        "guidance_scale": 2.5,
        "width": 96,
        "height": 64,
        "sampler": "DPM++ 2M Karras",
        "vae_tiling": True,
        "model": {"base": "tiny-sd15", "vae": "tiny-sdxl", "quantization": "nf4", "clip_skip": 1, "dtype": "float32"},
        "adapters": [
            {"path": "results/cat", "strength": -0.25, "partial": True, "digest": "0123456789ab"},
            {"path": "results/my dog", "step": 500, "strength": 3.5, "partial": True},
        ],
        "embeddings": ["words/cat.safetensors", "words/dog.safetensors"],
    }
)


def visitor(**more):
    return Visitor(ModelConfig(), **more)


def saved(settings, path, texts=None):
    save_png(Image.new("RGB", (8, 8)), path, texts or texts_of(settings, "DDIM", (64, 64)))
    return path


def test_every_field_of_settings_comes_back_from_the_page(tmp_path):
    """By way of the picture's file, as somebody who drops it."""
    there = visitor()
    form, notes = take_settings(read_picture(saved(RICH, tmp_path / "a.png")), there)
    assert notes == []
    assert form.keys() == set(NAMES)
    assert settings_of(form, there) == RICH
    unlike = [name for name in DrawSettings.model_fields if getattr(RICH, name) == getattr(DrawSettings(), name)]
    assert unlike == [], "settings that would come back by chance"


def test_what_the_page_does_not_show_goes_with_what_it_belongs_to(tmp_path):
    there = visitor()
    form, _ = take_settings(read_picture(saved(RICH, tmp_path / "a.png")), there)
    another = settings_of(form | {"base": "tiny-sdxl"}, there)
    assert (another.model.base, another.model.vae) == ("tiny-sdxl", None)
    assert settings_of(form | {ADAPTERS[0]: "results/bird"}, there).adapters[0].digest is None
    assert settings_of(form | {ADAPTERS[0]: ""}, there).adapters == RICH.adapters[1:]


def test_a_new_page_asks_for_the_defaults():
    assert settings_of(form_of(DrawSettings()), visitor()) == DrawSettings()


def test_random_takes_any_seed():
    form = form_of(DrawSettings(seed=5)) | {"random": True}
    seeds = {settings_of(form, visitor()).seed for _ in range(4)}
    assert len(seeds) == 4
    assert 5 not in seeds


def test_mistakes_are_told_together_in_the_pages_words():
    form = form_of(DrawSettings()) | {
        "seed": "many",
        "num_inference_steps": 0,
        "num_pictures": None,
        "width": "wide",
        "sampler": "Eulr",
        ADAPTERS[0]: "x",
        "strength0": 200,
    }
    with pytest.raises(ConfigError) as found:
        settings_of(form, visitor())
    told = told_error(found.value)
    assert "6 mistakes in the settings" in told
    for label in ("Seed: ", "Steps: ", "Pictures: ", "Width: ", "Sampler: ", "Adapter 1, strength: "):
        assert f"<br>{label}" in told
    assert "num_inference" not in told


def test_an_empty_base_is_told():
    with pytest.raises(ConfigError, match="Base model is empty"):
        settings_of(form_of(DrawSettings()) | {"base": None}, visitor())


def test_a1111s_text_fills_what_it_says_and_leaves_the_base(tmp_path):
    text = "a heart <lora:ink:1>\nNegative prompt: red\nSteps: 9, Sampler: Euler a, CFG scale: 2, Seed: 5, Size: 96x64, Model: other, Clip skip: 2, ENSD: 1"
    there = Visitor(ModelConfig(base="tiny-sd15"))
    form, notes = take_settings(read_picture(saved(None, tmp_path / "a.png", {"parameters": text})), there)
    settings = settings_of(form, there)
    assert (settings.prompt, settings.negative_prompt, settings.seed, settings.sampler) == (
        "a heart",
        "red",
        5,
        "Euler a",
    )
    assert (settings.num_inference_steps, settings.guidance_scale, settings.width, settings.height) == (9, 2.0, 96, 64)
    assert (settings.model.base, settings.model.clip_skip) == ("tiny-sd15", 1)
    assert any("adapter 'ink'" in note for note in notes)
    assert "nothing here has Model, ENSD" in notes


def test_more_adapters_than_there_is_room_for_change_nothing(tmp_path):
    many = build_settings({"adapters": [{"path": f"a{i}"} for i in range(SLOTS + 1)]})
    there = visitor()
    with pytest.raises(ConfigError, match=rf"with {SLOTS + 1} adapters, and the page has room for {SLOTS}"):
        take_settings(read_picture(saved(many, tmp_path / "a.png")), there)
    assert there.restored == ()


def test_an_adapters_file_that_has_changed_is_told():
    now = RICH.changed(adapters=[{"path": "results/cat", "digest": "ffffffffffff"}, {"path": "results/my dog"}])
    drawn = Picture(Image.new("RGB", (8, 8)), now, "DDIM", (8, 8))
    (sentence,) = changed_files(RICH.adapters, drawn)
    assert sentence.startswith("results/cat is another file now")
    assert changed_files(now.adapters, drawn) == []


def test_prompts_stand_one_a_line_with_noise_of_their_own():
    settings = DrawSettings(prompt="mine", num_pictures=3, first=2)
    assert [(one.prompt, one.first) for one in prompts_of(" a \n\nb\n", settings)] == [("a", 2), ("b", 5)]
    assert prompts_of(" \n", settings) == [settings]
