"""From an AdapterSpec to module names: which layers of a real model a target means, and how large the adapter will be.

A target is a name from TARGETS, a list of module name endings, or a regular expression over whole names. Whatever it is,
every part of it must match something: an adapter that silently matched nothing has cost others months.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from torch import nn

from t2ilib.config import AdapterSpec, ConfigError, check_choice
from t2ilib.models.components import Components
from t2ilib.models.families import unused_text_layers

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
MANY = (
    *ATTENTION,
    "ff.net.0.proj",
    "ff.net.2",
    "proj_in",
    "proj_out",
    "conv1",
    "conv2",
    "conv_shortcut",
    "time_emb_proj",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
)
TARGETS: dict[str, dict[str, tuple[str, ...]]] = {
    "attention": {"unet": ATTENTION, "text": ("q_proj", "k_proj", "v_proj", "out_proj")},
    "many": {"unet": MANY, "text": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")},
}
"""Name -> module name endings, in a UNet and in a CLIP text encoder."""

OPTIONAL = frozenset({"proj_in", "proj_out", "conv_shortcut"})
"""Endings that some UNets do not have (no shortcut where widths agree); their absence is not an error in a named target."""


def match_modules(model: nn.Module, component: str, target: str | tuple[str, ...]) -> list[str]:
    """Names of the linear and convolution layers that `target` means in one component, in model order.

    Raises ConfigError for a target, or a part of one, that matches no layer; it names the endings there are.
    """
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    kind = "unet" if component == "unet" else "text"
    if isinstance(target, str) and target not in TARGETS:
        return match_pattern(layers, component, target)
    endings = TARGETS[target][kind] if isinstance(target, str) else target
    missing = [e for e in endings if not any(ends(name, e) for name in layers)]
    missing = [e for e in missing if not (isinstance(target, str) and e in OPTIONAL)]
    if missing:
        raise ConfigError(
            f"adapter target {', '.join(missing)} matches no layer of {component}; it has {known_endings(layers)}"
        )
    return [name for name in layers if any(ends(name, ending) for ending in endings)]


def match_pattern(layers: list[str], component: str, pattern: str) -> list[str]:
    if re.fullmatch(r"\w+", pattern) and not any(ends(name, pattern) for name in layers):
        check_choice(
            pattern, TARGETS, "adapter target (neither a name, nor a list, nor a regular expression that matches):"
        )
    try:
        matched = [name for name in layers if re.fullmatch(pattern, name) or ends(name, pattern)]
    except re.error as error:
        raise ConfigError(f"adapter target {pattern!r} is not a regular expression: {error}") from None
    if not matched:
        raise ConfigError(f"adapter target {pattern!r} matches no layer of {component}; it has {known_endings(layers)}")
    return matched


def ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)


def known_endings(layers: list[str]) -> str:
    counts = Counter(re.sub(r"^.*\.(?=[a-z])", "", name) for name in layers)
    return ", ".join(f"{ending} ({count})" for ending, count in counts.most_common(14))


def matches(name: str, pattern: str) -> bool:
    """Whether `pattern` is the name, an ending of it, or a regular expression over the whole of it; ConfigError if it is none."""
    try:
        return ends(name, pattern) or re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ConfigError(f"adapter pattern {pattern!r} is not a regular expression: {error}") from None


def resolve_targets(components: Components, spec: AdapterSpec) -> dict[str, list[str]]:
    """Component -> names of the layers to adapt, without what `exclude` names and text layers whose output the UNet never sees.

    Raises ConfigError for targets and exclusions that match nothing.
    """
    targets = {"unet": match_modules(components.unet, "unet", spec.targets)}
    if spec.text_encoder_targets is not None:
        unused = unused_text_layers(components.family, components.text_encoders)
        for name, encoder in components.text_encoders.items():
            matched = match_modules(encoder, name, spec.text_encoder_targets)
            targets[name] = [module for module in matched if not f"{name}.{module}.".startswith(unused or ("\0",))]
    require_matches(spec.exclude, targets, "adapter.exclude")
    kept = {name: [m for m in found if not any(matches(m, p) for p in spec.exclude)] for name, found in targets.items()}
    emptied = [name for name, found in kept.items() if not found]
    if emptied:
        raise ConfigError(f"adapter.exclude leaves no layer of {', '.join(emptied)} to adapt")
    return kept


def require_matches(patterns: Iterable[str], targets: dict[str, list[str]], field: str) -> None:
    layers = [module for modules in targets.values() for module in modules]
    idle = [pattern for pattern in patterns if not any(matches(module, pattern) for module in layers)]
    if idle:
        raise ConfigError(
            f"{field} {', '.join(idle)} matches none of the adapted layers; they are {known_endings(layers)}"
        )


def resolve_sizes(components: Components, spec: AdapterSpec) -> dict[str, dict[str, tuple[int, float]]]:
    """Component -> layer -> (rank, alpha). Raises ConfigError for patterns of `ranks` and `alphas` that match nothing."""
    targets = resolve_targets(components, spec)
    require_matches(spec.ranks, targets, "adapter.ranks")
    require_matches(spec.alphas, targets, "adapter.alphas")
    sizes = {}
    for component, modules in targets.items():
        rank, alpha = spec.rank, spec.alpha
        if component != "unet":
            rank, alpha = spec.text_encoder_rank or rank, spec.text_encoder_alpha or alpha
        sizes[component] = {
            module: (
                next((value for pattern, value in spec.ranks.items() if matches(module, pattern)), rank),
                next((value for pattern, value in spec.alphas.items() if matches(module, pattern)), alpha),
            )
            for module in modules
        }
    return sizes


@dataclass(frozen=True)
class AdapterRow:
    """One layer that an adapter would be attached to. `shape` is that of its weight, `parameters` those of the adapter."""

    component: str
    module: str
    layer: str
    shape: tuple[int, ...]
    rank: int
    parameters: int


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """Of a linear layer or convolution as it was before quantization: (out, in), or (out, in / groups, kh, kw)."""
    if isinstance(layer, nn.Conv2d):
        return (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    return (layer.out_features, layer.in_features)


def adapter_table(components: Components, spec: AdapterSpec) -> list[AdapterRow]:
    """Every layer that `spec` means, with the adapter's parameters on it; needs shapes only, so the meta device will do.

    Rank r on a linear layer is r (in + out) parameters; on a convolution of kernel k, whose A is a convolution of the same
    kernel and whose B is 1x1, r (in k^2 / groups + out). DoRA's magnitude adds one for each output.
    """
    rows = []
    for component, sizes in resolve_sizes(components, spec).items():
        model = components.modules()[component]
        for name, (rank, _) in sizes.items():
            layer = model.get_submodule(name)
            shape = weight_shape(layer)
            outputs, inputs = shape[0], prod(shape[1:])
            parameters = rank * (inputs + outputs) + (outputs if spec.kind == "dora" else 0)
            layer_kind = "convolution" if isinstance(layer, nn.Conv2d) else "linear"
            rows.append(AdapterRow(component, name, layer_kind, shape, rank, parameters))
    return rows
