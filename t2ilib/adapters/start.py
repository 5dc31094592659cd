"""Going on from an adapter that is there: its weights, and those of the words beside it, are what training begins from.

The file is attached as it would be for drawing, whatever its layout, read, and taken off again; then the run's own adapter is attached as
always and gets these numbers. So a run that goes on has the layers that its config says, or is refused.

Of alpha / rank times B A only the product acts. Where the file's factor is another than the run's, B takes the quotient: the update is the
same, and with it DoRA's norm.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from t2ilib.adapters.attach import attach_adapters, some
from t2ilib.adapters.formats import read_metadata
from t2ilib.adapters.load import BETA_SCHEDULE, PREDICTIONS, ZERO_TERMINAL_SNR, adapter_file, attach_layers
from t2ilib.adapters.tokens import Embeddings, embedding_of, places, read_words, stored_words
from t2ilib.adapters.weights import AdapterLayer, read_layers
from t2ilib.config import AdapterSpec, ConfigError
from t2ilib.models.components import Components
from t2ilib.models.pipeline import build_pipeline, quiet_libraries

log = logging.getLogger(__name__)

NAME = "start"
Key = tuple[str, str]
"""Component and module."""


def attach_started(components: Components, spec: AdapterSpec, seed: int) -> dict[str, nn.Module]:
    """`attach_adapters`, with the weights of `spec.start` in place of fresh ones.

    Raises ConfigError as that does, for a file that cannot be read, and for one whose kind, layers, ranks or words are not those of `spec`.
    """
    file = adapter_file(spec.start)
    warn_of_other_noise(components, file)
    attach_layers(components, file, NAME)
    stored = {(layer.component, layer.module): layer for layer in read_layers(components, name=NAME)}
    with quiet_libraries():
        build_pipeline(components).unload_lora_weights()
    words = read_words(components, file)
    adapted = attach_adapters(components, spec, seed)
    require_same_layers(components, stored, words, spec, file)
    put_layers(components, stored)
    put_words(components, words)
    log.info("adapter: %d layers%s start from %s", len(stored), f" and {', '.join(words)}" if words else "", file)
    return adapted


def content_of(path: Path) -> str:
    """SHA-256 of an adapter's file, with those of the words beside it."""
    file = adapter_file(path)
    digest = hashlib.sha256()
    for part in (file, *filter(Path.is_file, stored_words(file).values())):
        with part.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def require_same_layers(
    components: Components,
    stored: Mapping[Key, AdapterLayer],
    words: Mapping[str, Embeddings],
    spec: AdapterSpec,
    file: Path,
) -> None:
    """Raises ConfigError with every difference between what is stored and what `spec` attached."""
    attached = {(layer.component, layer.module): layer for layer in read_layers(components)}
    told = []
    kinds = {"dora" if layer.magnitude is not None else "lora" for layer in stored.values()}
    if kinds != {spec.kind}:
        told.append(f"it is a {' and '.join(sorted(kinds))}, and adapter.kind is {spec.kind}")
    for keys, what in (
        (attached.keys() - stored.keys(), "lacks"),
        (stored.keys() - attached.keys(), "has beside them"),
    ):
        if keys:
            told.append(f"it {what} {len(keys)} layers ({some(named(keys))})")
    other = {key: (stored[key].rank, attached[key].rank) for key in stored.keys() & attached.keys()}
    ranks = Counter(pair for pair in other.values() if pair[0] != pair[1])
    for (found, asked), count in sorted(ranks.items()):
        where = [key for key, pair in other.items() if pair == (found, asked)]
        told.append(f"its rank is {found} and not {asked} on {count} layers ({some(named(where))})")
    if lost := [word for word in words if word not in spec.tokens]:
        told.append(f"it was trained together with {', '.join(lost)}, which adapter.tokens must name too")
    sizes = {word: len(next(iter(own.values()))) for word, own in words.items()}
    if uneven := [
        f"{word} is {n} vectors" for word, n in sizes.items() if word in spec.tokens and n != spec.token_vectors
    ]:
        told.append(f"its {', '.join(uneven)}, and adapter.token_vectors is {spec.token_vectors}")
    if told:
        raise ConfigError(
            f"adapter.start {file} is not of the layers that the adapter section says: {'; '.join(told)}. Set the section to what the"
            " file is, or start anew"
        )


def named(keys: Sequence[Key]) -> list[str]:
    return sorted(".".join(key) for key in keys)


@torch.no_grad()
def put_layers(components: Components, stored: Mapping[Key, AdapterLayer]) -> None:
    factors = Counter()
    for (component, module), kept in stored.items():
        layer = components.modules()[component].get_submodule(module)
        ratio = kept.alpha / kept.rank / float(layer.scaling["default"])
        factors[ratio] += 1
        layer.lora_A["default"].weight.copy_(kept.down)
        layer.lora_B["default"].weight.copy_(kept.up * ratio)
        if kept.magnitude is not None:
            magnitude = layer.lora_magnitude_vector["default"].weight
            magnitude.copy_(kept.magnitude.view_as(magnitude))
    if others := {ratio: count for ratio, count in factors.items() if abs(ratio - 1) > 1e-6}:
        told = ", ".join(f"{ratio:g} ({count} layers)" for ratio, count in others.items())
        log.info("adapter.start has another alpha than the run: B is multiplied by %s, the update stays the same", told)


@torch.no_grad()
def put_words(components: Components, words: Mapping[str, Embeddings]) -> None:
    for name, encoder in components.text_encoders.items() if words else ():
        vectors, where = embedding_of(encoder).vectors, places(components, name)
        for word, own in words.items():
            vectors[slice(*where[word])] = own[name].to(vectors)


def warn_of_other_noise(components: Components, file: Path) -> None:
    """Warns of an adapter that says that it was trained for another prediction, beta schedule or end of it than the run has."""
    told, config = read_metadata(file), components.scheduler.config
    said = {
        "prediction": (PREDICTIONS.get(told.get("modelspec.prediction_type", "")), config.prediction_type),
        "beta schedule": (told.get(BETA_SCHEDULE), config.beta_schedule),
        "zero terminal SNR": (told.get(ZERO_TERMINAL_SNR), str(bool(config.get("rescale_betas_zero_snr")))),
    }
    for what, (before, now) in said.items():
        if before not in (None, now):
            log.warning("adapter.start was trained with %s %s, and this run has %s", what, before, now)
