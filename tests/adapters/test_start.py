"""Going on from an adapter: what draws at the start is that adapter, whatever its layout, and nothing else is loaded."""

import json
from pathlib import Path

import adapting
import pytest
import torch
from adapting import fit, output_of, trainable
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from t2ilib.adapters.attach import AdapterProof, attach_adapters
from t2ilib.adapters.export import save_adapter
from t2ilib.adapters.formats import write_kohya
from t2ilib.adapters.load import load_adapter, weigh_adapters
from t2ilib.adapters.start import attach_started
from t2ilib.adapters.weights import read_layers
from t2ilib.config import AdapterSpec, ConfigError, ModelConfig
from t2ilib.models.load import load_base
from t2ilib.runfile import build_run
from t2ilib.training.checkpoint import CheckpointError
from t2ilib.training.loop import train

FEW = ("to_q", "to_v", "ff.net.0.proj", "conv1")


def going_on(spec: AdapterSpec, start: Path, **changes) -> AdapterSpec:
    return spec.model_copy(update={"start": start, **changes})


def learned(components, spec, folder: Path) -> Path:
    attach_adapters(components, spec, 0)
    fit(components, num_steps=2, trains_text=spec.text_encoder_targets is not None)
    return save_adapter(components, folder)


def plain_diffusers(file: Path, target: Path) -> Path:
    """As older scripts wrote it: no metadata, so that alpha is the rank."""
    save_file(load_file(file), target)
    return target


@pytest.mark.parametrize(
    ("family", "kind", "layout", "text"),
    [
        ("sdxl", "lora", "own", "attention"),
        ("sdxl", "dora", "own", "attention"),
        ("sd15", "lora", "plain", None),
        ("sd15", "lora", "kohya", "attention"),
        ("sdxl", "dora", "kohya", None),
    ],
)
def test_it_draws_as_the_adapter_and_learns_on(make, tmp_path, family, kind, layout, text) -> None:
    components = make(family)
    targets = FEW if family == "sdxl" else "many"
    spec = AdapterSpec(kind=kind, rank=4, alpha=4.0, targets=targets, text_encoder_targets=text)
    file = learned(components, spec, tmp_path)
    if layout == "kohya":
        file = tmp_path / "kohya.safetensors"
        write_kohya(read_layers(components), components, file, {})
    elif layout == "plain":
        file = plain_diffusers(file, tmp_path / "plain.safetensors")
    begun = make(family)
    adapted = attach_started(begun, going_on(spec, file), 1)
    assert torch.allclose(output_of(begun), output_of(components), atol=1e-6)
    assert trainable(begun) == trainable(components), "and no other parameter than those of the run's own adapter"
    assert adapted.keys() == set(components.modules() if text else ["unet"])
    assert all("start" not in getattr(m, "lora_A", {}) for part in begun.modules().values() for m in part.modules())
    proof = AdapterProof(begun, spec)
    assert len(proof.unmoved()) == len(proof.start)
    losses = fit(begun, proof, num_steps=2, trains_text=text is not None)
    assert losses[-1] < losses[0]
    assert proof.finish()["adapter/change_norm"] > 0
    weigh_adapters(begun, {"default": 0.0})
    assert torch.equal(output_of(begun), output_of(make(family))), "the base is as it was"


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("changes", [{"alpha": 12.0}, {"alpha": 8.0, "rank_stabilized": True}])
def test_another_alpha_gives_the_same_update(make, tmp_path, caplog, kind, changes) -> None:
    components = make()
    spec = AdapterSpec(kind=kind, rank=4, alpha=4.0)
    file = learned(components, spec, tmp_path)
    begun = make()
    with caplog.at_level("INFO"):
        attach_started(begun, going_on(spec, file, **changes), 0)
    assert torch.allclose(output_of(begun), output_of(components), atol=1e-5)
    factor = {12.0: "0.333333", 8.0: "0.25"}[changes["alpha"]]
    assert f"B is multiplied by {factor} (56 layers)" in caplog.text


def test_over_a_base_in_four_bits(tmp_path) -> None:
    config, spec = (
        ModelConfig(base="tiny-sd15", quantization="nf4"),
        AdapterSpec(kind="dora", rank=2, text_encoder_targets="attention"),
    )
    components = load_base(config)
    file = learned(components, spec, tmp_path)
    begun = load_base(config)
    attach_started(begun, going_on(spec, file), 0)
    assert torch.allclose(output_of(begun), output_of(components), atol=1e-5)
    assert trainable(begun) == trainable(components)
    first = read_layers(begun)[0]
    assert torch.equal(first.magnitude, read_layers(components)[0].magnitude)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 16}, r"its rank is 4 and not 16 on 56 layers \(unet\.down_blocks"),
        ({"kind": "dora"}, "it is a lora, and adapter.kind is dora"),
        ({"targets": "many"}, r"it lacks \d+ layers"),
        ({"targets": ("to_q",)}, "it has beside them 42 layers"),
        ({"text_encoder_targets": "attention"}, r"it lacks 20 layers \(text_encoder\.encoder"),
    ],
)
def test_an_adapter_of_other_layers_is_refused(make, tmp_path, changes, message) -> None:
    spec = AdapterSpec(rank=4)
    components = make()
    attach_adapters(components, spec, 0)
    save_adapter(components, tmp_path)
    with pytest.raises(ConfigError, match=message):
        attach_started(make(), going_on(spec, tmp_path, **changes), 0)


def test_words_go_on_too(make, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(adapting, "CAPTIONS", ["a <cat>", "a circle"])
    spec = AdapterSpec(rank=2, tokens={"<cat>": "circle"}, token_vectors=2)
    components = make()
    attach_adapters(components, spec, 0)
    fit(components, num_steps=2, trains_text=True)
    file = save_adapter(components, tmp_path)
    begun = make()
    attach_started(begun, going_on(spec, file, tokens={"<dog>": "square", "<cat>": "circle"}), 0)
    assert torch.allclose(output_of(begun), output_of(components), atol=1e-6)
    loaded = make()
    load_adapter(loaded, file)
    with torch.no_grad():
        assert all(
            torch.equal(a, b)
            for a, b in zip(*(c.encode_text(["<cat>"]).values() for c in (begun, loaded)), strict=True)
        )
    assert sum("vectors" in name for name in trainable(begun)) == 2
    with pytest.raises(ConfigError, match=r"together with <cat>, which adapter\.tokens must name too"):
        attach_started(make(), going_on(spec, file, tokens={}), 0)
    with pytest.raises(ConfigError, match=r"<cat> is 2 vectors, and adapter\.token_vectors is 3"):
        attach_started(make(), going_on(spec, file, token_vectors=3), 0)


def test_another_prediction_or_noise_is_told(make, tmp_path, caplog) -> None:
    spec = AdapterSpec(rank=2)
    components = make()
    attach_adapters(components, spec, 0)
    save_adapter(components, tmp_path, metadata={"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "True"})
    begun = make()
    begun.noise_as("epsilon")
    attach_started(begun, going_on(spec, tmp_path), 0)
    assert "trained with prediction v_prediction, and this run has epsilon" in caplog.text
    assert "trained with zero terminal SNR True, and this run has False" in caplog.text
    assert begun.scheduler.config.prediction_type == "epsilon", "the run decides"


def run_of(output: Path, **sections):
    values = {
        "output": str(output),
        "model": {"base": "tiny-sd15"},
        "adapter": {"rank": 2},
        "data": {"source": "shapes"},
        "shapes": {"scenes": ["heart"], "num_pictures": 8},
        "training": {"steps": 2, "batch_size": 2},
        "evaluation": {
            "validate_every": 0,
            "validation_timesteps": 1,
            "num_inference_steps": 1,
            "prompts": ["a heart"],
        },
    }
    return build_run(values | {name: {**values.get(name, {}), **section} for name, section in sections.items()})


def test_a_run_begins_where_another_ended(tmp_path) -> None:
    first = run_of(tmp_path / "first")
    ended = train(first).metrics["held_out_loss"]
    second = run_of(tmp_path / "second", adapter={"rank": 2, "start": str(first.output)})
    train(second)
    rows = [json.loads(line) for line in (second.output / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["held_out_loss"] == ended
    base, begun = ((run.output / "samples" / "step-000000" / "00.png").read_bytes() for run in (first, second))
    assert begun == (first.output / "samples" / "step-000002" / "00.png").read_bytes() != base
    file = first.output / "adapter" / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file, metadata)
    with pytest.raises(CheckpointError, match=r"what lies at adapter\.start, .*first, has changed"):
        train(second)
    with pytest.raises(ConfigError, match="no adapter at"):
        train(run_of(tmp_path / "third", adapter={"rank": 2, "start": str(tmp_path / "nowhere")}))
