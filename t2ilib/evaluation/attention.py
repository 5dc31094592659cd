"""Where a picture attends to which word, while it is drawn: the UNet's cross attention, over all layers, heads and sampling steps.

What DAAM does (Tang et al., arXiv 2210.04885, section 3.1): every layer's attention of places to tokens, softmax(Q K^T / sqrt(d)), is resized to
the latents and added up. Here it is divided by their number, so that at each place the shares of all tokens still add up to one. It is
computed beside the network's own attention, whose kernels never hold it, so the picture is the one that `draw` gives. That a place looks
at a word says where the network reads, not what it makes of it.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from t2ilib.config import ConfigError, EvaluationConfig
from t2ilib.evaluation.sampling import DRAW_SEED, draw
from t2ilib.models.components import Components


@dataclass(frozen=True)
class AttentionMaps:
    """`tokens`: those of the prompt, T of them, with the marks of its beginning and end, without the padding behind; `words`: the tokens of
    each word, by number; `maps`: (T, h, w), the share of its attention that each latent gives to each token."""

    picture: Image.Image
    tokens: tuple[str, ...]
    words: dict[str, tuple[int, ...]]
    maps: Tensor

    def of(self, word: str) -> Tensor:
        """The map (h, w) of a word of the prompt, in all places where it stands. Raises ConfigError for one that it has not."""
        if word not in self.words:
            raise ConfigError(f"the prompt has no word {word!r}: its words are {', '.join(self.words)}")
        return self.maps[list(self.words[word])].sum(0)


def draw_with_attention(
    components: Components,
    prompt: str,
    settings: EvaluationConfig,
    seed: int = DRAW_SEED,
    resolution: int | None = None,
) -> AttentionMaps:
    """The picture that `draw` gives for `prompt`, and where it attends to which of its words."""
    side = resolution or components.unet.config.sample_size * components.vae_scale
    shape = (side // components.vae_scale,) * 2
    with attention_to_text(components.unet, shape) as found:
        (picture,) = draw(components, [prompt], settings, seed, resolution=resolution)
    tokenizer = next(iter(components.tokenizers.values()))
    (spelled,) = components.spelled([prompt])
    encoded = tokenizer(spelled, truncation=True, max_length=tokenizer.model_max_length)
    tokens = tokenizer.convert_ids_to_tokens(encoded.input_ids)
    return AttentionMaps(picture, tuple(tokens), words_of(tokens), found.mean()[: len(tokens)])


class Mean:
    """Of tensors of one shape."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def add(self, value: Tensor) -> None:
        self.total = value if self.total is None else self.total + value
        self.count += 1

    def mean(self) -> Tensor:
        """Raises ConfigError where there was none."""
        if self.total is None:
            raise ConfigError("this UNet has no cross attention, so it never looks at the text word by word")
        return self.total / self.count


@contextlib.contextmanager
def attention_to_text(unet: nn.Module, shape: tuple[int, int]) -> Iterator[Mean]:
    """Gathers the attention to every position of the text, (T, *shape), of all calls within the scope: of their last row, which with
    guidance is that of the prompt."""
    found = Mean()

    def note(layer: nn.Module, arguments: tuple, named: dict) -> None:
        hidden = arguments[0] if arguments else named["hidden_states"]
        text = named.get("encoder_hidden_states")
        if text is not None and hidden.ndim == 3:
            found.add(resized(shares_of(layer, hidden[-1:], text[-1:]), shape))

    layers = [module for name, module in unet.named_modules() if name.rpartition(".")[2] == "attn2"]
    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def shares_of(layer: nn.Module, hidden: Tensor, text: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d)) of one `Attention` of diffusers, averaged over its heads: (Q, T), of hidden states (1, Q, C) and text
    (1, T, D)."""
    query = layer.head_to_batch_dim(layer.to_q(hidden))
    key = layer.head_to_batch_dim(layer.to_k(text))
    return layer.get_attention_scores(query, key).float().mean(0)


def resized(shares: Tensor, shape: tuple[int, int]) -> Tensor:
    """(Q, T), places by rows of a picture of the proportions of `shape`, to (T, *shape)."""
    height = round(math.sqrt(len(shares) * shape[0] / shape[1]))
    maps = shares.t().reshape(1, shares.shape[1], height, -1)
    return F.interpolate(maps, shape, mode="bilinear", align_corners=False)[0].cpu()


def words_of(tokens: list[str]) -> dict[str, tuple[int, ...]]:
    """Word -> the numbers of its tokens, of CLIP's tokens, the last of a word ending in `</w>`; marks are none."""
    words: dict[str, tuple[int, ...]] = {}
    begun: list[int] = []
    for number, token in enumerate(tokens):
        if token.startswith("<|"):
            continue
        begun.append(number)
        if token.endswith("</w>"):
            word = "".join(tokens[i] for i in begun).removesuffix("</w>")
            words[word] = words.get(word, ()) + tuple(begun)
            begun = []
    return words
