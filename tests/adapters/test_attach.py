import re

import pytest
import torch
from adapting import fit, output_of, trainable
from peft.utils.integrations import dequantize_module_weight
from torch import nn

from t2ilib.adapters.attach import AdapterError, AdapterProof, attach_adapters, base_digest
from t2ilib.adapters.export import save_adapter
from t2ilib.adapters.load import load_adapter
from t2ilib.adapters.spec import ATTENTION, match_modules, resolve_targets
from t2ilib.config import AdapterSpec, ConfigError, ModelConfig
from t2ilib.models.load import load_base
from t2ilib.models.quantize import quantize
from t2ilib.runfile import build_run


def test_without_text_targets_only_the_unet_is_adapted(make):
    assert list(resolve_targets(make(), AdapterSpec())) == ["unet"]


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


def test_an_adapter_is_in_the_mode_of_its_module(make):
    """peft's modules come in training mode; left so, a checkpoint's adapter would be drawn with its dropout on."""
    components = make()
    attach_adapters(components, AdapterSpec(rank=2, dropout=0.5, text_encoder_targets="attention"), 0)
    assert not any(m.training for module in components.modules().values() for m in module.modules())
    components = make()
    components.unet.train()
    attach_adapters(components, AdapterSpec(rank=2, dropout=0.5), 0)
    assert all(m.training for m in components.unet.modules())


def test_layers_that_kept_their_precision_start_as_always():
    """Nothing was lost there, and from A and B both zero nothing is ever learned."""
    components = load_base(ModelConfig(quantization="nf4", quantization_skip=("to_q",), quantize_text_encoders=False))
    spec = AdapterSpec(init="loftq", rank=4, targets="many", text_encoder_targets="attention")
    attach_adapters(components, spec, 0)
    proof = AdapterProof(components, spec)
    starts = {n: p for module in components.modules().values() for n, p in module.named_parameters() if "lora_B" in n}
    assert {bool(p.any()) for n, p in starts.items() if "to_q" in n or "conv1" in n or "q_proj" in n} == {False}
    assert all(bool(p.any()) for n, p in starts.items() if "to_k" in n)
    fit(components, proof, trains_text=True)
    proof.finish()


def test_initialisations_need_directions_enough(make):
    with pytest.raises(
        ConfigError, match=r"as many directions of a weight as the rank, and .* layers of unet have fewer \("
    ):
        attach_adapters(make(), AdapterSpec(init="pissa", rank=100), 0)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_fresh_dora_over_a_bfloat16_base_changes_nothing(make, quantization):
    """Magnitudes are the norms that every pass divides by, in float32: against the closed form in float64, and by the output."""
    from peft.utils.integrations import dequantize_module_weight

    components = make()
    for module in components.modules().values():
        module.to(torch.bfloat16)
        if quantization != "none":
            quantize(module, quantization, torch.bfloat16)
    before = output_of(components)
    attach_adapters(components, AdapterSpec(kind="dora", rank=2, targets="many", text_encoder_targets="attention"), 0)
    for module in components.modules().values():
        for layer in module.modules():
            if getattr(layer, "lora_magnitude_vector", None):
                weight = dequantize_module_weight(layer.base_layer).double().flatten(1)
                magnitude = layer.lora_magnitude_vector["default"].weight
                assert magnitude.dtype == torch.float32
                torch.testing.assert_close(magnitude.flatten().double(), weight.norm(dim=1), rtol=1e-6, atol=0)
    assert torch.equal(output_of(components), before)


def test_a_bias_kept_in_another_precision_is_the_same_base(make):
    """bitsandbytes' int8 layers rewrite their bias to the dtype of the last input; a value that moved is another matter."""
    components = make()
    components.unet.to(torch.bfloat16)
    digest = base_digest(components)
    bias = components.unet.get_submodule("time_embedding.linear_1").bias
    bias.data = bias.data.float()
    assert base_digest(components) == digest
    bias.data[3] += 1e-3
    assert base_digest(components) != digest


def test_weights_that_do_not_move_are_told_early(make, caplog):
    components, spec = make(), AdapterSpec(rank=2)
    attach_adapters(components, spec, 0)
    fit(components, AdapterProof(components, spec), rate=1e-30)
    assert "after 7 steps" in caplog.text
    assert "optimizer.learning_rate is probably too low" in caplog.text
    caplog.clear()
    components = make()
    attach_adapters(components, spec, 0)
    fit(components, AdapterProof(components, spec))
    assert "have not moved" not in caplog.text
