import re

import pytest
import torch
from adapting import CAPTIONS, fit, output_of
from safetensors import safe_open
from torch import nn

from t2ilib.adapters.attach import AdapterError, AdapterProof, attach_adapters, base_digest
from t2ilib.adapters.export import save_adapter
from t2ilib.adapters.load import FILE_NAME, load_adapter
from t2ilib.adapters.spec import TARGETS, match_modules, resolve_targets
from t2ilib.config import AdapterSpec, ConfigError
from t2ilib.models.quantize import quantize


def trainable(components):
    return {
        f"{c}.{n}"
        for c, module in components.modules().items()
        for n, p in module.named_parameters()
        if p.requires_grad
    }


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


def test_without_text_targets_only_the_unet_is_adapted(make):
    assert list(resolve_targets(make(), AdapterSpec())) == ["unet"]


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


def test_only_adapters_train_and_their_number_is_the_closed_form(make):
    components = make()
    adapted = attach_adapters(components, AdapterSpec(rank=3, targets="many", text_encoder_targets="attention"), 0)
    assert set(adapted) == {"unet", "text_encoder", "text_encoder_2"}
    names = trainable(components)
    assert all(re.search(r"lora_[AB]\.default\.weight$", name) for name in names)
    assert len(names) == 2 * sum(
        len(m) for m in resolve_targets(make(), AdapterSpec(targets="many", text_encoder_targets="attention")).values()
    )
    fresh = make()
    expected = 0
    for name in match_modules(fresh.unet, "unet", "many"):
        layer = fresh.unet.get_submodule(name)
        kernel = layer.kernel_size[0] * layer.kernel_size[1] if isinstance(layer, nn.Conv2d) else 1
        fan_in, fan_out = layer.weight.shape[1] * kernel, layer.weight.shape[0]
        expected += 3 * (fan_in + fan_out)
    assert sum(p.numel() for p in components.unet.parameters() if p.requires_grad) == expected


def test_attaching_is_a_function_of_the_seed(make):
    spec = AdapterSpec(rank=2, text_encoder_targets="attention")

    def weights(seed, disturb=0):
        torch.manual_seed(disturb)
        components = make()
        attach_adapters(components, spec, seed)
        return {n: p.clone() for m in components.modules().values() for n, p in m.named_parameters() if p.requires_grad}

    first, again, other = weights(0), weights(0, disturb=9), weights(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[name], other[name]) == ("lora_B" in name) for name in first)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_fresh_adapter_changes_nothing(make, kind):
    components = make()
    before = output_of(components)
    attach_adapters(components, AdapterSpec(kind=kind, rank=2, targets="many", text_encoder_targets="many"), 0)
    assert torch.allclose(output_of(components), before, atol=2e-5)


def test_adapters_are_float32_whatever_the_base_is(make):
    components = make()
    components.unet.to(torch.bfloat16)
    attach_adapters(components, AdapterSpec(kind="dora", rank=2), 0)
    dtypes = {p.requires_grad: p.dtype for p in components.unet.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


@pytest.mark.parametrize("alpha", [2.0, 6.0])
def test_merging_is_w_plus_scale_times_ba(make, alpha):
    components = make()
    attach_adapters(components, AdapterSpec(rank=4, alpha=alpha), 0)
    layer = components.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2.to_k")
    nn.init.normal_(layer.lora_B["default"].weight)
    base = layer.base_layer.weight.clone()
    delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    separate = output_of(components)
    components.unet.fuse_lora()
    assert torch.allclose(layer.base_layer.weight, base + alpha / 4 * delta, atol=1e-6)
    assert torch.allclose(output_of(components), separate, atol=1e-4)


def test_merging_dora_rescales_every_row(make):
    """arXiv 2402.09353, eq. 5: magnitude times the direction of W + s BA, row by row."""
    components = make()
    attach_adapters(components, AdapterSpec(kind="dora", rank=4, alpha=2.0), 0)
    layer = components.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2.to_k")
    magnitude = layer.lora_magnitude_vector["default"].weight
    base = layer.base_layer.weight.clone()
    assert torch.allclose(magnitude, base.norm(dim=1), atol=1e-5)
    nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    with torch.no_grad():
        magnitude.mul_(1.3)
    direction = base + 0.5 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    components.unet.fuse_lora()
    assert torch.allclose(
        layer.base_layer.weight, magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True), atol=1e-5
    )


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_proof_of_a_real_training(make, kind):
    components = make()
    spec = AdapterSpec(kind=kind, rank=2, targets="many", text_encoder_targets="attention")
    attach_adapters(components, spec, 0)
    before = {n: p.clone() for n, p in components.unet.named_parameters() if p.requires_grad}
    proof = AdapterProof(components, spec)
    losses = fit(components, proof, 8, trains_text=True)
    assert losses[-1] < losses[0]
    moved = proof.finish()
    assert moved["adapter/change_norm"] > 0
    unet = sum(
        (p.detach() - before[n]).square().sum() for n, p in components.unet.named_parameters() if n in before
    ).sqrt()
    assert moved["adapter/change_norm"] > float(unet) > 0.5 * moved["adapter/change_norm"]
    assert ("adapter/magnitude_change_norm" in moved) == (kind == "dora")
    if kind == "dora":
        magnitudes = {n: p for n, p in components.unet.named_parameters() if "magnitude" in n}
        assert len(magnitudes) == len(match_modules(make().unet, "unet", "many"))
        assert all(bool((p != before[n]).any()) for n, p in magnitudes.items())
        assert moved["adapter/magnitude_change_norm"] > 0


def test_proof_names_what_gets_no_gradient(make):
    """The text is encoded once, without the adapters of the text encoder: the mistake that went unnoticed for months."""
    components = make()
    spec = AdapterSpec(rank=2, text_encoder_targets="attention")
    attach_adapters(components, spec, 0)
    steps = []
    with pytest.raises(AdapterError, match=r"got no finite, non-zero gradient in 8 steps: text_encoder\.") as error:
        fit(components, AdapterProof(components, spec), 10, trains_text=False, before_step=steps.append)
    assert steps == list(range(1, 9))
    # A and B of 4 projections: 14 attentions in the UNet train, 2 + 3 layers of the two encoders do not
    assert "40 of 152" in str(error.value)
    assert "unet." not in str(error.value)


def test_proof_notices_one_detached_layer(make):
    components = make()
    spec = AdapterSpec(rank=2)
    attach_adapters(components, spec, 0)
    components.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q").register_forward_hook(
        lambda *a: a[2].detach()
    )
    with pytest.raises(AdapterError, match=r"2 of 112 adapter weights.*unet\.mid_block\.attentions\.0.*to_q\.lora_A"):
        fit(components, AdapterProof(components, spec))


def test_a_gradient_that_is_not_finite_does_not_count(make):
    components = make()
    spec = AdapterSpec(rank=2, targets=("mid_block.resnets.0.conv1",))
    attach_adapters(components, spec, 0)

    def spoil(step):
        for name, parameter in components.unet.named_parameters():
            if "lora_A" in name:
                parameter.grad.fill_(float("nan"))

    with pytest.raises(AdapterError, match=r"1 of 2 adapter weights got no finite.*lora_A"):
        fit(components, AdapterProof(components, spec), rate=0.0, before_step=spoil)


def test_proof_notices_a_changed_base(make):
    components = make()
    spec = AdapterSpec(rank=2)
    attach_adapters(components, spec, 0)
    proof = AdapterProof(components, spec)
    fit(components, proof)
    components.text_encoders["text_encoder_2"].text_projection.weight.data[3, 5] += 1e-6
    with pytest.raises(AdapterError, match="frozen base weight changed"):
        proof.finish()


def test_proof_notices_that_nothing_moved(make):
    components = make()
    spec = AdapterSpec(rank=2)
    attach_adapters(components, spec, 0)
    proof = AdapterProof(components, spec)
    with pytest.raises(AdapterError, match="112 adapter weights never moved, or are not finite: unet"):
        proof.finish()
    stuck = components.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q").lora_B["default"]
    start = stuck.weight.detach().clone()
    fit(components, proof)
    with torch.no_grad():
        stuck.weight.copy_(start)
    with pytest.raises(
        AdapterError,
        match=r"1 adapter weights never moved, or are not finite: unet\.mid_block.*attn1\.to_q\.lora_B\.default\.weight",
    ):
        proof.finish()


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_quantized_base_trains_and_stands_still(make, kind):
    components = make()
    for module in components.modules().values():
        quantize(module, "nf4", torch.float32)
    spec = AdapterSpec(kind=kind, rank=2, targets="many", text_encoder_targets="attention")
    attach_adapters(components, spec, 0)
    digest = base_digest(components)
    proof = AdapterProof(components, spec)
    output_of(components)  # a sampling pass first
    losses = fit(components, proof, 8, trains_text=True)
    assert losses[-1] < losses[0]
    moved = proof.finish()
    assert moved["adapter/change_norm"] > 0
    assert kind == "lora" or moved["adapter/magnitude_change_norm"] > 0
    assert base_digest(components) == digest
    layer = components.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    assert "4bit" in type(layer).__name__  # peft's own layer for such a base
    assert layer.base_layer.weight.dtype == torch.uint8


def test_the_digest_of_a_base_is_the_same_with_and_without_an_adapter_of_zero_steps(make):
    first, second = make(), make()
    assert base_digest(first) == base_digest(second)
    second.unet.conv_in.bias.data[0] += 1e-7
    assert base_digest(first) != base_digest(second)


@pytest.mark.parametrize(
    ("kind", "alpha", "text"),
    [
        ("lora", 4.0, "many"), ("lora", 10.0, "attention"), ("lora", 10.0, None), ("dora", 4.0, None), ("dora", 10.0, None),
        ("dora", 10.0, "attention"),
    ],
)  # fmt: skip
def test_a_saved_adapter_comes_back(make, tmp_path, kind, alpha, text):
    components = make()
    spec = AdapterSpec(kind=kind, rank=4, alpha=alpha, targets="many", text_encoder_targets=text)
    base = output_of(components)
    attach_adapters(components, spec, 0)
    fit(components, num_steps=3, trains_text=text is not None)
    trained = output_of(components)
    assert float((trained - base).abs().max()) > 1e-2
    file = save_adapter(components, tmp_path / "run" / "adapter")
    assert file == tmp_path / "run" / "adapter" / FILE_NAME
    with safe_open(file, "pt") as stored:
        keys, metadata = list(stored.keys()), stored.metadata()
    assert {key.split(".")[0] for key in keys} == set(resolve_targets(make(), spec))
    assert any("magnitude" in key for key in keys) == (kind == "dora")
    assert "lora_adapter_metadata" in metadata
    for path in (file, file.parent, tmp_path / "run"):
        other = make()
        load_adapter(other, path)
        assert torch.allclose(output_of(other), trained, atol=1e-5)


def test_a_loaded_adapter_is_frozen(make, tmp_path):
    components = make()
    attach_adapters(components, AdapterSpec(rank=2, text_encoder_targets="attention"), 0)
    save_adapter(components, tmp_path)
    other = make()
    load_adapter(other, tmp_path)
    assert trainable(other) == set()


def test_the_text_encoders_part_of_a_file_matters(make, tmp_path):
    components = make()
    spec = AdapterSpec(rank=4, text_encoder_targets="attention")
    attach_adapters(components, spec, 0)
    fit(components, num_steps=3, trains_text=True)
    save_adapter(components, tmp_path)
    other = make()
    with torch.no_grad():
        base = other.encode_text(CAPTIONS)["pooled"]
        load_adapter(other, tmp_path)
        assert torch.allclose(
            other.encode_text(CAPTIONS)["pooled"], components.encode_text(CAPTIONS)["pooled"], atol=1e-5
        )
        assert not torch.allclose(other.encode_text(CAPTIONS)["pooled"], base, atol=1e-3)


def test_adapter_files_that_cannot_be_loaded(make, tmp_path):
    components = make()
    with pytest.raises(
        ConfigError, match=rf"no adapter at .*give a \.safetensors file, or a folder that holds {FILE_NAME}"
    ):
        load_adapter(components, tmp_path)
    attach_adapters(components, AdapterSpec(rank=2), 0)
    save_adapter(components, tmp_path)
    other = make()
    narrow = dict(other.unet.config) | {"block_out_channels": (64, 192), "attention_head_dim": (1, 3)}
    other.unet = type(other.unet).from_config(narrow).requires_grad_(False)
    with pytest.raises(ConfigError, match=rf"{FILE_NAME} does not fit test"):
        load_adapter(other, tmp_path)
