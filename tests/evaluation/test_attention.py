"""Attention maps: shares that add up, of the attention that is really computed, beside a picture that is not changed by it."""

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor

from t2ilib.config import ConfigError, EvaluationConfig, ModelConfig
from t2ilib.evaluation.attention import attention_to_text, draw_with_attention, resized, shares_of, words_of
from t2ilib.evaluation.sampling import draw
from t2ilib.models.load import load_base

SETTINGS = EvaluationConfig(num_inference_steps=6, guidance_scale=2.0)
PROMPT = "a large red circle at the left on a white background"


@pytest.fixture(scope="module")
def components():
    return load_base(ModelConfig(base="tiny-sdxl"))


@pytest.fixture(scope="module")
def drawn(components):
    return draw_with_attention(components, PROMPT, SETTINGS)


def test_the_picture_is_the_one_that_is_drawn(components, drawn) -> None:
    (plain,) = draw(components, [PROMPT], SETTINGS)
    assert np.array_equal(np.asarray(plain), np.asarray(drawn.picture))
    assert not any(module._forward_pre_hooks for module in components.unet.modules())


def test_shares_of_all_positions_add_up_to_one(components) -> None:
    with attention_to_text(components.unet, (8, 8)) as found:
        draw(components, [PROMPT], SETTINGS)
    maps = found.mean()
    assert maps.shape == (components.tokenizers["tokenizer"].model_max_length, 8, 8)
    assert torch.allclose(maps.sum(0), torch.ones(8, 8), atol=1e-5)
    layers = sum(name.endswith("attn2") for name, _ in components.unet.named_modules())
    assert found.count == layers * SETTINGS.num_inference_steps


def test_a_word_is_looked_at_where_what_it_names_is_drawn(drawn) -> None:
    """The shape's word on the shape; not every word is looked at so by a network of this size, its colour's is not."""
    assert drawn.maps.shape == (len(drawn.tokens), 8, 8)
    red = np.asarray(drawn.picture.resize((8, 8)), dtype=float)
    object_there = torch.from_numpy((red[..., 0] > 150) & (red[..., 1] < 120))
    assert 3 < object_there.sum() < 40
    there = drawn.of("circle")
    assert there[object_there].mean() > 3 * there[~object_there].mean()


def test_shares_are_those_of_diffusers_own_attention() -> None:
    """The processor without fused kernels multiplies by exactly these: with values that are one-hot it gives them out."""
    torch.manual_seed(0)
    tokens, heads = 5, 2
    layer = Attention(query_dim=8, cross_attention_dim=tokens, heads=heads, dim_head=tokens, processor=AttnProcessor())
    hidden, text = torch.randn(1, 6, 8), torch.eye(tokens)[None]
    with torch.no_grad():
        layer.to_v.weight.copy_(torch.eye(tokens).repeat(heads, 1))
        layer.to_out[0].weight.zero_()
        layer.to_out[0].bias.zero_()
        layer.to_out[0].weight[:tokens] = torch.eye(tokens).repeat(1, heads) / heads
        given = layer(hidden, encoder_hidden_states=text)[0, :, :tokens]
        assert torch.allclose(shares_of(layer, hidden, text), given, atol=1e-6)


def test_places_are_rows_of_the_picture() -> None:
    shares = torch.arange(2 * 4.0)[:, None]  # 2 rows of 4 places
    assert resized(shares, (2, 4))[0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert resized(shares, (4, 8)).shape == (1, 4, 8)


def test_words_are_made_of_tokens() -> None:
    tokens = ["<|startoftext|>", "a</w>", "blue", "print</w>", "a</w>", "<|endoftext|>"]
    assert words_of(tokens) == {"a": (1, 4), "blueprint": (2, 3)}


def test_a_word_that_is_not_there_is_told(drawn) -> None:
    with pytest.raises(ConfigError, match=r"no word 'green': its words are a, large, .*background"):
        drawn.of("green")
    assert set(drawn.words) == set(PROMPT.split())
