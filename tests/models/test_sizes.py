"""What a fresh UNet is built as: sizes that are the published and the shipped models', and configs that contradict what is around them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from t2ilib.config import ConfigError
from t2ilib.models.files.layouts import LAYOUTS
from t2ilib.models.files.locate import SHIPPED
from t2ilib.models.sizes import SIZES, Surroundings, block_types, build_unet, read_config, unet_config

AROUND = {
    "tiny-sd15": Surroundings(64, None, 4, 8),
    "tiny-sdxl": Surroundings(192, 128, 4, 8),
    "sd15": Surroundings(768, None, 4, 64),
    "sdxl": Surroundings(2048, 1280, 4, 128),
}
PIXELS = Surroundings(64, None, 3, 32, pixels=True)


def fields(config) -> dict:
    plain = json.loads(json.dumps(dict(config)))
    return {name: value for name, value in plain.items() if not name.startswith("_")}


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_unets_are_the_size_tiny(name: str) -> None:
    with torch.device("meta"):
        built = build_unet("tiny", AROUND[name])
    assert fields(built.config) == fields(json.loads((SHIPPED[name] / "unet" / "config.json").read_text()))


@pytest.mark.parametrize("name", LAYOUTS)
def test_sd15_and_sdxl_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        assert fields(build_unet(name, AROUND[name]).config) == fields(
            UNet2DConditionModel(**LAYOUTS[name]["unet"]).config
        )


@pytest.mark.parametrize(
    ("name", "around"),
    [
        *((name, around) for name in ("tiny", "small") for around in (Surroundings(192, 128, 8, 16), PIXELS)),
        ("base", PIXELS),
        ("sd15", PIXELS),
    ],
)
def test_every_size_serves_latents_and_pixels(name: str, around: Surroundings) -> None:
    with torch.device("meta"):
        unet = build_unet(name, around)
        seen = torch.zeros(2, around.channels, around.side, around.side)
        added = {"text_embeds": torch.zeros(2, around.pooled_width or 0), "time_ids": torch.zeros(2, 6)}
        drawn = unet(
            seen,
            torch.zeros(2),
            encoder_hidden_states=torch.zeros(2, 5, around.text_width),
            added_cond_kwargs=added if around.pooled_width else None,
        ).sample
    assert drawn.shape == seen.shape


def test_attention_is_at_sixteen_places_and_below_and_at_the_deepest_level() -> None:
    assert SIZES.keys() == {"tiny", "small", "base", "sd15", "sdxl"}
    down = {side: block_types(3, side)["down_block_types"] for side in (8, 32, 64, 128)}
    assert [[kind.startswith("Cross") for kind in kinds] for kinds in down.values()] == [
        [True, True, True],
        [False, True, True],
        [False, False, True],
        [False, False, True],
    ]
    kinds = block_types(3, 32)
    assert [kind.startswith("Cross") for kind in kinds["up_block_types"]] == [True, True, False]
    assert unet_config("tiny", PIXELS)["block_out_channels"] == (16, 32, 64, 64)


def refused(config: dict | str, tmp_path: Path, around: Surroundings = AROUND["tiny-sd15"]) -> str:
    name = config
    if isinstance(config, dict):
        name = str(tmp_path / "mine.json")
        Path(name).write_text(json.dumps(config))
    with pytest.raises(ConfigError) as error, torch.device("meta"):
        build_unet(name, around)
    return str(error.value)


def test_a_config_of_ones_own_is_read_from_a_file_a_folder_and_a_pipeline(tmp_path: Path) -> None:
    shutil.copytree(SHIPPED["tiny-sd15"] / "unet", tmp_path / "unet")
    file = shutil.copy(tmp_path / "unet" / "config.json", tmp_path / "my.json")
    whole = unet_config(str(file), AROUND["tiny-sd15"])
    assert whole == unet_config(str(tmp_path / "unet"), AROUND["tiny-sd15"])
    assert whole == unet_config(str(tmp_path), AROUND["tiny-sd15"])
    assert whole["sample_size"] == 8
    file = tmp_path / "few.json"
    file.write_text(json.dumps({"block_out_channels": [32, 64], "layers_per_block": 1}))
    given = unet_config(str(file), Surroundings(192, 128, 4, 16))
    assert given["cross_attention_dim"] == 192
    assert given["projection_class_embeddings_input_dim"] == 6 * 256 + 128
    assert given["sample_size"] == 16


def test_a_config_that_contradicts_what_is_around_it_is_refused_by_name(tmp_path: Path) -> None:
    own = read_config(str(SHIPPED["tiny-sd15"] / "unet"))
    assert "cross_attention_dim 64, and the text encoders ask for 128" in refused(
        own, tmp_path, Surroundings(128, None, 4, 8)
    )
    assert "in_channels 4, and scratch.space and its VAE ask for 3" in refused(
        own, tmp_path, Surroundings(64, None, 3, 32)
    )
    assert "addition_embed_type None, and the text encoders ask for text_time" in refused(
        own, tmp_path, Surroundings(64, 128, 4, 8)
    )
    pooled = read_config(str(SHIPPED["tiny-sdxl"] / "unet"))
    assert "addition_embed_type text_time" in refused(pooled, tmp_path, Surroundings(192, None, 4, 8))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"_class_name": "UNet2DModel"}, "config of a UNet2DModel"),
        ({"block_out_chanels": [32]}, "no UNet2DConditionModel has: block_out_chanels"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"block_out_channels": [32, 64]}, "describes no UNet2DConditionModel"),
        ("smal", "Did you mean 'small'"),
        ("nowhere.json", "there is no such file"),
    ],
)
def test_what_is_no_config_of_a_unet_is_refused(config, said: str, tmp_path: Path) -> None:
    assert said in refused(config, tmp_path)


def test_files_that_hold_no_config_are_refused(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "broken.json").write_text("{")
    assert "not a list" in refused(str(tmp_path / "list.json"), tmp_path)
    assert "cannot be read as JSON" in refused(str(tmp_path / "broken.json"), tmp_path)
    assert "neither config.json nor unet/config.json" in refused(str(tmp_path), tmp_path)
