"""What `train()` trains: a `Setup` for each choice of `training.trains`. The loop knows nothing but this interface.

Here: adapters, the whole UNet, and nothing (the base model measured as it is). `pretraining` adds the VAE and CLIP.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from t2ilib.adapters.attach import AdapterProof, attach_adapters
from t2ilib.adapters.export import describe, save_adapter
from t2ilib.adapters.weights import read_layers
from t2ilib.config import ModelConfig, RunConfig
from t2ilib.data.cache import encode_dataset
from t2ilib.data.manifest import Dataset
from t2ilib.evaluation.sampling import draw
from t2ilib.models.components import Components, save_pipeline
from t2ilib.models.families import Denoiser
from t2ilib.seeds import generator_for
from t2ilib.training.objectives import addressed_noise, build_objective
from t2ilib.training.validation import held_out_loss

GRID_PROMPTS = 8
"""Captions that make the prompts of the sample grids where `evaluation.prompts` is empty."""


@dataclass
class Setup:
    """One thing to train. `losses(model, ids, step)` gives per-sample losses (B,) and is a function of its arguments alone.

    `modules`: the named parts whose trainable parameters the optimizer gets. `model`: what is called, wrapped for several
    processes. `validate`, `draw` and `save` use the parts as they are at the time, adapters or averages included.
    """

    components: Components
    model: nn.Module
    modules: dict[str, nn.Module]
    num_samples: int
    losses: Callable[[nn.Module, list[int], int], Tensor]
    validate: Callable[[int], dict[str, float]]
    save: Callable[[Path], None]
    draw: Callable[[], list[Image.Image]] | None = None
    prompts: tuple[str, ...] = ()
    proof: AdapterProof | None = None


def setup_diffusion(
    run: RunConfig, components: Components, training: Dataset, held_out: Dataset, accelerator: Accelerator
) -> Setup:
    """Adapters, the whole UNet, or nothing: whatever sees noisy latents. Encoders that nothing trains leave the device."""
    trains, device = run.training.trains, accelerator.device
    trains_text = bool(run.adapter and run.adapter.text_encoder_targets)
    encoded = encode_dataset(components, training, run.data.resolution, with_text=not trains_text)
    encoded_held_out = (
        encode_dataset(components, held_out, run.data.resolution, with_text=not trains_text) if len(held_out) else None
    )
    modules = trained_modules(run, components)
    proof = AdapterProof(components, run.adapter) if trains == "adapter" else None
    components.park(modules if trains_text else ())
    if run.training.gradient_checkpointing:
        checkpoint_gradients(components, modules)
    objective = build_objective(run.objective, noise_schedule(components))
    plain = build_objective(run.objective.model_copy(update={"snr_gamma": None}), noise_schedule(components))
    num_timesteps = components.scheduler.config.num_train_timesteps
    denoiser = Denoiser(components, trains_text)

    def losses(model: nn.Module, ids: list[int], step: int) -> Tensor:
        noise, timesteps = addressed_noise(run.seed, step, ids, encoded.latents.shape[1:], num_timesteps)
        rate = run.objective.caption_dropout
        dropped = [
            rate > 0 and torch.rand((), generator=generator_for(run.seed, "caption dropout", step, i)).item() < rate
            for i in ids
        ]
        return objective(model, encoded.batch(ids, dropped, device), noise.to(device), timesteps.to(device))

    def validate(step: int) -> dict[str, float]:
        if encoded_held_out is None:
            return {}
        with accelerator.autocast():
            result = held_out_loss(
                denoiser, plain, encoded_held_out, num_timesteps, run.evaluation.validation_timesteps, device
            )
        by_picture = [
            {"picture": record.path.name, "caption": record.caption, "loss": loss}
            for record, loss in zip(held_out.records, result.by_picture(), strict=True)
        ]
        (run.output / "held_out").mkdir(exist_ok=True)
        (run.output / "held_out" / f"step-{step:06d}.json").write_text(json.dumps(by_picture, indent=1))
        return result.metrics()

    def save(folder: Path) -> None:
        if trains == "adapter":
            start = proof.start if run.adapter.init in ("pissa", "olora") else None
            metadata = describe(run, components, training.digest, read_layers(components, start))
            save_adapter(components, folder / "adapter", start, metadata)
        elif trains == "unet":
            save_pipeline(components, folder / "model")

    prompts = (
        run.evaluation.prompts or tuple(dict.fromkeys((*held_out.captions(), *training.captions())))[:GRID_PROMPTS]
    )
    return Setup(
        components,
        denoiser,
        modules,
        len(encoded),
        losses,
        validate,
        save,
        draw=lambda: draw(components, list(prompts), run.evaluation, resolution=run.data.resolution),
        prompts=prompts,
        proof=proof,
    )


def trained_modules(run: RunConfig, components: Components) -> dict[str, nn.Module]:
    """Name -> component with trainable parameters, after attaching the adapters or thawing the UNet, as `run` says."""
    if run.training.trains == "adapter":
        return attach_adapters(components, run.adapter, run.seed)
    if run.training.trains == "unet":
        return {"unet": components.unet.requires_grad_(True)}
    return {}


def checkpoint_gradients(components: Components, modules: Iterable[str], **options: Any) -> None:
    """Recomputes activations of the UNet, and of text encoders among `modules`, in the backward pass; `options` go to
    `torch.utils.checkpoint`."""
    options = {"use_reentrant": False} | options
    components.unet.enable_gradient_checkpointing(lambda module, *inputs: checkpoint(module, *inputs, **options))
    for name in modules:
        if name != "unet":
            components.text_encoders[name].gradient_checkpointing_enable(options)


def trained_precision(run: RunConfig) -> ModelConfig:
    """The base as it must be loaded: whole models are trained in float32, whatever they are used in later."""
    whole = run.training.trains in ("unet", "vae", "clip")
    return run.model.model_copy(update={"dtype": "float32"}) if whole else run.model


def noise_schedule(components: Components):
    """The base's noise schedule as DDPM defines it, whatever sampler the pipeline draws with."""
    from diffusers import DDPMScheduler

    schedule = DDPMScheduler.from_config(components.scheduler.config)
    schedule.alphas_cumprod = schedule.alphas_cumprod.to(components.device)
    return schedule
