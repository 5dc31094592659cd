"""The real models by number: parameters, layers and adapter sizes of the published layouts, built without weights."""

from collections import Counter

import pytest
import torch
from typer.testing import CliRunner

from t2ilib.adapters.attach import attach_adapters
from t2ilib.adapters.spec import adapter_table
from t2ilib.cli import app
from t2ilib.config import AdapterSpec, ConfigError, ModelConfig
from t2ilib.models.files.layouts import build_layout, is_layout
from t2ilib.models.load import load_base

LAYERS = {
    ("sd15", "attention"): {"unet": 128, "text_encoder": 48},
    ("sd15", "many"): {"unet": 278, "text_encoder": 72},
    ("sdxl", "attention"): {"unet": 560, "text_encoder": 44, "text_encoder_2": 128},
    ("sdxl", "many"): {"unet": 788, "text_encoder": 66, "text_encoder_2": 192},
}
"""SDXL reads the first text encoder's penultimate layer, so its last layer's projections are left out."""

RANK_4 = {
    ("sd15", "attention", "lora"): {"unet": 797_184, "text_encoder": 294_912},
    ("sd15", "attention", "dora"): {"unet": 897_024, "text_encoder": 331_776},
    ("sd15", "many", "lora"): {"unet": 4_203_264, "text_encoder": 663_552},
    ("sd15", "many", "dora"): {"unet": 4_518_784, "text_encoder": 746_496},
    ("sdxl", "attention", "lora"): {"unet": 5_806_080, "text_encoder": 270_336, "text_encoder_2": 1_310_720},
    ("sdxl", "attention", "dora"): {"unet": 6_471_680, "text_encoder": 304_128, "text_encoder_2": 1_474_560},
    ("sdxl", "many", "lora"): {"unet": 12_296_960, "text_encoder": 608_256, "text_encoder_2": 2_949_120},
    ("sdxl", "many", "dora"): {"unet": 13_785_920, "text_encoder": 684_288, "text_encoder_2": 3_317_760},
}


@pytest.fixture(scope="module")
def layouts():
    return {name: build_layout(name) for name in ("sd15", "sdxl")}


def test_have_the_published_numbers_of_parameters(layouts) -> None:
    def count(module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(layouts["sd15"].unet) == 859_520_964
    assert count(layouts["sdxl"].unet) == 2_567_463_684
    assert {count(layout.vae) for layout in layouts.values()} == {83_653_863}
    assert {count(layout.text_encoders["text_encoder"]) for layout in layouts.values()} == {123_060_480}
    assert count(layouts["sdxl"].text_encoders["text_encoder_2"]) == 694_659_840
    assert {p.device.type for layout in layouts.values() for p in layout.unet.parameters()} == {"meta"}


@pytest.mark.parametrize(("name", "targets", "kind"), RANK_4)
def test_adapters_on_them_have_the_known_sizes(layouts, name: str, targets: str, kind: str) -> None:
    rows = adapter_table(layouts[name], AdapterSpec(kind=kind, rank=4, targets=targets, text_encoder_targets=targets))
    layers, parameters = Counter(), Counter()
    for row in rows:
        layers[row.component] += 1
        parameters[row.component] += row.parameters
    assert dict(layers) == LAYERS[name, targets]
    assert dict(parameters) == RANK_4[name, targets, kind]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_table_is_what_peft_attaches(kind: str, quantization: str) -> None:
    spec = AdapterSpec(kind=kind, rank=3, targets="many", text_encoder_targets="many")
    components = load_base(ModelConfig(base="tiny-sdxl", quantization=quantization), torch.device("cpu"))
    rows = adapter_table(components, spec)
    assert {row.layer for row in rows} == {"linear", "convolution"}
    attach_adapters(components, spec, seed=0)
    for row in rows:
        layer = components.modules()[row.component].get_submodule(row.module)
        assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == row.parameters, row.module


def test_a_layout_is_told_from_a_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_layout("sdxl")
    assert not is_layout("tiny-sdxl")
    (tmp_path / "sdxl").mkdir()
    with pytest.raises(ConfigError, match=r"write \./sdxl for the folder"):
        is_layout("sdxl")
    with pytest.raises(ConfigError, match="layout 'sdlx' does not exist; choose from sd15, sdxl"):
        build_layout("sdlx")


def test_the_command_lists_modules_and_totals() -> None:
    result = CliRunner().invoke(app, ["adapters", "sdxl", "--rank", "4", "--targets", "to_q", "--targets", "to_k"])
    assert result.exit_code == 0, result.output
    assert "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k" in result.output
    assert "640 x 2048" in result.output
    assert "unet: 280 layers" in result.output
    assert "on a base of 2,567,463,684" in result.output
    assert "text_encoder: 0 layers, 0 parameters on a base of 123,060,480" in result.output
    wrong = CliRunner().invoke(app, ["adapters", "sd15", "--targets", "atention"])
    assert wrong.exit_code == 2
    assert "Did you mean 'attention'" in wrong.output
