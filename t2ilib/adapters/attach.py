"""Attaching adapters through peft, and proof that every one of them trains.

The weights of an adapter are drawn from an address of the run's seed, so two runs of one seed start alike. Adapters are
float32 whatever the base is: in float16 a LoRA's small steps round to nothing.
"""

import hashlib
import logging
from collections import Counter
from math import prod

import torch
from torch import Tensor, nn

from t2ilib.adapters.dropout import DROPOUTS
from t2ilib.adapters.spec import resolve_sizes, weight_shape
from t2ilib.adapters.tokens import VECTORS, attach_tokens, distances, file_names
from t2ilib.config import AdapterSpec, ConfigError
from t2ilib.models.components import Components
from t2ilib.models.load import load_full
from t2ilib.seeds import seed_for

log = logging.getLogger(__name__)


class AdapterError(ValueError):
    """An adapter that does not do what was asked: it names the modules."""


def attach_adapters(components: Components, spec: AdapterSpec, seed: int) -> dict[str, nn.Module]:
    """Attaches `spec` to the UNet and, where asked, the text encoders, with its new words; returns the components that now have
    something to train.

    Everything else stays frozen, and a module in eval mode has its adapter in eval mode. Raises ConfigError for targets that
    match nothing, for initialisations that a layer cannot have, and for words that cannot be added.
    """
    adapted = {}
    full = load_full(components) if spec.init == "loftq" else None
    for name, sizes in resolve_sizes(components, spec).items():
        torch.manual_seed(seed_for(seed, "adapter", name))
        module = components.modules()[name]
        require_initialisable(module, name, sizes, spec)
        module.add_adapter(peft_config(sizes, spec))
        found = {n for n, m in module.named_modules() if hasattr(m, "lora_A")}
        if found != set(sizes):
            raise AdapterError(
                f"{name}: asked for {len(sizes)} adapted layers, got {len(found)}; they differ in {sorted(found ^ set(sizes))[:5]}"
            )
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if spec.kind == "dora":
            measure_magnitudes(module)
        if full is not None and name in components.quantization:
            start_from_lost(module, full.modules()[name], set(components.quantization[name].quantized))
        if spec.dropout and spec.dropout_kind in DROPOUTS:
            DROPOUTS[spec.dropout_kind](module, "default", spec.dropout)
        adapted[name] = module.train(module.training)  # peft's own modules come in training mode
        ranks = sorted({rank for rank, _ in sizes.values()})
        log.info(
            "%s: %s of rank %s on %d layers, %s trainable parameters",
            name,
            spec.kind,
            ", ".join(map(str, ranks)),
            len(sizes),
            f"{sum(p.numel() for p in module.parameters() if p.requires_grad):,}",
        )
    return adapted | attach_tokens(components, spec)


def peft_config(sizes: dict[str, tuple[int, float]], spec: AdapterSpec):
    """peft's config for one component, every layer by its full name."""
    from peft import LoraConfig

    (rank, alpha), _ = Counter(sizes.values()).most_common(1)[0]
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={name: r for name, (r, _) in sizes.items() if r != rank},
        alpha_pattern={name: a for name, (_, a) in sizes.items() if a != alpha},
        target_modules=list(sizes),
        lora_dropout=spec.dropout if spec.dropout_kind == "input" else 0.0,
        use_dora=spec.kind == "dora",
        use_rslora=spec.rank_stabilized,
        init_lora_weights={"default": True, "loftq": True}.get(spec.init, spec.init),
    )


def require_initialisable(module: nn.Module, name: str, sizes: dict[str, tuple[int, float]], spec: AdapterSpec) -> None:
    """Raises ConfigError naming the layers that `spec.init` is not for: convolutions, which peft has no pissa and olora for, and
    layers with fewer directions than the rank."""
    if spec.init in ("default", "gaussian"):
        return
    layers = {layer: module.get_submodule(layer) for layer in sizes}
    if spec.init in ("pissa", "olora"):
        others = [name for name, layer in layers.items() if not isinstance(layer, nn.Linear)]
        if others:
            raise ConfigError(
                f"adapter.init {spec.init!r} is for linear layers, and the targets of {name} have {len(others)} convolutions"
                f" ({some(others)}): exclude them, or take another init"
            )
    shapes = {layer: weight_shape(layers[layer]) for layer in sizes}
    small = [layer for layer, (rank, _) in sizes.items() if rank > min(shapes[layer][0], prod(shapes[layer][1:]))]
    if small:
        raise ConfigError(
            f"adapter.init {spec.init!r} takes as many directions of a weight as the rank, and {len(small)} layers of {name} have"
            f" fewer ({some(small)}): lower the rank, that of these layers in adapter.ranks, or exclude them"
        )


def some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


@torch.no_grad()
def measure_magnitudes(module: nn.Module) -> None:
    """DoRA's magnitudes anew, in float32 from the weights that the layers multiply with, so that a fresh DoRA changes nothing.

    peft takes them in the base's precision, and in every pass divides by norms taken in float32: over a bfloat16 base the two differ
    by up to 0.4%, over NF4 the more so, as its weights come back in the compute dtype.
    """
    from peft.utils.integrations import dequantize_module_weight

    for layer in module.modules():
        if not getattr(layer, "lora_magnitude_vector", None):
            continue
        a, b, scale = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
        weight = dequantize_module_weight(layer.base_layer).detach().float()
        update = (b.flatten(1) @ a.flatten(1)).view_as(weight)
        magnitude = layer.lora_magnitude_vector["default"]
        norm = magnitude.get_weight_norm(weight, update.to(weight.device), scale)
        magnitude.weight.copy_(norm.view_as(magnitude.weight))


@torch.no_grad()
def start_from_lost(module: nn.Module, full: nn.Module, quantized: set[str]) -> None:
    """LoftQ with one iteration (arXiv 2310.08659, algorithm 1): B A starts as the best approximation of W - Q(W) of its rank.

    The base stays what quantizing alone makes of it, so the adapter fits every NF4 copy of that base. Layers that kept their
    precision lost nothing and start as always. DoRA's magnitudes start as the norms of the corrected weights.
    """
    from peft.utils.integrations import dequantize_module_weight

    for name, layer in module.named_modules():
        if not hasattr(layer, "lora_A") or name not in quantized:
            continue
        a, b, scale = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
        kept = dequantize_module_weight(layer.base_layer).detach().to("cpu", torch.float32)
        lost = full.get_submodule(name).weight.float() - kept
        u, s, v = torch.linalg.svd(lost.flatten(1), full_matrices=False)
        root = s[: len(a)].sqrt() / scale**0.5
        up, down = u[:, : len(a)] * root, root[:, None] * v[: len(a)]
        b.copy_(up.view_as(b))
        a.copy_(down.view_as(a))
        if getattr(layer, "lora_magnitude_vector", None):
            corrected = kept.flatten(1) + scale * up @ down
            magnitude = layer.lora_magnitude_vector["default"].weight
            magnitude.copy_(corrected.norm(dim=1).view_as(magnitude))


def base_digest(components: Components) -> str:
    """SHA-256 over every frozen weight of the UNet and the text encoders: codes as stored, numbers by their value, since
    bitsandbytes' int8 layers keep their bias in whatever precision the last input had."""
    digest = hashlib.sha256()
    for component, module in components.modules().items():
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                digest.update(f"{component}.{name}".encode())
                values = parameter.detach().cpu().contiguous().view(-1)
                values = values.float() if values.is_floating_point() else values
                digest.update(values.view(torch.uint8).numpy())
    return digest.hexdigest()


class AdapterProof:
    """Watches a run: did every adapter get a finite, non-zero gradient, and did it move, while the base stood still?

    Gradients are collected over the first `observed_steps` steps, not the very first alone: while B is zero, A has none. A new word may
    come later than that; it has no weight decay, so that at the end one that moved has had a gradient.
    """

    observed_steps = 8  # a float16 run may lose its first few steps to finding its loss scale

    def __init__(self, components: Components, spec: AdapterSpec):
        self.components = components
        self.spec = spec
        self.start = {name: parameter.detach().cpu().clone() for name, parameter in self.parameters().items()}
        self.got_gradient: set[str] = set()
        self.observed = 0
        self.base = base_digest(components)

    def parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"{component}.{name}": parameter
            for component, module in self.components.modules().items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    def observe(self, num_steps: int) -> None:
        """Call between backward and the `num_steps`-th step of this process (from 1). Raises AdapterError after the last one observed."""
        if num_steps > self.observed_steps:
            return
        self.observed = num_steps
        for name, parameter in self.parameters().items():
            if parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()) and bool(parameter.grad.any()):
                self.got_gradient.add(name)
        if num_steps == self.observed_steps:
            self.require_gradients()
            still = self.unmoved()
            if still:
                log.warning(
                    "after %d steps %d of %d adapter weights have not moved, such as %s: optimizer.learning_rate is probably too low"
                    " (or its warm-up has hardly begun)",
                    num_steps - 1, len(still), len(self.start), still[0],
                )  # fmt: skip

    def unmoved(self) -> list[str]:
        return sorted(
            name
            for name, p in self.parameters().items()
            if not name.endswith(VECTORS) and torch.equal(p.detach().cpu(), self.start[name])
        )

    def require_gradients(self) -> None:
        without = sorted(name for name in set(self.start) - self.got_gradient if not name.endswith(VECTORS))
        if without:
            raise AdapterError(
                f"{len(without)} of {len(self.start)} adapter weights got no finite, non-zero gradient in {self.observed} steps:"
                f" {', '.join(without[:6])}{' ...' if len(without) > 6 else ''}. Take these layers out of the targets"
            )

    def finish(self) -> dict[str, float]:
        """At the end: all moved (DoRA's magnitudes and text encoders included), no base weight changed. Returns how far."""
        if self.observed > 1:
            self.require_gradients()
        change: dict[str, Tensor] = {n: p.detach().cpu() - self.start[n] for n, p in self.parameters().items()}
        words = distances(self.components, self.start) if self.spec.tokens else {}
        if unlearned := [
            f"{word} in {name}" for word, own in words.items() for name, share in own.items() if not share > 0
        ]:
            raise AdapterError(
                f"new words never moved, or are not finite: {', '.join(unlearned)}. No step has seen a caption with them: take more steps,"
                " or write them into more captions"
            )
        still = sorted(name for name, delta in change.items() if not bool(delta.any() and torch.isfinite(delta).all()))
        if still:
            raise AdapterError(
                f"{len(still)} adapter weights never moved, or are not finite: {', '.join(still[:6])}{' ...' if len(still) > 6 else ''}"
            )
        if base_digest(self.components) != self.base:
            raise AdapterError(
                "a frozen base weight changed during training: the adapter would not fit the base it is loaded on"
            )
        moved = {"adapter/change_norm": float(torch.stack([d.square().sum() for d in change.values()]).sum().sqrt())}
        magnitudes = [delta.norm() for name, delta in change.items() if "magnitude" in name]
        if self.spec.kind == "dora":
            moved["adapter/magnitude_change_norm"] = float(torch.stack(magnitudes).norm())
        for word, own in words.items():
            log.info("%s moved by %s of its length", word, ", ".join(f"{share:.1%} in {n}" for n, share in own.items()))
            plain = file_names(words)[word].removesuffix(".safetensors")
            moved |= {f"adapter/words/{plain}/{name}": share for name, share in own.items()}
        return moved
