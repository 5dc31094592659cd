"""DrawSettings: whole on the way through JSON, wrong values told by field, a picture apart from others."""

import pytest

from t2ilib.config import ConfigError
from t2ilib.drawing.settings import DrawSettings, build_settings, require_size

EVERYTHING = {
    "prompt": 'a "red" heart,\n猫',
    "negative_prompt": "a square",
    "seed": 7,
    "first": 3,
    "num_pictures": 2,
    "num_inference_steps": 11,
    "guidance_scale": 2.5,
    "width": 96,
    "height": 64,
    "sampler": "DPM++ 2M Karras",
    "vae_tiling": True,
    "model": {"base": "tiny-sd15", "clip_skip": 1, "quantization": "nf4", "quantization_skip": ("conv_in",)},
    "adapters": ({"path": "results/cat", "strength": 0.5, "step": 100}, {"path": "models:/cat-full@champion"}),
    "embeddings": ("cat.safetensors",),
}


def test_all_of_it_goes_through_json():
    settings = build_settings(EVERYTHING)
    told = settings.model_dump(mode="json")
    assert build_settings(told) == settings
    assert DrawSettings.model_validate_json(settings.model_dump_json()) == settings
    assert all(told[name] != DrawSettings.model_fields[name].default for name in EVERYTHING), "a field is not looked at"
    assert set(EVERYTHING) == set(DrawSettings.model_fields)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"num_inference_steps": 10**6}, r"num_inference_steps: .* less than or equal to 1000"),
        ({"width": 10**6, "height": 4}, r"2 mistakes(.|\n)*width: .*4096(.|\n)*height: .*8"),
        ({"sampler": "Eulr a"}, r"sampler: 'Eulr a' does not exist; choose auto, Euler, .*Did you mean 'Euler a'"),
        ({"promt": "x"}, r"promt: no such field. Did you mean 'prompt'"),
        ({"adapters": [{"path": "x", "stength": 1}]}, r"adapters.0.stength: no such field. Did you mean 'strength'"),
        ({"adapters": [{"path": " "}]}, r"adapters.0.path: it is empty"),
        ({"adapters": [{"path": "x", "strength": float("nan")}]}, r"adapters.0.strength"),
        (
            {"guidance_scale": 1, "negative_prompt": "x"},
            r"the picture: negative_prompt is what guidance leads away from",
        ),
        ({"guidance_scale": 0.5}, r"guidance_scale: .*greater than or equal to 1"),
        ({"seed": -1}, r"seed: .*greater than or equal to 0"),
        ({"prompt": "a \ud800"}, r"prompt: character 2 is half a character"),
        ({"model": {"quantization": "nf5"}}, r"model.quantization: 'nf5' does not exist"),
    ],
)
def test_mistakes_are_told_by_field(values, told):
    with pytest.raises(ConfigError, match=told):
        build_settings(values)


def test_changes_are_checked_too():
    settings = build_settings(EVERYTHING)
    assert settings.changed(seed=8) == build_settings(EVERYTHING | {"seed": 8})
    assert settings.changed(sampler="plms").sampler == "PNDM"
    with pytest.raises(ConfigError, match="no such field"):
        settings.changed(sead=1)
    assert settings.without_adapters() == build_settings(EVERYTHING | {"adapters": ()})


def test_each_picture_has_the_noise_of_its_place():
    alone = build_settings(EVERYTHING).pictures()
    assert [(one.seed, one.first, one.num_pictures) for one in alone] == [(7, 3, 1), (7, 4, 1)]
    assert all(one.pictures() == [one] for one in alone)


def test_sides_that_a_base_cannot_draw_are_refused_with_those_nearby():
    require_size(64, 128, 8, "x")
    with pytest.raises(ConfigError, match="height 70 is no multiple of 8, which x draws in: set it to 64 or 72"):
        require_size(64, 70, 8, "x")
    with pytest.raises(ConfigError, match="width 12 is no multiple of 16, which x draws in: set it to 16"):
        require_size(12, 16, 16, "x")
