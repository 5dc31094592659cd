"""What `train()` trains: a `Setup` for each choice of what a run trains. The loop knows nothing but this interface.

Here: adapters, the whole UNet, and nothing (the base model measured as it is). `shapes.pretraining` adds the VAE and CLIP.
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from t2ilib.data.cache import EncodedDataset, encode_dataset
from t2ilib.data.manifest import Dataset
from t2ilib.evaluation.sampling import draw
from t2ilib.models.components import Components
from t2ilib.models.denoiser import Denoiser
from t2ilib.models.families import cut_captions
from t2ilib.models.pipeline import save_pipeline
from t2ilib.seeds import generator_for, numpy_generator_for
from t2ilib.text import shown
from t2ilib.training.checkpoint import step_name
from t2ilib.training.objectives import Objective, build_objective
from t2ilib.training.validation import GRID_SEED, HELD_OUT, held_out_loss

log = logging.getLogger(__name__)

GRID_PROMPTS = 8
"""Captions that make the prompts of the sample grids where `evaluation.prompts` is empty."""


def nothing_measured(step: int) -> dict[str, float]:
    return {}


def nothing_saved(folder: Path) -> None:
    pass


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
    validate: Callable[[int], dict[str, float]] = nothing_measured
    save: Callable[[Path], None] = nothing_saved
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

    held_out = measured_part(held_out, run.evaluation.validation_pictures)
    prompts = run.evaluation.prompts or some_captions(held_out.captions(), training.captions())
    tell_cut_captions(components, [*training.captions(), *held_out.captions(), *prompts])
    with components.awake(
        *encoders(run, components)
    ):  # the UNet is not needed yet, and the VAE's activations are large
        encoded, encoded_held_out = (
            encode_dataset(components, data, run.data.resolution, with_text=not trains_text(run)) if len(data) else None
            for data in (training, held_out)
        )
    components.park(modules if trains_text(run) else ())
    if run.training.gradient_checkpointing:
        checkpoint_gradients(components, modules)

    setup = learn_to_denoise(run, components, modules, encoded, device)
    plain = build_objective(run.objective.model_copy(update={"snr_gamma": None}), noise_schedule(components))

    def validate(step: int) -> dict[str, float]:
        if encoded_held_out is None:
            return {}
        with accelerator.autocast():
            result = held_out_loss(
                setup.model, plain, encoded_held_out, setup.num_timesteps, run.evaluation.validation_timesteps, device
            )
        by_picture = [
            {"picture": shown(record.path.name), "caption": record.caption, "loss": loss}
            for record, loss in zip(held_out.records, result.by_picture(), strict=True)
        ]
        (run.output / "held_out").mkdir(exist_ok=True)
        (run.output / "held_out" / f"{step_name(step)}.json").write_text(json.dumps(by_picture, indent=1))
        return result.metrics()

    def save(folder: Path) -> None:
        if trains == "adapter":
            start = proof.start if run.adapter.init in ("pissa", "olora") else None
            metadata = describe(run, components, training.digest, read_layers(components, start))
            save_adapter(components, folder / "adapter", start, metadata)
        elif trains == "unet":
            save_pipeline(components, folder / "model")

    return replace(
        setup,
        validate=validate,
        save=save,
        draw=lambda: draw(components, list(prompts), run.evaluation, resolution=run.data.resolution),
        prompts=prompts,
        proof=proof,
        metrics=HELD_OUT,
    )


def learn_to_denoise(
    run: RunConfig,
    components: Components,
    modules: dict[str, nn.Module],
    encoded: EncodedDataset,
    device: torch.device,
) -> Setup:
    """What `modules` learn of encoded pictures: the run's objective over its noise schedule. Neither measures nor saves."""
    schedule = noise_schedule(components)
    return Setup(
        components=components,
        model=Denoiser(components, trains_text(run)),
        modules=modules,
        num_samples=len(encoded),
        batch=lambda ids, step: encoded.batch(ids, dropped_captions(run, ids, step), device),
        objective=build_objective(run.objective, schedule),
        noise_shape=tuple(encoded.latents.shape[1:]),
        num_timesteps=schedule.config.num_train_timesteps,
    )


def trains_text(run: RunConfig) -> bool:
    """Whether text encoders have adapters, so that captions must be encoded anew in every step."""
    return bool(run.adapter and run.adapter.text_encoder_targets)


def encoders(run: RunConfig, components: Components) -> tuple[str, ...]:
    """The parts that encoding the data takes, by name."""
    return ("vae",) if trains_text(run) else ("vae", *components.text_encoders)


def some_captions(held_out: Sequence[str], training: Sequence[str]) -> tuple[str, ...]:
    """GRID_PROMPTS different captions, held-out ones first, from all along the order that they are in: what lies together is often
    alike."""
    own = dict.fromkeys(held_out)
    rest = [caption for caption in dict.fromkeys(training) if caption not in own]
    chosen: list[str] = []
    for captions in (list(own), rest):
        wanted = GRID_PROMPTS - len(chosen)
        chosen += captions[:: max(1, len(captions) // max(1, wanted))][:wanted]
    return tuple(chosen)


def measured_part(held_out: Dataset, most: int) -> Dataset:
    """At most so many of the held-out pictures, the same ones in every run; says so where some are left out."""
    if len(held_out) <= most:
        return held_out
    log.info("%d of %d held-out pictures are measured (evaluation.validation_pictures)", most, len(held_out))
    chosen = numpy_generator_for(GRID_SEED, "held-out pictures").permutation(len(held_out))[:most]
    return replace(held_out, records=tuple(held_out.records[i] for i in sorted(chosen.tolist())))


def tell_cut_captions(components: Components, captions: Sequence[str]) -> None:
    """Warns of captions and prompts of which the text encoders see the beginning only."""
    cut = cut_captions(components.tokenizers, captions)
    if cut:
        log.warning(
            "%d of %d captions and prompts are longer than the %d tokens that the text encoder takes: their ends are not seen. One of"
            " them ends with %r",
            len(cut),
            len(set(captions)),
            min(tokenizer.model_max_length for tokenizer in components.tokenizers.values()),
            cut[0][-60:],
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
            encoder = components.text_encoders[name]
            enable = getattr(encoder, "activation_checkpointing_enable", None)  # its older name is deprecated
            (enable or encoder.gradient_checkpointing_enable)(options)


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
