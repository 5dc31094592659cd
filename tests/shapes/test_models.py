"""The shipped tiny models: real ones to diffusers, small, quantizable, and they draw what they are asked."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from t2ilib.config import EvaluationConfig, ModelConfig
from t2ilib.evaluation.clip import clip_scores
from t2ilib.evaluation.sampling import draw
from t2ilib.models.files.locate import SHIPPED
from t2ilib.models.load import load_base
from t2ilib.shapes import checker, models, world
from t2ilib.shapes.card import accuracy, reconstruction_accuracy

FOLDER = SHIPPED["tiny-sdxl"]
both = pytest.mark.parametrize("name", SHIPPED)


@pytest.fixture(scope="module")
def components():
    return load_base(ModelConfig(base="tiny-sdxl"))


def test_are_small() -> None:
    sizes = {
        name: sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        for name, folder in SHIPPED.items()
    }
    assert sizes["tiny-sdxl"] <= 16e6
    assert sum(sizes.values()) <= 24e6


@both
def test_diffusers_alone_loads_and_draws(tmp_path: Path, name: str) -> None:
    kind = {"tiny-sdxl": "StableDiffusionXLPipeline", "tiny-sd15": "StableDiffusionPipeline"}[name]
    code = (
        f"import sys; from diffusers import {kind} as P;"
        "p = P.from_pretrained(sys.argv[1], use_safetensors=True);"
        "p('a small red circle', num_inference_steps=2).images[0].save(sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, str(SHIPPED[name]), str(tmp_path / "a.png")], check=True, cwd=tmp_path)
    assert (tmp_path / "a.png").exists()


def test_has_the_parts_of_sdxl(components) -> None:
    unet = components.unet.config
    assert unet.addition_embed_type == "text_time"
    assert unet.use_linear_projection
    assert unet.cross_attention_dim == sum(e.config.hidden_size for e in components.text_encoders.values())
    assert type(components.text_encoders["text_encoder_2"]).__name__ == "CLIPTextModelWithProjection"
    assert components.vae.config.latent_channels == 4
    latents = components.vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mode()
    assert latents.shape == (1, 4, 8, 8)


def test_has_the_parts_of_sd15() -> None:
    components = load_base(ModelConfig(base="tiny-sd15"))
    unet = components.unet.config
    assert unet.addition_embed_type is None
    assert not unet.use_linear_projection
    assert type(components.unet.down_blocks[0].attentions[0].proj_in) is nn.Conv2d
    assert list(components.text_encoders) == ["text_encoder"]
    assert unet.cross_attention_dim == components.text_encoders["text_encoder"].config.hidden_size


@both
def test_every_linear_layer_is_quantized(name: str) -> None:
    components = load_base(ModelConfig(base=name, quantization="nf4"))
    for name, module in components.modules().items():
        left = [n for n, layer in module.named_modules() if type(layer) is nn.Linear]
        assert left == [], f"{name} keeps {left}"


def test_captions_fit_the_tokenizer_word_by_word(components) -> None:
    tokenizer = components.tokenizers["tokenizer"]
    for scene in world.mixed_scenes(300, "train", 0, ("base", *world.CONCEPTS)):
        for phrasing in range(4):
            text = world.caption(scene, phrasing)
            pieces = tokenizer.tokenize(text)
            assert len(pieces) + 2 <= models.MAX_TOKENS
            assert len(pieces) == len(text.replace(",", " ,").replace(":", " :").split()), text
    assert tokenizer.unk_token_id not in tokenizer("zebra über 7", add_special_tokens=False).input_ids


@both
def test_draws_what_it_is_asked(name: str) -> None:
    """On test prompts, none of whose combinations was trained on. The card has the figures for 256 pictures."""
    result = accuracy(load_base(ModelConfig(base=name)), "test", 64, 1.5)
    for name, share in result.accuracy.items():
        assert share >= 0.9, name
        assert name in ("fill", "style") or share > 2 * result.chance[name], name
    assert result.all_attributes >= 0.8


def test_autoencoder_keeps_the_attributes(components) -> None:
    assert reconstruction_accuracy(components, ("base",)) >= 0.97


def test_has_not_seen_the_concepts(components) -> None:
    for concept in world.CONCEPTS:
        scenes = world.mixed_scenes(12, "test", 0, [concept])
        pictures = draw(components, [world.caption(scene) for scene in scenes], EvaluationConfig(guidance_scale=1.5))
        assert np.mean([concept in checker.read(picture).values() for picture in pictures]) < 0.5, concept


def test_clip_tells_captions_apart(components) -> None:
    from transformers import AutoTokenizer, CLIPModel

    clip, tokenizer = CLIPModel.from_pretrained(FOLDER / "clip").float(), AutoTokenizer.from_pretrained(FOLDER / "clip")
    scenes = world.sample_scenes(40, "test", 0)
    pictures = [world.render(scene, 0) for scene in scenes]
    texts = [world.caption(scene) for scene in scenes]
    right, wrong = (
        np.mean(clip_scores(clip, tokenizer, pictures, texts)),
        np.mean(clip_scores(clip, tokenizer, pictures, texts[1:] + texts[:1])),
    )
    assert right > wrong + 20
