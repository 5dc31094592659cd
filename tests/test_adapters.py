import re

import pytest
import torch
from adapting import CAPTIONS, fit, output_of
from peft.utils.integrations import dequantize_module_weight
from safetensors import safe_open
from torch import nn

from t2ilib.adapters.attach import AdapterError, AdapterProof, attach_adapters, base_digest
from t2ilib.adapters.export import save_adapter
from t2ilib.adapters.load import FILE_NAME, load_adapter, weigh_adapters
from t2ilib.adapters.spec import ATTENTION, TARGETS, adapter_table, match_modules, resolve_targets
from t2ilib.adapters.weights import read_layers
from t2ilib.config import AdapterSpec, ConfigError, ModelConfig, build_run
from t2ilib.models.components import load_base
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


LINEAR = (*ATTENTION, "ff.net.2")


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_took_from_the_base_fits_the_untouched_base(make, tmp_path, init, kind):
    components = make()
    before = output_of(components)
    spec = AdapterSpec(kind=kind, init=init, rank=4, alpha=6.0, targets=LINEAR, rank_stabilized=init == "olora")
    untouched = {n: p.clone() for n, p in components.unet.named_parameters()}
    attach_adapters(components, spec, 0)
    changed = [n for n, p in components.unet.named_parameters() if ".base_layer.weight" in n]
    assert not any(
        torch.equal(components.unet.get_parameter(n), untouched[n.replace(".base_layer", "")]) for n in changed
    )
    assert torch.allclose(output_of(components), before, atol=1e-4)
    proof = AdapterProof(components, spec)
    fit(components, proof)
    proof.finish()
    trained = output_of(components)
    assert float((trained - before).abs().max()) > 1e-2
    save_adapter(components, tmp_path, proof.start)
    other = make()
    load_adapter(other, tmp_path)
    assert {m.r["default"] for m in other.unet.modules() if hasattr(m, "lora_A")} == {8}
    assert torch.allclose(output_of(other), trained, atol=2e-4)


def test_initialisations_are_what_the_papers_say(make):
    """PiSSA's B A is the best approximation of W of its rank; OLoRA's columns of B are orthogonal; gaussian has B zero."""
    name, plain = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k", make().unet
    weight = plain.get_submodule(name).weight
    products = {}
    for init in ("pissa", "olora", "gaussian"):
        components = make()
        attach_adapters(components, AdapterSpec(init=init, rank=4, alpha=4.0), 0)
        layer = components.unet.get_submodule(name)
        products[init] = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    u, s, v = torch.linalg.svd(weight)
    best = u[:, :4] * s[:4] @ v[:4]
    assert torch.allclose(products["pissa"][0] @ products["pissa"][1], best, atol=1e-5)
    b = products["olora"][0]
    assert torch.allclose(b.T @ b, torch.diag(torch.diagonal(b.T @ b)), atol=1e-5)
    assert not products["gaussian"][0].any()
    assert float(products["gaussian"][1].std()) == pytest.approx(1 / 4, rel=0.1)  # peft's standard deviation is 1 / r


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_loftq_makes_up_for_what_quantizing_lost(kind):
    config = ModelConfig(quantization="nf4", quantize_convolutions=True)
    full, base, corrected = load_base(config.in_full()), load_base(config), load_base(config)
    attach_adapters(corrected, AdapterSpec(kind=kind, init="loftq", rank=16, alpha=8.0, targets="many"), 0)
    for name, layer in corrected.unet.named_modules():
        if hasattr(layer, "lora_A"):
            quantized = dequantize_module_weight(base.unet.get_submodule(name))
            assert torch.equal(dequantize_module_weight(layer.base_layer), quantized)
            product = layer.lora_B["default"].weight.flatten(1) @ layer.lora_A["default"].weight.flatten(1)
            lost = full.unet.get_submodule(name).weight - quantized
            left = lost.flatten(1) - 0.5 * product
            kept = torch.linalg.svdvals(lost.flatten(1))[16:]  # Eckart and Young: what rank 16 cannot reach
            assert float(left.norm()) == pytest.approx(float(kept.norm()), rel=1e-3, abs=1e-6)
    expected, plain, mended = (output_of(c) for c in (full, base, corrected))
    assert float((mended - expected).norm()) < 0.8 * float((plain - expected).norm())


def test_initialisations_that_do_not_go_together(make):
    with pytest.raises(
        ConfigError, match=r"init 'pissa' is for linear layers, and the targets of unet have .* convolutions"
    ):
        attach_adapters(make(), AdapterSpec(init="pissa", targets="many"), 0)
    for init, quantization, told in (("pissa", "nf4", "use loftq"), ("loftq", "none", "needs model.quantization nf4")):
        with pytest.raises(ConfigError, match=told):
            build_run({"adapter": {"init": init}, "model": {"quantization": quantization}})


def test_qdora_trains_its_magnitude():
    """Other trainers silently train a plain LoRA over a 4-bit base. The gradient is that of DoRA's equation 5 (arXiv 2402.09353)
    over the dequantized weight, by autograd from the formula."""
    components = load_base(ModelConfig(quantization="nf4"))
    spec = AdapterSpec(kind="dora", rank=4)
    attach_adapters(components, spec, 0)
    layer = components.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2.to_k")
    nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    x = torch.randn(3, 5, layer.in_features)
    layer(x).square().sum().backward()
    magnitude = layer.lora_magnitude_vector["default"].weight
    weight = dequantize_module_weight(layer.base_layer)
    direction = weight + layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    m = magnitude.detach().clone().requires_grad_()
    (x @ (m[:, None] * direction / direction.norm(dim=1, keepdim=True).detach()).T).square().sum().backward()
    torch.testing.assert_close(magnitude.grad, m.grad, rtol=1e-3, atol=1e-4)
    components = load_base(ModelConfig(quantization="nf4"))
    attach_adapters(components, spec, 0)
    proof = AdapterProof(components, spec)
    fit(components, proof)
    assert proof.finish()["adapter/magnitude_change_norm"] > 1e-3


def test_several_adapters_add_up_and_switch_off(make, tmp_path):
    base = output_of(make())
    for number in (1, 2):
        components = make()
        attach_adapters(components, AdapterSpec(rank=2 * number, text_encoder_targets="attention"), number)
        fit(components, num_steps=3, trains_text=True)
        save_adapter(components, tmp_path / str(number))
    components = make()
    load_adapter(components, tmp_path / "1", "first")
    load_adapter(components, tmp_path / "2", "second")
    outputs = {}
    for weights in ((1.0, 0.0), (0.0, 1.0), (0.7, -0.4), (0.0, 0.0)):
        weigh_adapters(components, dict(zip(("first", "second"), weights, strict=True)))
        outputs[weights] = output_of(components)
    assert trainable(components) == set()
    assert torch.equal(outputs[0.0, 0.0], base)
    mixed = make()  # W + sum_i w_i s_i B_i A_i, written into the weights
    for number, weight in ((1, 0.7), (2, -0.4)):
        alone = make()
        load_adapter(alone, tmp_path / str(number))
        if number == 1:
            assert torch.allclose(outputs[1.0, 0.0], output_of(alone), atol=1e-5)
        for layer in read_layers(alone):
            target = mixed.modules()[layer.component].get_submodule(layer.module)
            target.weight.data += weight * 8.0 / layer.rank * layer.up @ layer.down  # alpha was 8
    assert torch.allclose(outputs[0.7, -0.4], output_of(mixed), atol=1e-4)
    assert float((outputs[0.7, -0.4] - base).abs().max()) > 1e-3
    with pytest.raises(ConfigError, match="no adapter is called third; attached are first, second"):
        weigh_adapters(components, {"third": 1.0})
