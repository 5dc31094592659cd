"""Attaching adapters through peft, and proof that every one of them trains.

The weights of an adapter are drawn from an address of the run's seed, so two runs of one seed start alike. Adapters are
float32 whatever the base is: in float16 a LoRA's small steps round to nothing.
"""

import hashlib
import logging

import torch
from torch import Tensor, nn

from t2ilib.adapters.spec import resolve_targets
from t2ilib.config import AdapterSpec
from t2ilib.models.components import Components
from t2ilib.seeds import seed_for

log = logging.getLogger(__name__)


class AdapterError(ValueError):
    """An adapter that does not do what was asked: it names the modules."""


def attach_adapters(components: Components, spec: AdapterSpec, seed: int) -> dict[str, nn.Module]:
    """Attaches `spec` to the UNet and, where asked, the text encoders; returns the components that now have adapters.

    Raises ConfigError for targets that match nothing. Everything else stays frozen.
    """
    from peft import LoraConfig

    adapted = {}
    for name, targets in resolve_targets(components, spec).items():
        torch.manual_seed(seed_for(seed, "adapter", name))
        module = components.modules()[name]
        module.add_adapter(
            LoraConfig(
                r=spec.rank,
                lora_alpha=spec.alpha,
                target_modules=targets,
                lora_dropout=spec.dropout,
                use_dora=spec.kind == "dora",
            )
        )
        found = {n for n, m in module.named_modules() if hasattr(m, "lora_A")}
        if found != set(targets):
            raise AdapterError(
                f"{name}: asked for {len(targets)} adapted layers, got {len(found)}; they differ in {sorted(found ^ set(targets))[:5]}"
            )
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        adapted[name] = module
        count = sum(p.numel() for p in module.parameters() if p.requires_grad)
        log.info(
            "%s: %s of rank %d on %d layers, %s trainable parameters",
            name,
            spec.kind,
            spec.rank,
            len(targets),
            f"{count:,}",
        )
    return adapted


def base_digest(components: Components) -> str:
    """SHA-256 over every frozen weight of the UNet and the text encoders, as stored (4-bit codes for a quantized base)."""
    digest = hashlib.sha256()
    for component, module in components.modules().items():
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                digest.update(f"{component}.{name}".encode())
                digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class AdapterProof:
    """Watches a run: did every adapter get a finite, non-zero gradient, and did it move, while the base stood still?

    Gradients are collected over the first `observed_steps` steps, not the very first alone: while B is zero, A has none.
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

    def require_gradients(self) -> None:
        without = sorted(set(self.start) - self.got_gradient)
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
        return moved
