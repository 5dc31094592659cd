import re

import pytest
import torch
from adapting import CAPTIONS
from torch import nn

from t2ilib.adapters.attach import attach_adapters
from t2ilib.adapters.spec import TARGETS, adapter_table, match_modules, resolve_targets
from t2ilib.config import AdapterSpec, ConfigError


def count(model, *endings):
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return sum(any(re.search(rf"(^|\.){re.escape(ending)}$", name) for ending in endings) for name in layers)


def test_attention_means_four_projections_of_every_attention(make):
    components = make()
    blocks = sum(type(module).__name__ == "Attention" for module in components.unet.modules())
    assert blocks == 14  # two down, four up and the mid transformer, with self- and cross-attention each
    names = match_modules(components.unet, "unet", "attention")
    assert len(names) == len(set(names)) == 4 * blocks
    assert all(re.search(r"attn[12]\.(to_[qkv]|to_out\.0)$", name) for name in names)


def test_many_means_nearly_every_layer(make):
    unet = make().unet
    layers = {name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    left_out = layers - set(match_modules(unet, "unet", "many"))
    assert left_out == {
        "conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2",
        "add_embedding.linear_1", "add_embedding.linear_2",
    }  # fmt: skip


def test_lists_and_patterns(make):
    unet = make().unet
    assert len(match_modules(unet, "unet", ("to_q", "conv1"))) == count(unet, "to_q", "conv1") > count(unet, "to_q") > 0
    assert match_modules(unet, "unet", ("mid_block.resnets.0.conv1",)) == ["mid_block.resnets.0.conv1"]
    mid = match_modules(unet, "unet", r"mid_block\..*attn2\.to_[kv]")
    assert sorted(name.rsplit(".", 1)[1] for name in mid) == ["to_k", "to_v"]
    assert len(match_modules(unet, "unet", "to_q")) == count(unet, "to_q")
    # an ending is a whole name: to_q is not the end of xto_q, conv1 not of myconv1
    net = nn.ModuleDict({"xto_q": nn.Linear(2, 2), "to_q": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})
    assert match_modules(net, "unet", ("to_q",)) == ["to_q"]


def test_targets_of_text_encoders(make):
    components = make()
    for encoder in components.text_encoders.values():
        layers = encoder.config.num_hidden_layers
        assert len(match_modules(encoder, "text_encoder", "attention")) == 4 * layers
        assert len(match_modules(encoder, "text_encoder", "many")) == 6 * layers


def test_layers_that_have_no_effect_are_left_out(make):
    """SDXL reads the penultimate hidden state: the first encoder's last layer never gets a gradient. Autograd is asked."""
    components = make()
    with torch.no_grad():
        expected = {name: values.clone() for name, values in components.encode_text(CAPTIONS).items()}
    for encoder in components.text_encoders.values():
        encoder.requires_grad_(True)
    conditioning = components.encode_text(CAPTIONS)
    sum(values.square().sum() for values in conditioning.values()).backward()
    useful = {
        name: {
            n
            for n, m in encoder.named_modules()
            if isinstance(m, nn.Linear) and m.weight.grad is not None and bool(m.weight.grad.any())
        }
        for name, encoder in components.text_encoders.items()
    }
    resolved = resolve_targets(components, AdapterSpec(text_encoder_targets="many"))
    assert set(resolved["text_encoder"]) == useful["text_encoder"]
    assert set(resolved["text_encoder_2"]) == useful["text_encoder_2"] - {"text_projection"}
    assert len(resolved["text_encoder"]) == 12
    assert len(resolved["text_encoder_2"]) == 18
    assert {name: values.shape for name, values in expected.items()} == {
        name: values.shape for name, values in conditioning.items()
    }


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("atention", r"'atention' does not exist; choose from attention, many\. Did you mean 'attention'"),
        ("to_z", r"'to_z' does not exist"),
        (("to_q", "to_z"), r"to_z matches no layer of unet; it has .*to_q \(14\)"),
        (("o_q",), r"o_q matches no layer"),
        (r"up_blocks\.7\..*", r"matches no layer of unet; it has .*to_q \(14\)"),
        ("mid_block.(", r"not a regular expression"),
    ],
)
def test_targets_that_match_nothing(make, target, told):
    with pytest.raises(ConfigError, match=told):
        attach_adapters(make(), AdapterSpec(targets=target), 0)


def test_text_targets_that_match_nothing_name_the_encoder(make):
    with pytest.raises(ConfigError, match="to_q matches no layer of text_encoder"):
        resolve_targets(make(), AdapterSpec(text_encoder_targets=("to_q",)))


def test_every_ending_of_a_named_target_is_used_by_the_tiny_model(make):
    components = make()
    assert all(count(components.unet, ending) for endings in TARGETS.values() for ending in endings["unet"])
    assert all(
        count(e, ending) for e in components.text_encoders.values() for t in TARGETS.values() for ending in t["text"]
    )


def test_patterns_give_layers_their_own_size(make):
    """peft's own layers are asked for their rank and scale."""
    spec = AdapterSpec(
        rank=4, alpha=4.0, targets="many", ranks={"conv1": 2, r"mid_block\..*": 6}, alphas={"to_q": 12.0}, exclude=("ff.net.2",)
    )  # fmt: skip
    components = make()
    rows = {(row.component, row.module): row for row in adapter_table(components, spec)}
    attach_adapters(components, spec, 0)
    layers = {name: layer for name, layer in components.unet.named_modules() if hasattr(layer, "lora_A")}
    assert set(layers) == {module for _, module in rows}
    assert not any(name.endswith("ff.net.2") for name in layers)
    for name, layer in layers.items():
        rank = 2 if name.endswith("conv1") else 6 if name.startswith("mid_block") else 4
        alpha = 12.0 if name.endswith("to_q") else 4.0
        assert layer.r["default"] == rank == rows["unet", name].rank
        assert layer.scaling["default"] == pytest.approx(alpha / rank)
    trained = sum(p.numel() for p in components.unet.parameters() if p.requires_grad)
    assert trained == sum(row.parameters for row in rows.values())


def test_text_encoders_have_their_own_size(make):
    components = make()
    spec = AdapterSpec(rank=4, text_encoder_targets="attention", text_encoder_rank=2, text_encoder_alpha=1.0)
    attach_adapters(components, spec, 0)
    for name, module in components.modules().items():
        found = {(m.r["default"], m.scaling["default"]) for m in module.modules() if hasattr(m, "lora_A")}
        assert found == ({(4, 2.0)} if name == "unet" else {(2, 0.5)})
    with pytest.raises(ValueError, match="need text_encoder_targets"):
        AdapterSpec(text_encoder_rank=2)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"exclude": ("conv1",)}, "adapter.exclude conv1 matches none of the adapted layers; they are to_q"),
        ({"ranks": {"ff.net.2": 2}}, r"adapter.ranks ff\.net\.2 matches none"),
        ({"alphas": {"to_(": 2.0}}, "is not a regular expression"),
        ({"exclude": (".*",)}, "leaves no layer of unet"),
    ],
)
def test_patterns_that_match_nothing(make, fields, told):
    with pytest.raises(ConfigError, match=told):
        attach_adapters(make(), AdapterSpec(**fields), 0)


def test_rank_stabilized_divides_by_the_root(make):
    components = make()
    attach_adapters(components, AdapterSpec(rank=16, alpha=8.0, rank_stabilized=True), 0)
    scales = {m.scaling["default"] for m in components.unet.modules() if hasattr(m, "lora_A")}
    assert scales == {8.0 / 4}  # arXiv 2312.03732: alpha / sqrt(r)
