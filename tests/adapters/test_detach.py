"""Taking adapters off: the base is, bit for bit, what was loaded, quantized or not, with words, DoRA and another noise."""

import pytest
import torch
from adapting import output_of
from safetensors.torch import load_file, save_file

from t2ilib.adapters.attach import attach_adapters
from t2ilib.adapters.detach import detach_adapters, remember
from t2ilib.adapters.export import save_adapter
from t2ilib.adapters.load import FILE_NAME, load_adapter, read_metadata
from t2ilib.adapters.tokens import embedding_of
from t2ilib.config import AdapterSpec, ModelConfig
from t2ilib.models.load import load_base


def adapter_in(folder, components, noise="", **spec):
    """A file of an adapter that does something, and says what noise it is for."""
    attach_adapters(components, AdapterSpec(rank=2, init="gaussian", **spec), seed=1)
    file = save_adapter(components, folder)
    tensors = {
        name: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3)) * 0.2
        for name, tensor in load_file(file).items()
    }
    told = read_metadata(file) | ({"modelspec.prediction_type": noise} if noise else {})
    save_file(tensors, file, told)
    return file


def state_of(components):
    """All that drawing depends on: names and values of weights, vocabularies, the scheduler."""
    weights = {
        f"{part}.{name}": tensor.detach().clone()
        for part, module in components.modules().items()
        for name, tensor in module.state_dict().items()
        if isinstance(tensor, torch.Tensor)
    }
    vocabularies = {name: tokenizer.get_vocab() for name, tokenizer in components.tokenizers.items()}
    ends = [
        m.eos_token_id for e in components.text_encoders.values() for m in e.modules() if hasattr(m, "eos_token_id")
    ]
    kinds = [type(module).__name__ for part in components.modules().values() for module in part.modules()]
    return weights, (vocabularies, ends, kinds, dict(components.words), components.scheduler)


@pytest.mark.parametrize(
    ("family", "spec", "noise"),
    [
        ("sdxl", {"targets": "many", "text_encoder_targets": "many"}, ""),
        ("sdxl", {"kind": "dora", "targets": "many"}, "epsilon"),
        ("sd15", {"tokens": {"<new>": "red circle"}, "token_vectors": 2, "text_encoder_targets": "attention"}, ""),
    ],
)
def test_the_base_is_what_it_was(make, tmp_path, family, spec, noise):
    file = adapter_in(tmp_path, make(family), noise, **spec)
    components = make(family)
    before, (weights, rest) = output_of(components), state_of(components)
    bare = remember(components)
    for _ in range(2):
        load_adapter(components, file)
        if not spec.get("tokens"):
            load_adapter(components, file, "other")
        assert not torch.equal(output_of(components), before), "an adapter that does nothing shows nothing"
        assert (components.scheduler is bare.scheduler) == (noise == "")
        detach_adapters(components, bare)
        now, left = state_of(components)
        assert left == rest
        assert now.keys() == weights.keys()
        assert all(torch.equal(now[name], weights[name]) for name in weights)
        assert torch.equal(output_of(components), before)
        assert not any(getattr(module, "peft_config", None) for module in components.modules().values())
    for name, encoder in components.text_encoders.items():
        assert embedding_of(encoder) is bare.embeddings[name]


def test_a_quantized_base_too(tmp_path):
    config = ModelConfig(base="tiny-sdxl", quantization="nf4")
    file = adapter_in(tmp_path, load_base(ModelConfig()), targets="attention")
    components = load_base(config)
    before, bare = output_of(components), remember(components)
    load_adapter(components, file)
    assert not torch.equal(output_of(components), before)
    detach_adapters(components, bare)
    assert torch.equal(output_of(components), before)


def test_an_adapter_that_was_attached_in_part_goes_too(make, tmp_path):
    """A file whose last tensor does not fit: diffusers has wrapped layers by the time it finds out."""
    file = adapter_in(tmp_path / "good", make())
    tensors = load_file(file)
    name = sorted(tensors)[-1]
    (tmp_path / "bad").mkdir()
    save_file(tensors | {name: torch.zeros(3, 3)}, tmp_path / "bad" / FILE_NAME, read_metadata(file))
    components = make()
    before, bare = output_of(components), remember(components)
    with pytest.raises(ValueError, match="does not fit"):
        load_adapter(components, tmp_path / "bad")
    detach_adapters(components, bare)
    assert torch.equal(output_of(components), before)
    load_adapter(components, file)
    assert not torch.equal(output_of(components), before)
