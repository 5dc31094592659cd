"""New words: embeddings of their own behind a text encoder's frozen ones, trained beside an adapter, in files that other programs read.

Textual inversion (arXiv 2208.01618) learns what a new word means and leaves the model as it is; beside an adapter it is pivotal tuning (arXiv
2106.05744): the word says where to learn, the adapter how. A word of several vectors is as many tokens, called as diffusers calls
them: `<cat>`, `<cat>_1`, ...; `Components.spelled` writes them out in training, its pipelines by the same rule in drawing.

The new rows are a parameter of their own: optimizer, checkpoints and proof see it and nothing else of the embedding matrix, so neither
moments nor weight decay can touch another word.

What programs read of an embeddings file (read in ComfyUI's comfy/sd1_clip.py at 443393b, A1111's modules/textual_inversion at 22ecb78,
diffusers 0.42.1): SD1.x one tensor (vectors, width), which kohya's sd-scripts call `emb_params`; SDXL `clip_l` and `clip_g`. A1111 and ComfyUI
know the word by the file's name, diffusers by `token=`.

Leaves out: pickled embeddings (.pt, .bin), and those that lie in another program's adapter file (`bundle_emb`).
"""

import copy
import itertools
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from t2ilib.adapters.formats import read_metadata, write
from t2ilib.config import AdapterSpec, ConfigError
from t2ilib.models.components import Components
from t2ilib.models.families import tokenize

log = logging.getLogger(__name__)

VECTORS = "token_embedding.vectors"
"""How the name of the parameter ends that holds the rows of new words."""
KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
"""Text encoder -> its tensor in a file, where there are two."""
ALONE = "emb_params"
"""The tensor in a file, where there is one text encoder."""
WORD, WORDS = "t2ilib.word", "t2ilib.words"
"""Metadata: of an embeddings file its word; of an adapter's file, word -> the name of the embeddings file beside it."""

Embeddings = Mapping[str, Tensor]
"""Of one word: text encoder -> (vectors, width)."""


class TokenEmbedding(nn.Embedding):
    """A text encoder's token embedding with new rows behind it. `weight` (V, D): the base's own; `vectors` (N, D), float32: those of the
    ids from `first` on, which work in the base's precision."""

    def __init__(self, base: nn.Embedding, vectors: Tensor, first: int):
        super().__init__(base.num_embeddings, base.embedding_dim, base.padding_idx, _weight=base.weight, _freeze=True)
        self.weight = base.weight
        self.vectors, self.first = nn.Parameter(vectors), first

    def forward(self, ids: Tensor) -> Tensor:
        known = super().forward(ids.clamp(max=self.num_embeddings - 1))
        added = F.embedding((ids - self.first).clamp(min=0), self.vectors).to(known.dtype)
        return torch.where((ids >= self.first)[..., None], added, known)


def tokens_of(word: str, num_vectors: int) -> tuple[str, ...]:
    return (word, *(f"{word}_{i}" for i in range(1, num_vectors)))


def attach_tokens(components: Components, spec: AdapterSpec) -> dict[str, nn.Module]:
    """Adds `spec.tokens` to all text encoders, to be trained; returns these, {} without any. Raises ConfigError as `add_words` does."""
    if not spec.tokens:
        return {}
    started = {}
    for word, start in spec.tokens.items():
        started[word] = {
            name: starting_vectors(components.tokenizers[tokenizer_of(name)], embedding_of(encoder), start, spec.token_vectors)
            for name, encoder in components.text_encoders.items()
        }  # fmt: skip
    add_words(components, started)
    for encoder in components.text_encoders.values():
        embedding_of(encoder).vectors.requires_grad_(True)
    log.info(
        "%d new word(s) of %d vector(s) in %s: %s",
        len(started),
        spec.token_vectors,
        " and ".join(components.text_encoders),
        ", ".join(f"{word} from {start!r}" for word, start in spec.tokens.items()),
    )
    return dict(components.text_encoders)


@torch.no_grad()
def starting_vectors(tokenizer, embedding: nn.Embedding, text: str, num_vectors: int) -> Tensor:
    """(num_vectors, D): the embeddings of the tokens of `text`, spread over the vectors: of several that fall to one their mean, of one
    that falls to several each a copy."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    rows = embedding.weight[torch.tensor(ids, device=embedding.weight.device)].float()
    starts = [i * len(ids) // num_vectors for i in range(num_vectors + 1)]
    return torch.stack([rows[a : max(a + 1, b)].mean(0) for a, b in itertools.pairwise(starts)])


def add_words(components: Components, words: Mapping[str, Embeddings]) -> None:
    """Adds words, frozen, to the tokenizers and text encoders of `components`. Tokenizers become copies: others may hold the same ones.

    Raises ConfigError for a word that a tokenizer knows, that is a part of another, or whose vectors are of another model.
    """
    if not words:
        return
    for word, own in words.items():
        require_new(components, word, [other for other in words if other != word])
        require_fitting(components, word, own)
    components.tokenizers = {name: copy.deepcopy(tokenizer) for name, tokenizer in components.tokenizers.items()}
    for name, encoder in components.text_encoders.items():
        tokenizer, base = components.tokenizers[tokenizer_of(name)], embedding_of(encoder)
        tokens = [token for word, own in words.items() for token in tokens_of(word, len(own[name]))]
        tokenizer.add_tokens(tokens)
        vectors = torch.cat([own[name].to(base.weight.device, torch.float32) for own in words.values()])
        first = tokenizer.convert_tokens_to_ids(tokens[0])
        if isinstance(base, TokenEmbedding):
            vectors, first = torch.cat([base.vectors.detach(), vectors]), base.first
        encoder.set_input_embeddings(TokenEmbedding(base, vectors, first).requires_grad_(False))
        end_by_its_id(encoder, tokenizer)
    components.words |= {word: tokens_of(word, len(next(iter(own.values())))) for word, own in words.items()}


def require_new(components: Components, word: str, others: Sequence[str]) -> None:
    for tokenizer in components.tokenizers.values():
        vocabulary = tokenizer.get_vocab()
        if word in components.words:
            raise ConfigError(f"{word} has been added already: one file or adapter of it at a time")
        if word in vocabulary or f"{word}</w>" in vocabulary:
            raise ConfigError(
                f"{word} is a word that the text encoder of {components.path} knows, and what it means there would be lost: call the new one"
                f" otherwise, such as <{word}>"
            )
    if near := [other for other in (*others, *components.words) if word in other or other in word]:
        raise ConfigError(f"of {word} and {near[0]} one is a part of the other, and would be found in it: rename one")


def require_fitting(components: Components, word: str, own: Embeddings) -> None:
    widths = {name: embedding_of(encoder).embedding_dim for name, encoder in components.text_encoders.items()}
    given = {name: tuple(vectors.shape) for name, vectors in own.items()}
    if {name: shape[-1] for name, shape in given.items()} != widths or len({shape[0] for shape in given.values()}) > 1:
        raise ConfigError(
            f"the embeddings of {word} have shapes {given}, and the text encoders of {components.path} take {widths}: they are of"
            " another model"
        )


def end_by_its_id(encoder: nn.Module, tokenizer) -> None:
    """Has the pooled output be that of the end of text. SDXL's second encoder and others with an old config (`eos_token_id` 2) take the
    position of the largest id instead, which with new words would be that of one of these; A1111 and ComfyUI take the end."""
    for module in encoder.modules():
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = tokenizer.eos_token_id


def embedding_of(encoder: nn.Module) -> nn.Embedding:
    return encoder.get_input_embeddings()


def tokenizer_of(text_encoder: str) -> str:
    return text_encoder.replace("text_encoder", "tokenizer")


def require_in_captions(components: Components, captions: Iterable[str]) -> None:
    """Raises ConfigError for a word that none of `captions` has in the part that text encoders see, and for one that stands in a longer
    word, where it would be found too."""
    unseen, tokenizer = dict(components.words), next(iter(components.tokenizers.values()))
    plain = [word for word in unseen if re.fullmatch(r"\w+", word)]
    inside = re.compile("|".join(rf"(?<=\w){word}|{word}(?=\w)" for word in plain) or "(?!)")
    for caption in captions:
        if found := inside.search(caption):
            raise ConfigError(
                f"adapter.tokens: {found[0]} is also a part of a longer word of the caption {caption!r}, and would be found there: call it"
                f" otherwise, such as <{found[0]}>"
            )
        for word in [word for word in unseen if word in caption]:
            ids = tokenize(tokenizer, components.spelled([caption]))[0].tolist()
            if tokenizer.convert_tokens_to_ids(unseen[word][-1]) in ids:
                del unseen[word]
    if unseen:
        raise ConfigError(
            f"adapter.tokens: no training caption has {', '.join(unseen)} (as it is written there, and within the"
            f" {tokenizer.model_max_length} tokens that are seen), so nothing would be learned of it: write it into the captions, or put it"
            f" before all of them with data.captions: [trigger: {next(iter(unseen))}]"
        )


def last_step(spec: AdapterSpec, steps: int) -> int:
    """How many steps, from the first, new words learn in."""
    return max(1, round(spec.token_share * steps))


def drop_gradients(components: Components) -> None:
    """Of new words, so that an optimizer passes them over."""
    for encoder in components.text_encoders.values():
        embedding_of(encoder).vectors.grad = None


def distances(components: Components, start: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Word -> text encoder -> how far it is from `start` (component.parameter -> tensor), as a share of its length there."""
    moved: dict[str, dict[str, float]] = {word: {} for word in components.words}
    for name in components.text_encoders:
        before = next(tensor for key, tensor in start.items() if key.startswith(f"{name}.") and key.endswith(VECTORS))
        for word, now in rows_of(components, name).items():
            then = before[slice(*places(components, name)[word])]
            moved[word][name] = float((now - then).norm() / then.norm())
    return moved


def places(components: Components, name: str) -> dict[str, tuple[int, int]]:
    """Word -> its first row in `vectors` of a text encoder, and the row after its last."""
    tokenizer, first = components.tokenizers[tokenizer_of(name)], embedding_of(components.text_encoders[name]).first
    starts = {word: tokenizer.convert_tokens_to_ids(word) - first for word in components.words}
    return {word: (row, row + len(components.words[word])) for word, row in starts.items()}


def rows_of(components: Components, name: str) -> dict[str, Tensor]:
    """Word -> its vectors in a text encoder, on the host."""
    vectors = embedding_of(components.text_encoders[name]).vectors.detach().cpu()
    return {word: vectors[slice(*place)].clone() for word, place in places(components, name).items()}


def fold_words(components: Components) -> None:
    """Makes new words ordinary rows of the embedding matrices, so that a saved pipeline has them."""
    if not components.words:
        return
    for name, encoder in components.text_encoders.items():
        embedding = embedding_of(encoder)
        rows = torch.cat([embedding.weight[: embedding.first], embedding.vectors.to(embedding.weight)]).detach()
        encoder.set_input_embeddings(nn.Embedding.from_pretrained(rows))
        encoder.config.vocab_size = len(rows)
        encoder.config.eos_token_id = components.tokenizers[tokenizer_of(name)].eos_token_id


def file_names(words: Iterable[str]) -> dict[str, str]:
    """Word -> a file name that every system takes and that ComfyUI finds after `embedding:`; A1111 has that name for a word."""
    names: dict[str, str] = {}
    for word in words:
        plain = re.sub(r"[^\w.-]+", "_", word).strip("_.-") or "word"
        taken = {name.lower() for name in names.values()}
        names[word] = next(
            name for n in range(1, 2 + len(names)) if (name := plain + (f"-{n}" if n > 1 else "") + ".safetensors").lower() not in taken
        )  # fmt: skip
    return names


def save_words(components: Components, adapter: Path) -> dict[str, str]:
    """Writes the embeddings of every added word beside the file `adapter`, one file a word; returns the metadata that names them there.

    Raises ConfigError for a word whose file would have the adapter's name.
    """
    names = file_names(components.words)
    if adapter.name in names.values():
        raise ConfigError(
            f"{adapter} would also be the file of one of its words ({', '.join(names)}): name it otherwise"
        )
    for word, name in names.items():
        own = {encoder: rows_of(components, encoder)[word] for encoder in components.text_encoders}
        tensors = (
            {KEYS[e]: vectors for e, vectors in own.items()} if len(own) > 1 else {ALONE: next(iter(own.values()))}
        )
        told = {
            "format": "pt",
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": f"{components.family.architecture}/textual-inversion",
            "modelspec.implementation": "diffusers",
            "modelspec.title": word,
            "modelspec.trigger_phrase": word,
            "ss_sd_model_name": components.path,
            WORD: word,
        }
        write(adapter.with_name(name), tensors, told)
    return {WORDS: json.dumps(names, ensure_ascii=False)} if names else {}


def stored_words(adapter: Path) -> dict[str, Path]:
    """The words that an adapter's file names, and where their embeddings should lie."""
    told = json.loads(read_metadata(adapter).get(WORDS, "{}"))
    return {word: adapter.with_name(Path(name).name) for word, name in told.items()}


def read_words(components: Components, adapter: Path) -> dict[str, Embeddings]:
    """The words that an adapter's file says lie beside it; of one whose file does not a warning is left."""
    words, lacking = {}, {}
    for word, file in stored_words(adapter).items():
        if file.is_file():
            words[word] = read_embeddings(components, file)[1]
        else:
            lacking[word] = file.name
    if lacking:
        log.warning(
            "%s was trained together with %s, and %s %s not beside it: in prompts %s will mean nothing",
            adapter, ", ".join(lacking), ", ".join(lacking.values()), "is" if len(lacking) == 1 else "are", ", ".join(lacking),
        )  # fmt: skip
    return words


def load_embeddings(components: Components, file: Path) -> str:
    """Adds the word of one embeddings file to `components`, frozen; returns it. Raises ConfigError for a file that is none, or is of
    another model, and for a word that is there already."""
    word, own = read_embeddings(components, file)
    add_words(components, {word: own})
    return word


def read_embeddings(components: Components, file: Path) -> tuple[str, Embeddings]:
    """Word and vectors of a file, whoever wrote it. Its word is the one that it tells (in metadata, or as the name of its tensor, as
    diffusers' scripts write it), else the file's name."""
    if file.suffix.lower() != ".safetensors":
        raise ConfigError(f"{file} is no .safetensors file; others can run any code when they are opened")
    told, tensors = read_metadata(file), load_file(file)
    encoders = tuple(components.text_encoders)
    if len(encoders) > 1 and set(tensors) == {KEYS[name] for name in encoders}:
        named = {name: tensors[KEYS[name]] for name in encoders}
    elif len(encoders) == 1 and len(tensors) == 1:
        named = {encoders[0]: next(iter(tensors.values()))}
    else:
        keys = " and ".join(KEYS[name] for name in encoders) if len(encoders) > 1 else "one tensor"
        raise ConfigError(
            f"{file} holds {', '.join(sorted(tensors)[:4])}{' ...' * (len(tensors) > 4)}, and embeddings for {components.path} are {keys}"
        )
    key = next(iter(tensors)) if len(tensors) == 1 else ALONE
    word = told.get(WORD) or (file.stem if key == ALONE or "string_to_param" in key or key == "*" else key)
    return word.lower(), {name: vectors.float().reshape(-1, vectors.shape[-1]) for name, vectors in named.items()}
