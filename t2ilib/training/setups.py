"""What `train()` trains: a `Setup` for each choice of what a run trains. The loop knows nothing but this interface.

Here: adapters, the whole UNet, and nothing (the base model measured as it is). `shapes.pretraining` adds the VAE and CLIP.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint

from t2ilib.adapters.attach import AdapterProof, attach_adapters
from t2ilib.adapters.export import describe, save_adapter
from t2ilib.adapters.weights import read_layers
from t2ilib.config import ModelConfig, RunConfig
from t2ilib.data.cache import encode_dataset
from t2ilib.data.manifest import Dataset
from t2ilib.evaluation.sampling import draw
from t2ilib.models.components import Components
from t2ilib.models.denoiser import Denoiser
from t2ilib.models.pipeline import save_pipeline
from t2ilib.seeds import generator_for
from t2ilib.text import shown
from t2ilib.training.objectives import Objective, build_objective
from t2ilib.training.validation import HELD_OUT, held_out_loss

GRID_PROMPTS = 8
"""Captions that make the prompts of the sample grids where `evaluation.prompts` is empty."""


@dataclass
class Setup:
    """One thing to train, by which data and which objective.

    `model`: what `objective(model, batch, noise, timesteps)` calls, for per-sample losses (B,). `modules`: the named parts whose
    trainable parameters the optimizer gets. `batch(ids, step)`: what the model sees of these samples at this step, a function of
    its arguments alone. `noise_shape`, `num_timesteps`: of one sample's noise, () where nothing is noised, and of the schedule.
    `validate`, `draw` and `save` use the parts as they are at the time, adapters or averages included.
    """

    components: Components
    model: nn.Module
    modules: dict[str, nn.Module]
    num_samples: int
    batch: Callable[[list[int], int], dict[str, Any]]
    objective: Objective
    validate: Callable[[int], dict[str, float]]
    save: Callable[[Path], None]
    noise_shape: tuple[int, ...] = ()
    num_timesteps: int = 1
    draw: Callable[[], list[Image.Image]] | None = None
    prompts: tuple[str, ...] = ()
    proof: AdapterProof | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """What `validate` measures, declared."""


def setup_diffusion(
    run: RunConfig, components: Components, training: Dataset, held_out: Dataset, accelerator: Accelerator
) -> Setup:
    """Adapters, the whole UNet, or nothing: whatever sees noisy latents. Encoders that nothing trains leave the device."""
    trains, device = run.trains, accelerator.device
    modules = trained_modules(run, components)
    proof = AdapterProof(components, run.adapter) if trains == "adapter" else None

    trains_text = bool(run.adapter and run.adapter.text_encoder_targets)
    encoded, encoded_held_out = (
        encode_dataset(components, data, run.data.resolution, with_text=not trains_text) if len(data) else None
        for data in (training, held_out)
    )
    components.park(modules if trains_text else ())
    if run.training.gradient_checkpointing:
        checkpoint_gradients(components, modules)

    schedule = noise_schedule(components)
    plain = build_objective(run.objective.model_copy(update={"snr_gamma": None}), schedule)
    denoiser = Denoiser(components, trains_text)

    def batch(ids: list[int], step: int) -> dict[str, Any]:
        return encoded.batch(ids, dropped_captions(run, ids, step), device)

    def validate(step: int) -> dict[str, float]:
        if encoded_held_out is None:
            return {}
        with accelerator.autocast():
            result = held_out_loss(
                denoiser, plain, encoded_held_out, schedule.config.num_train_timesteps, run.evaluation.validation_timesteps, device
            )  # fmt: skip
        by_picture = [
            {"picture": shown(record.path.name), "caption": record.caption, "loss": loss}
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
        components=components,
        model=denoiser,
        modules=modules,
        num_samples=len(encoded),
        batch=batch,
        objective=build_objective(run.objective, schedule),
        validate=validate,
        save=save,
        noise_shape=tuple(encoded.latents.shape[1:]),
        num_timesteps=schedule.config.num_train_timesteps,
        draw=lambda: draw(components, list(prompts), run.evaluation, resolution=run.data.resolution),
        prompts=prompts,
        proof=proof,
        metrics=HELD_OUT,
    )


def dropped_captions(run: RunConfig, ids: list[int], step: int) -> list[bool]:
    """Which samples lose their caption at this step, for classifier-free guidance (arXiv 2207.12598)."""
    rate = run.objective.caption_dropout
    return [
        rate > 0 and torch.rand((), generator=generator_for(run.seed, "caption dropout", step, i)).item() < rate
        for i in ids
    ]


def trained_modules(run: RunConfig, components: Components) -> dict[str, nn.Module]:
    """Name -> component with trainable parameters, after attaching the adapters or thawing the UNet, as `run` says."""
    if run.trains == "adapter":
        return attach_adapters(components, run.adapter, run.seed)
    if run.trains == "unet":
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
    whole = run.trains in ("unet", "vae", "clip")
    return run.model.model_copy(update={"dtype": "float32"}) if whole else run.model


def noise_schedule(components: Components):
    """The base's noise schedule as DDPM defines it, whatever sampler the pipeline draws with."""
    from diffusers import DDPMScheduler

    schedule = DDPMScheduler.from_config(components.scheduler.config)
    schedule.alphas_cumprod = schedule.alphas_cumprod.to(components.device)
    return schedule
