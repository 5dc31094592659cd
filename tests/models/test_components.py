"""Loading a base: what is not a model of ours, or not whole, is refused in one sentence that names it; and where its parts are
while it is trained and drawn with."""

import json
import shutil
from pathlib import Path

import bitsandbytes as bnb
import httpx
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from huggingface_hub import constants, errors
from transformers import CLIPTextModel

from t2ilib.config import ConfigError, ModelConfig
from t2ilib.models import components as module
from t2ilib.models.components import Components
from t2ilib.models.files.locate import SHIPPED, download
from t2ilib.models.load import load_base
from t2ilib.models.quantize import move
from t2ilib.runfile import build_run
from t2ilib.training.loop import train


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(SHIPPED["tiny-sdxl"], tmp_path / "model")
    return tmp_path / "model"


def refused(base: str | Path, **options) -> str:
    with pytest.raises(ConfigError) as error:
        load_base(ModelConfig(base=str(base), **options), torch.device("cpu"))
    return str(error.value)


@pytest.mark.parametrize(
    "file",
    [
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "text_encoder_2/model.safetensors",
        "scheduler/scheduler_config.json",
    ],
)
def test_an_incomplete_folder_names_the_file(folder: Path, file: str) -> None:
    (folder / file).unlink()
    assert refused(folder) == f"model.base {folder} is incomplete, it lacks {file}"


def test_a_folder_without_tokenizer_names_it(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")
    assert "it lacks tokenizer/vocab.json" in refused(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))
    parts = {
        "a": "diffusion_pytorch_model-00001-of-00002.safetensors",
        "b": "diffusion_pytorch_model-00002-of-00002.safetensors",
    }
    weights.with_name(weights.name + ".index.json").write_text(json.dumps({"weight_map": parts}))
    assert refused(folder).endswith("it lacks unet/diffusion_pytorch_model-00002-of-00002.safetensors")


def test_pickled_weights_are_refused_with_the_way_to_convert_them(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    message = refused(folder)
    assert "pickles (unet/diffusion_pytorch_model.bin)" in message
    assert "safe_serialization=True" in message


def test_a_variant_must_be_asked_for_and_loads(folder: Path) -> None:
    assert refused(folder, variant="fp16").endswith("holds no weights of model.variant fp16: leave that out")
    for part, stem in {
        "unet": "diffusion_pytorch_model",
        "vae": "diffusion_pytorch_model",
        "text_encoder": "model",
        "text_encoder_2": "model",
    }.items():
        (folder / part / f"{stem}.safetensors").rename(folder / part / f"{stem}.fp16.safetensors")
    assert refused(folder).endswith("It holds the variant fp16: set model.variant")
    assert load_base(ModelConfig(base=str(folder), variant="fp16"), torch.device("cpu")).family.name == "sdxl"


def test_another_kind_of_pipeline_is_named(folder: Path) -> None:
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionXLPipeline", "FluxPipeline"))
    assert "is a FluxPipeline; t2ilib trains StableDiffusionPipeline, StableDiffusionXLPipeline" in refused(folder)
    index.write_text("{}")
    assert "it is damaged" in refused(folder)


def hub_error(kind: type) -> Exception:
    response = httpx.Response(401, request=httpx.Request("GET", "https://huggingface.co/owner/name"))
    return kind("refused", response=response) if issubclass(kind, errors.HfHubHTTPError) else kind("refused")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (errors.GatedRepoError, "is gated: accept its licence on https://huggingface.co/owner/name"),
        (errors.RepositoryNotFoundError, "does not exist on the Hub, or is private"),
        (errors.RevisionNotFoundError, "has no revision 'old'"),
        (errors.RemoteEntryNotFoundError, "holds no model_index.json"),
        (errors.LocalEntryNotFoundError, "the Hub cannot be reached"),
        (OSError, "could not be fetched (OSError: refused)"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(monkeypatch, kind: type, words: str) -> None:
    def fail(*args, **options):
        raise hub_error(kind)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    message = refused("owner/name", revision="old")
    assert message.startswith("model.base owner/name ")
    assert words in message


def test_offline_names_the_switch(monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="owner/name is not in the local cache, and HF_HUB_OFFLINE=1"):
        download("owner/name", "model_index.json", None)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("scheduler", {"_class_name": "EDMDPMSolverMultistepScheduler"}, "another noise formulation"),
        (
            "vae",
            {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4},
            "scales its latents by latents_mean and latents_std",
        ),
    ],
)
def test_models_of_another_noise_or_scale_are_refused(tmp_path, part, change, message):
    """As Playground v2.5 has both: it loads like an SDXL, and would train on the wrong noise and the wrong latents."""
    folder = tmp_path / "model"
    shutil.copytree(SHIPPED["tiny-sdxl"], folder)
    file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    if part == "scheduler":
        index = json.loads((folder / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", change["_class_name"]]
        (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=message):
        load_base(ModelConfig(base=str(folder)))


CARD = "cpu:7"
"""A device of another name, on which everything can be computed."""


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> dict:
    """Part -> where it was last moved to; CARD is the device that the UNet is on, and that nothing has left at first."""
    moved: dict[torch.nn.Module, str] = {}
    monkeypatch.setattr(Components, "device", torch.device(CARD))
    monkeypatch.setattr(module, "move", lambda part, device: moved.__setitem__(part, str(device)))
    return moved


def test_what_a_step_does_without_is_parked(make, places: dict) -> None:
    components = make("sdxl")
    first, second = components.text_encoders.values()
    assert components.parkable(()) == [components.vae, first, second]
    assert components.parkable(("unet", "text_encoder")) == [components.vae, second]
    assert components.parkable(("unet", "text_encoder", "text_encoder_2")) == [components.vae]
    with components.awake():  # nothing is parked, so nothing is moved
        pass
    assert places == {}
    components.park(("unet", "text_encoder"))
    assert places == {components.vae: "cpu", second: "cpu"}


def test_what_is_parked_is_awake_for_the_scope_alone(make, places: dict) -> None:
    components = make("sd15")
    components.park(())
    parked = [components.vae, components.text_encoders["text_encoder"]]
    with components.awake():
        assert places == dict.fromkeys(parked, CARD)
    assert places == dict.fromkeys(parked, "cpu")
    with pytest.raises(ZeroDivisionError), components.awake():
        raise ZeroDivisionError
    assert places == dict.fromkeys(parked, "cpu")


def test_what_rested_is_back_where_the_device_has_no_room_for_what_wakes(make, places: dict, monkeypatch) -> None:
    components = make("sdxl")
    components.park(())
    parked, first = dict(places), next(iter(components.text_encoders.values()))

    def crowded(part, device):
        if part is first and str(device) == CARD:
            raise torch.OutOfMemoryError
        places[part] = str(device)

    monkeypatch.setattr(module, "move", crowded)
    with pytest.raises(torch.OutOfMemoryError), components.awake("text_encoder"):
        pass
    assert places == {**parked, components.unet: CARD}
    assert components.home is None


@pytest.mark.parametrize(
    ("trains_text", "cache", "away"),
    [(False, "all", 2), (False, "latents", 1), (False, "off", 0), (True, "all", 1), (True, "off", 0)],
)
def test_every_part_is_on_the_device_whenever_it_is_used(
    tmp_path, monkeypatch, places: dict, trains_text: bool, cache: str, away: int
) -> None:
    """Over a whole run: encoding, steps, held-out loss, pictures; and what is not needed is away in every step."""
    monkeypatch.setenv("T2ILIB_CACHE", str(tmp_path / "cache"))  # where nothing is encoded yet
    used: dict[str, set[str]] = {}

    def watched(kind: type, method: str):
        original = getattr(kind, method)

        def watch(part, *args, **options):
            used.setdefault(kind.__name__, set()).add(places.get(part, CARD))
            if kind is UNet2DConditionModel and part.training:
                used.setdefault("away in a step", set()).add(sum(place == "cpu" for place in places.values()))
            return original(part, *args, **options)

        monkeypatch.setattr(kind, method, watch)

    for kind, method in (
        (AutoencoderKL, "encode"),
        (AutoencoderKL, "decode"),
        (CLIPTextModel, "forward"),
        (UNet2DConditionModel, "forward"),
    ):
        watched(kind, method)
    train(
        build_run(
            {
                "output": str(tmp_path / "run"),
                "model": {"base": "tiny-sd15"},
                "adapter": {"rank": 2, "text_encoder_targets": "attention" if trains_text else None},
                "data": {"source": "shapes", "cache": cache},
                "shapes": {"num_pictures": 4},
                "training": {"steps": 2, "batch_size": 2},
                "evaluation": {
                    "validate_every": 1,
                    "sample_every": 1,
                    "validation_timesteps": 1,
                    "prompts": ["a red circle"],
                    "num_inference_steps": 1,
                },
            }
        )
    )
    parts = ("AutoencoderKL", "CLIPTextModel", "UNet2DConditionModel")
    assert used == {part: {CARD} for part in parts} | {"away in a step": {away}}


@pytest.mark.parametrize(("method", "of"), [("nf4", bnb.nn.Params4bit), ("int8", bnb.nn.Linear8bitLt)])
def test_moving_takes_what_quantized_layers_hold_beside_their_parameters(
    make, monkeypatch, method: str, of: type
) -> None:
    """bitsandbytes moves scales and codes with the weight (NF4) or with the layer (int8), so each of these must be asked: an int8
    layer's own `to` is not called where a model is moved as a whole."""
    encoder = load_base(ModelConfig(quantization=method), torch.device("cpu")).text_encoders["text_encoder"]
    ids = torch.arange(8)[None]
    with torch.no_grad():
        before = encoder(ids).last_hidden_state
    asked, original = [], of.to

    def watch(self, *args, **options):
        asked.append((self, torch.device(next(x for x in (*args, *options.values()) if x is not None))))
        return original(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(of, "to", watch)
        move(encoder, "cpu")
    layers = [layer for layer in encoder.modules() if isinstance(layer, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)]
    holders = [layer.weight if of is bnb.nn.Params4bit else layer for layer in layers]
    assert len(layers) >= 12
    assert {id(held) for held, _ in asked} == {id(held) for held in holders}
    assert {device for _, device in asked} == {torch.device("cpu")}
    with torch.no_grad():
        assert torch.equal(encoder(ids).last_hidden_state, before)
