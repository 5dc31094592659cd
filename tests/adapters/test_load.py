import pytest
import torch
from adapting import CAPTIONS, copy_parts, fit, output_of, trainable
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from t2ilib.adapters.attach import attach_adapters
from t2ilib.adapters.export import save_adapter
from t2ilib.adapters.formats import write_kohya
from t2ilib.adapters.load import FILE_NAME, load_adapter, weigh_adapters
from t2ilib.adapters.spec import resolve_targets
from t2ilib.adapters.weights import read_layers
from t2ilib.config import AdapterSpec, ConfigError, ModelConfig
from t2ilib.models.families import skip_layers


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


def test_layers_that_clip_skip_leaves_out_are_left_out_of_kohya_files(make, tmp_path):
    """sd-scripts adapt every layer of the text encoder, also those that a model trained at clip skip 2 never reads."""
    whole, skipping = make("sd15"), make("sd15")
    skipping.config = ModelConfig(base="tiny-sd15", clip_skip=1)
    skip_layers(skipping.family, skipping.text_encoders, 1)
    attach_adapters(whole, AdapterSpec(rank=2, text_encoder_targets="attention"), 0)
    fit(whole, num_steps=2, trains_text=True)
    layers = read_layers(whole)
    write_kohya(layers, whole, tmp_path / "whole.safetensors", {})
    tensors = load_file(tmp_path / "whole.safetensors")
    skipped = [name for name in tensors if "encoder_layers_2_" in name]
    assert skipped
    save_file({name: x for name, x in tensors.items() if name not in skipped}, tmp_path / "less.safetensors")
    other = copy_parts(skipping)
    other.config = skipping.config
    load_adapter(skipping, tmp_path / "whole.safetensors")
    load_adapter(other, tmp_path / "less.safetensors")
    assert torch.equal(output_of(skipping), output_of(other))


def test_a_file_that_predicts_noise_is_not_drawn_at_zero_terminal_snr(make, tmp_path, caplog):
    """sd-scripts only warn of training it; and adapters that say nothing else are used over bases of zero terminal SNR."""
    components = make()
    attach_adapters(components, AdapterSpec(rank=2), 0)
    said = {"modelspec.prediction_type": "epsilon", "ss_zero_terminal_snr": "True"}
    save_adapter(components, tmp_path, metadata=said)
    other = make()
    load_adapter(other, tmp_path)
    assert "nothing can be drawn at zero terminal SNR: pictures are drawn without that" in caplog.text
    assert other.scheduler.config.prediction_type == "epsilon"
    assert float(other.scheduler.alphas_cumprod[-1]) > 0
    zero = make()
    zero.noise_as("v_prediction", zero_terminal_snr=True)
    load_adapter(zero, tmp_path)
    assert "pictures are drawn as its base draws them" in caplog.text
    assert zero.scheduler.config.prediction_type == "v_prediction"
    assert float(zero.scheduler.alphas_cumprod[-1]) == 0


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


def test_a_file_for_another_model_is_refused(make, tmp_path):
    """diffusers loads the layers it knows and leaves the others out without a word."""
    components = make()
    attach_adapters(components, AdapterSpec(rank=2), 0)
    file = save_adapter(components, tmp_path)
    tensors = load_file(file)
    for part in ("A", "B"):
        name = next(key for key in tensors if key.endswith(f"attn1.to_q.lora_{part}.weight"))
        tensors[name.replace("down_blocks.0", "down_blocks.7")] = tensors.pop(name)
    save_file(tensors, tmp_path / "foreign.safetensors")
    with pytest.raises(ConfigError, match=r"adapts \d+ layers, and test has \d+ of them"):
        load_adapter(make(), tmp_path / "foreign.safetensors")


@pytest.mark.parametrize("ending", [".lora.alpha", ".lora_A.alpha", ".alpha"])
def test_alphas_that_lie_beside_the_weights_count(make, tmp_path, ending):
    """As some trainers write them; diffusers passes the first two over, so that every layer would act alpha / rank times too strongly."""
    components = make()
    attach_adapters(components, AdapterSpec(rank=4, alpha=1.0, text_encoder_targets="attention"), 0)
    fit(components, num_steps=3, trains_text=True)
    trained = output_of(components)
    file = save_adapter(components, tmp_path / "metadata")
    tensors = load_file(file)
    layers = {name.removesuffix(".lora_B.weight") for name in tensors if name.endswith(".lora_B.weight")}
    alphas = {f"{layer}{ending}": torch.tensor(1.0) for layer in layers}
    beside = tmp_path / "BESIDE.SAFETENSORS"
    save_file(tensors | alphas, beside)
    other = make()
    load_adapter(other, beside)
    assert torch.allclose(output_of(other), trained, atol=1e-5)
    with safe_open(file, "pt") as stored:
        save_file(tensors | alphas, tmp_path / "twice.safetensors", stored.metadata())
    with pytest.raises(ConfigError, match="says its alphas twice"):
        load_adapter(make(), tmp_path / "twice.safetensors")
    save_file(tensors | alphas | {f"unet.nowhere{ending}": torch.tensor(1.0)}, tmp_path / "more.safetensors")
    with pytest.raises(ConfigError, match=r"alpha for unet\.nowhere, and no weights"):
        load_adapter(make(), tmp_path / "more.safetensors")


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_is_not_rounded_to_its_base(make, tmp_path, kind):
    components = make()
    attach_adapters(components, AdapterSpec(kind=kind, rank=4, text_encoder_targets="attention"), 0)
    fit(components, num_steps=2, trains_text=True)
    written = load_file(save_adapter(components, tmp_path / "first"))
    half = make()
    for module in half.modules().values():
        module.to(torch.bfloat16)
    load_adapter(half, tmp_path / "first")
    again = load_file(save_adapter(half, tmp_path / "second"))
    assert written.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in written.items())
