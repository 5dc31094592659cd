"""A fresh UNet between frozen parts: which parts those are, that its weights are the seed's, and what cannot go together."""

from pathlib import Path

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, PNDMScheduler
from safetensors.torch import load_file

from t2ilib.config import ConfigError, ModelConfig, ScratchConfig
from t2ilib.models import load, scratch
from t2ilib.models.families import FAMILIES
from t2ilib.models.files.layouts import NOISE
from t2ilib.models.files.locate import SHIPPED
from t2ilib.models.load import load_base
from t2ilib.models.pipeline import save_pipeline
from t2ilib.models.scratch import build_base, fresh_scheduler
from t2ilib.models.sizes import SIZES
from t2ilib.runfile import build_run

CPU = torch.device("cpu")


def begun(resolution: int = 64, seed: int = 0, base: str = "tiny-sdxl", vae: str | None = None, smaller=(), **options):
    config = ScratchConfig(**({"unet": "tiny"} | options))
    return build_base(ModelConfig(base=base, vae=vae), config, resolution, seed, CPU, smaller)


def refused(*arguments, **options) -> str:
    with pytest.raises(ConfigError) as error:
        begun(*arguments, **options)
    return str(error.value)


def same(first, second) -> bool:
    tensors = (first.state_dict(), second.state_dict())
    return tensors[0].keys() == tensors[1].keys() and all(torch.equal(x, tensors[1][n]) for n, x in tensors[0].items())


def test_weights_are_the_seeds_and_disturb_nothing() -> None:
    torch.manual_seed(5)
    expected = torch.randn(2)
    torch.manual_seed(5)
    first = begun()
    assert torch.equal(torch.randn(2), expected)
    assert same(first.unet, begun().unet)
    assert not same(first.unet, begun(seed=1).unet)


def test_the_rest_is_the_bases_frozen(monkeypatch) -> None:
    read = []
    monkeypatch.setattr(load, "folder_bytes", lambda files, dtype: read.extend(files) or 0)
    found, base = begun(), load_base(ModelConfig(), CPU)
    assert read[:3] == ["vae", "text_encoder", "text_encoder_2"], "the base's UNet is not read"
    assert found.family is FAMILIES["sdxl"]
    assert found.zero_empty
    assert same(found.vae, base.vae)
    for name, encoder in base.text_encoders.items():
        assert same(found.text_encoders[name], encoder)
    assert not same(found.unet, base.unet)
    assert found.scheduler.config == base.scheduler.config
    assert not any(p.requires_grad for part in (*found.modules().values(), found.vae) for p in part.parameters())


def test_with_a_text_encoder_of_its_own_a_model_is_tiny_sd15() -> None:
    found, shipped = begun(text_encoder="tiny-sdxl"), load_base(ModelConfig(base="tiny-sd15"), CPU)
    assert found.family is shipped.family
    assert same(found.vae, shipped.vae)
    assert same(found.text_encoders["text_encoder"], shipped.text_encoders["text_encoder"])
    words = ["a red circle on a blue background"]
    assert torch.equal(*(parts.encode_text(words)["encoder_hidden_states"] for parts in (found, shipped)))
    assert {n: x.shape for n, x in found.unet.state_dict().items()} == {
        n: x.shape for n, x in shipped.unet.state_dict().items()
    }
    assert found.scheduler.config == shipped.scheduler.config
    assert not found.zero_empty


def test_pixels_need_neither_vae_nor_second_encoder(monkeypatch) -> None:
    read = []
    monkeypatch.setattr(load, "folder_bytes", lambda files, dtype: read.extend(files) or 0)
    found = begun(32, space="pixels")
    assert read == ["text_encoder"]
    assert list(found.text_encoders) == ["text_encoder"]
    assert list(found.tokenizers) == ["tokenizer"]
    assert (found.vae_scale, found.side_multiple, found.unet.config.sample_size) == (1, 8, 32)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    seen = found.encode_pictures(pixels)
    assert (seen.min(), seen.max()) >= (-1, 1)
    assert torch.equal(((found.decode_latents(seen) + 1) * 127.5).round().byte(), pixels)
    assert torch.equal(found.decode_latents(seen, tiled=True), seen)


def test_another_vae_need_not_be_like_the_bases(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(**blocks, block_out_channels=(32, 32), latent_channels=8, norm_num_groups=16).save_pretrained(
        tmp_path
    )
    found = begun(16, vae=str(tmp_path))
    assert (found.vae_scale, found.unet.config.in_channels, found.unet.config.sample_size) == (2, 8, 8)
    with pytest.raises(ConfigError, match="8 latent channels"):
        load_base(ModelConfig(vae=str(tmp_path)), CPU)


@pytest.mark.parametrize("space", ["latents", "pixels"])
def test_a_base_without_a_schedule_of_use_gives_way_to_ddim(space: str) -> None:
    family = FAMILIES["sd15" if space == "latents" else "pixels"]
    found = fresh_scheduler(EDMDPMSolverMultistepScheduler(), family)
    assert NOISE.items() <= dict(found.config).items()
    pndm = PNDMScheduler(beta_schedule="linear", prediction_type="v_prediction", skip_prk_steps=True)
    kept = fresh_scheduler(pndm, family)
    assert (kept is pndm) == (space == "latents")
    assert (kept.config.beta_schedule, kept.config.prediction_type) == ("linear", "v_prediction")
    assert type(found).__name__ == "DDIMScheduler"
    assert found.config.thresholding == (space == "pixels")


@pytest.mark.parametrize(("unet", "halvings"), [("small", 1), ("base", 3)])
def test_sides_are_halved_evenly(unet: str, halvings: int, monkeypatch) -> None:
    tiny = {
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "block_out_channels": (8,) * (halvings + 1),
        "attention_head_dim": 2,
    }
    monkeypatch.setitem(SIZES, unet, tiny)
    multiple = 8 * 2**halvings
    assert begun(2 * multiple, unet=unet).side_multiple == min(64, multiple)
    text = refused(multiple + 8, unet=unet)
    assert f"data.resolution {multiple + 8} is no multiple of {multiple}" in text
    assert "8 pixels a latent" in text
    assert f"data.stages {multiple // 2}" in refused(2 * multiple, unet=unet, smaller=(multiple // 2,))


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.vae is about latents, and scratch.space is pixels"):
        build_run({"scratch": {"space": "pixels"}, "model": {"vae": "tiny-sdxl"}})
    model = tmp_path / "pixels"
    save_pipeline(begun(16, space="pixels"), model)
    assert "works on pixels and has no VAE" in refused(base=str(model))
    assert "works on pixels and has no VAE" in refused(base=str(model), vae="tiny-sdxl")
    assert begun(16, base=str(model), space="pixels").family.name == "pixels"


def test_the_shipped_unet_has_the_shapes_of_a_fresh_one() -> None:
    shipped = load_file(SHIPPED["tiny-sdxl"] / "unet" / "diffusion_pytorch_model.safetensors")
    assert {name: x.shape for name, x in begun().unet.state_dict().items()} == {n: x.shape for n, x in shipped.items()}
    assert scratch.unused_parts(ScratchConfig()) == ("unet",)
