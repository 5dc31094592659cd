"""The VAE of the user's choice: from a folder, a pipeline, a file; with its own scale; refused where it does not go with the base."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from t2ilib.config import ConfigError, EvaluationConfig, ModelConfig
from t2ilib.evaluation.sampling import draw
from t2ilib.models.files.locate import SHIPPED
from t2ilib.models.files.original import vae_tensors
from t2ilib.models.load import load_base

CPU = torch.device("cpu")
OWN = SHIPPED["tiny-sdxl"] / "vae"
CONFIG = json.loads((OWN / "config.json").read_text())


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """A VAE of the tiny one's architecture with other weights and another scaling factor."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    diffusers.AutoencoderKL.from_config(CONFIG | {"scaling_factor": 0.5}).save_pretrained(folder)
    return folder


def with_vae(vae: str | Path, **options):
    return load_base(ModelConfig(vae=str(vae), **options), CPU)


def refused(vae: str | Path, **options) -> str:
    with pytest.raises(ConfigError) as error:
        with_vae(vae, **options)
    return str(error.value)


def weights(vae) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in vae.state_dict().items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in ours.items())


def test_a_folder_replaces_the_vae_and_brings_its_scale(other: Path) -> None:
    components = with_vae(other, dtype="bfloat16")
    assert same(weights(components.vae), load_file(other / "diffusion_pytorch_model.safetensors"))
    assert components.vae.config.scaling_factor == 0.5
    assert components.vae.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in components.vae.parameters())
    settings = EvaluationConfig(num_inference_steps=1)
    assert draw(with_vae(other), ["a red circle"], settings)[0].size == (64, 64)


def test_a_pipeline_folder_or_shipped_name_gives_its_vae() -> None:
    own = load_base(ModelConfig(), CPU)
    for name in ("tiny-sdxl", SHIPPED["tiny-sdxl"]):
        chosen = with_vae(name)
        assert same(weights(chosen.vae), weights(own.vae))
        assert chosen.vae.config.scaling_factor == own.vae.config.scaling_factor


def test_a_file_is_read_in_either_layout_and_keeps_the_bases_scale(other: Path, tmp_path: Path) -> None:
    vae = diffusers.AutoencoderKL.from_pretrained(other)
    original = {name: x.contiguous() for name, x in vae_tensors(vae, "").items()}
    layouts = {
        "bare": original,
        "whole": {f"first_stage_model.{name}": x for name, x in original.items()},
        "matrices": {
            k: x[:, :, 0, 0].contiguous() if ".attn_1." in k and x.ndim == 4 else x for k, x in original.items()
        },
        "diffusers": vae.state_dict(),
        "diffusers_within": {f"vae.{name}": x for name, x in vae.state_dict().items()}
        | {"unet.conv_in.bias": torch.ones(1)},
    }
    for name, tensors in layouts.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        chosen = with_vae(tmp_path / f"{name}.safetensors")
        assert same(weights(chosen.vae), weights(vae)), name
        assert chosen.vae.config.scaling_factor == CONFIG["scaling_factor"]


def test_a_base_whose_own_vae_is_missing_loads_with_another(other: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(SHIPPED["tiny-sdxl"], tmp_path / "model")
    (tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert with_vae(other, base=str(tmp_path / "model")).vae.config.scaling_factor == 0.5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latent_channels": 16}, "has 16 latent channels where model.base tiny-sdxl has 4"),
        (
            {k: CONFIG[k][:2] for k in ("down_block_types", "up_block_types", "block_out_channels")},
            "has 2 pixels a latent, along one side, where model.base tiny-sdxl has 8",
        ),
    ],
)
def test_latents_of_another_shape_are_refused(tmp_path: Path, changes: dict, words: str) -> None:
    vae = diffusers.AutoencoderKL.from_config(CONFIG | changes)
    vae.save_pretrained(tmp_path / "vae")
    message = refused(tmp_path / "vae")
    assert message == f"model.vae {tmp_path / 'vae'} {words}: choose a VAE that was made for this base"
    save_file({k: x.contiguous() for k, x in vae_tensors(vae, "").items()}, tmp_path / "vae.safetensors")
    assert (
        "16 latent channels" if "latent_channels" in changes else "is not built as the VAE of model.base"
    ) in refused(tmp_path / "vae.safetensors")


def test_what_is_no_vae_is_refused(other: Path, tmp_path: Path) -> None:
    assert "lacks config.json and diffusion_pytorch_model.safetensors" in refused(tmp_path)
    save_file({"unet": torch.zeros(2)}, tmp_path / "unet.safetensors")
    assert "holds no VAE: it has no tensor decoder.conv_in.weight" in refused(tmp_path / "unet.safetensors")
    (tmp_path / "vae.pt").write_bytes(b"")
    assert "model.vae" in refused(tmp_path / "vae.pt")
    assert "is a pickle" in refused(tmp_path / "vae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny"}))
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(
        (other / "diffusion_pytorch_model.safetensors").read_bytes()
    )
    assert "is a AutoencoderTiny; Stable Diffusion's VAEs are of the class AutoencoderKL" in refused(tmp_path)
    assert refused("owner/vae").startswith("model.vae owner/vae is not in the local cache, and HF_HUB_OFFLINE=1")
