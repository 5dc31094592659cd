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
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from t2ilib.adapters.attach import AdapterProof, attach_adapters
from t2ilib.adapters.export import describe, save_adapter
from t2ilib.adapters.fused import fuse_adapters
from t2ilib.adapters.load import attach_finished
from t2ilib.adapters.start import attach_started
from t2ilib.adapters.tokens import drop_gradients, last_step, require_in_captions
from t2ilib.adapters.weights import read_layers
from t2ilib.config import ConfigError, ModelConfig, ObjectiveConfig, RunConfig
from t2ilib.data.cache import EncodedDataset, Fresh, FreshText, encoded_folder, keep_latents, keep_text
from t2ilib.data.dataset import Dataset, some_captions
from t2ilib.data.prior import build_order, loss_terms, loss_weights
from t2ilib.data.samples import Samples
from t2ilib.data.store import ALONE, Share
from t2ilib.data.streamed import StepOrder, StreamedSamples
from t2ilib.evaluation.denoising import draw_denoising
from t2ilib.evaluation.sampling import draw
from t2ilib.models.components import Components
from t2ilib.models.denoiser import Denoiser
from t2ilib.models.families import cut_captions
from t2ilib.models.pipeline import save_pipeline
from t2ilib.models.scratch import build_base
from t2ilib.models.students import build_student
from t2ilib.seeds import generator_for, numpy_generator_for
from t2ilib.text import shown, write_whole
from t2ilib.training.card import save_card
from t2ilib.training.checkpoint import step_name
from t2ilib.training.methods import METHODS
from t2ilib.training.methods.method import Parts
from t2ilib.training.objectives import Objective, build_objective, trained_part
from t2ilib.training.others import Denoise, base_as_it_was
from t2ilib.training.pairs import HeldOutPairs
from t2ilib.training.processes import share_of_work
from t2ilib.training.stages import StagedDataset, earlier_samples
from t2ilib.training.validation import GRID_SEED, HeldOutLoss, declared, held_out_loss

log = logging.getLogger(__name__)


def nothing_measured(step: int) -> dict[str, float]:
    return {}


def nothing_held(step: int) -> None:
    pass


def nothing_saved(folder: Path) -> None:
    pass


def nothing_announced(ids: Sequence[int], step: int) -> None:
    pass


def never() -> float:
    return 0.0


def one_term(ids: Sequence[int], losses: Tensor) -> dict[str, float]:
    return {}


@dataclass
class Setup:
    """One thing to train, by which data and which objective.

    `model`: what `objective(model, batch, noise, timesteps)` calls, for per-sample losses (B,). `modules`: the named parts whose
    trainable parameters the optimizer gets. `batch(ids, step)`: what the model sees of these samples at this step, a function of
    its arguments alone; where it has `latents`, they are noised, at one of `num_timesteps`. `order(step)`: the samples of a step.
    `validate`, `draw` and `save` use the parts as they are at the time, adapters or averages included.
    """

    components: Components
    model: nn.Module
    modules: dict[str, nn.Module]
    order: Callable[[int], list[int]]
    batch: Callable[[list[int], int], dict[str, Any]]
    objective: Objective
    validate: Callable[[int], dict[str, float]] = nothing_measured
    save: Callable[[Path], None] = nothing_saved
    hold: Callable[[int], None] = nothing_held
    """Takes the gradients of a step (from 0) from what no longer learns at it."""
    num_timesteps: int = 1
    draw: Callable[[], list[Image.Image]] | None = None
    denoise: Callable[[], list[list[Image.Image]]] | None = None
    """Of each of `prompts` what is predicted on the way, as `evaluation.strip_steps` says, and last what `draw` gives."""
    base: Denoise | None = None
    """The base as it was, where the objective takes it, or it costs nothing to have."""
    prompts: tuple[str, ...] = ()
    proof: AdapterProof | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """What `validate` measures, declared."""
    terms: Callable[[Sequence[int], Tensor], dict[str, float]] = one_term
    """The terms of the loss by name, where it has several, of a step's samples and their losses (B,)."""
    announce: Callable[[Sequence[int], int], None] = nothing_announced
    """Has what can be prepared of these samples of a coming step begun."""
    waited: Callable[[], float] = never
    """Seconds that were spent waiting for data since this was last asked."""


def setup_diffusion(
    run: RunConfig, components: Components, training: Dataset, held_out: Dataset, accelerator: Accelerator
) -> Setup:
    """Adapters, the whole UNet, or nothing: whatever sees noisy latents. Encoders that nothing trains leave the device."""
    run, trains, device = with_its_cache(run), run.trains, accelerator.device
    modules = trained_modules(run, components)
    proof = AdapterProof(components, run.adapter) if trains == "adapter" else None

    held_out = measured_part(held_out, run.evaluation.validation_pictures)
    prompts = run.evaluation.prompts or some_captions(held_out.captions(), training.own.captions())
    samples = build_samples(run, components, training, held_out)
    samples += earlier_samples(run, training, components.side_multiple)
    captions = ["", *samples[0].all_captions(), *samples[1].all_captions()]
    tell_cut_captions(components, components.spelled([*captions, *prompts, run.evaluation.negative_prompt]))
    if run.adapter and run.adapter.tokens and training.stream is None:
        require_in_captions(components, samples[0].all_captions())
    components.park(needed_in_steps(run, components))
    encoded, encoded_held_out = encode(run, components, samples, captions, share_of_work(accelerator))
    if run.training.gradient_checkpointing:
        checkpoint_gradients(components, modules)

    setup = learn_to_denoise(run, components, modules, encoded, device)
    plain = build_objective(ObjectiveConfig(name=run.objective.name, snr_gamma=None), noise_schedule(components))

    def on_grid(denoiser: Denoise, objective: Objective) -> HeldOutLoss:
        of_each = run.evaluation.validation_timesteps
        return held_out_loss(denoiser, objective, encoded_held_out, setup.num_timesteps, of_each, device)

    pairs = (
        HeldOutPairs(plain, setup.base, on_grid) if encoded_held_out and encoded_held_out.samples.has_pairs else None
    )

    terms = METHODS[run.objective.method].terms(setup.objective, plain)

    def validate(step: int) -> dict[str, float]:
        if encoded_held_out is None:
            return {}
        with accelerator.autocast():
            result = on_grid(setup.model, plain)
            more = pairs.measure(setup.model, result.losses) if pairs else {}
            more |= {name: float(on_grid(setup.model, term).losses.mean()) for name, (_, term) in terms.items()}
        by_picture = [
            {"picture": shown(record.path.name), "caption": record.caption, "loss": loss}
            for record, loss in zip(held_out.records, result.by_picture(), strict=True)
        ]
        (run.output / "held_out").mkdir(exist_ok=True)
        write_whole(run.output / "held_out" / f"{step_name(step)}.json", json.dumps(by_picture, indent=1))
        return result.metrics() | more

    def save(folder: Path) -> None:
        if trains == "adapter":
            start = proof.start if run.adapter.init in ("pissa", "olora") else None
            metadata = describe(run, components, training.digest, read_layers(components, start))
            save_adapter(components, folder / "adapter", start, metadata)
        elif trains == "unet":
            save_pipeline(components, folder / "model")
            save_card(run, components, training, prompts, folder / "model")

    def hold(step: int) -> None:
        if run.adapter and run.adapter.tokens and step >= last_step(run.adapter, run.training.steps):
            drop_gradients(components)

    return replace(
        setup,
        validate=validate,
        save=save,
        hold=hold,
        draw=lambda: draw(components, list(prompts), run.evaluation, resolution=run.data.resolution),
        denoise=lambda: draw_denoising(components, list(prompts), run.evaluation, resolution=run.data.resolution),
        prompts=prompts,
        proof=proof,
        metrics=declared(plain, components)
        | (pairs.declared() if pairs else {})
        | {name: about for name, (about, _) in terms.items()},
    )


def learn_to_denoise(
    run: RunConfig,
    components: Components,
    modules: dict[str, nn.Module],
    encoded: EncodedDataset | StagedDataset,
    device: torch.device,
) -> Setup:
    """What `modules` learn of encoded pictures: the run's objective over its noise schedule. Neither measures nor saves."""
    schedule, samples, method = noise_schedule(components), encoded.samples, METHODS[run.objective.method]
    if method.of_pairs and not samples.has_pairs:
        raise ConfigError(
            f"objective.{run.objective.method} learns from pairs, and these pictures are none: give a preferences.jsonl or the like by"
            " data.source preferences"
        )
    trained_part(run.objective, schedule.config.num_train_timesteps)  # told now, not in the first step
    num_class = samples.dataset.num_class
    num_own = len(encoded) - num_class
    order = encoded.order or build_order(run, num_own, num_class, samples.buckets)

    def terms(ids: Sequence[int], losses: Tensor) -> dict[str, float]:
        return loss_terms(run.prior, losses.cpu(), torch.tensor([i >= num_own for i in ids]))

    def batch(ids: list[int], step: int) -> dict[str, Any]:
        more = {name: value.to(device) for name, value in method.more(run, encoded, ids, step).items()}
        return encoded.batch(ids, step, dropped_captions(run, ids, step), device) | more

    denoiser, base = Denoiser(components, trains_text(run)), None
    if run.trains == "adapter" or method.needs_base(run):
        base = base_as_it_was(run, components, denoiser)
    return Setup(
        components=components,
        model=denoiser,
        modules=modules,
        order=order,
        batch=batch,
        objective=method.objective(Parts(run, build_objective(run.objective, schedule), denoiser, base)),
        base=base,
        num_timesteps=schedule.config.num_train_timesteps,
        terms=terms if num_class else one_term,
        announce=encoded.announce,
        waited=encoded.waited,
    )


def build_samples(
    run: RunConfig, components: Components, training: Dataset, held_out: Dataset
) -> tuple[Samples, Samples]:
    """What is trained on and what is measured, of what sizes; logs these."""
    multiple = components.side_multiple
    kind = Samples if training.stream is None else StreamedSamples
    samples = kind(training, run.data, run.seed, run.training.batch_size, multiple)
    samples.tell()
    return samples, Samples(held_out, run.data, run.seed, multiple=multiple, held_out=True)


def encode(
    run: RunConfig,
    components: Components,
    samples: tuple[Samples, ...],
    captions: Sequence[str],
    share: Share = ALONE,
) -> tuple[EncodedDataset | StagedDataset, EncodedDataset | None]:
    """What is trained on and what is measured, as the loop takes them: what `data.cache` keeps of their views and `captions` is encoded here,
    where it is not on disk yet, of several processes by each its `share`; the rest in the steps. `samples`: of both, and of the stages
    before."""
    folder, cache = encoded_folder(run.data.cache_path), run.data.cache
    weights = loss_weights(run.prior) if run.prior else (1.0, 1.0)
    if cache == "off":
        latents = [Fresh(components, part) for part in samples]
    else:
        latents = keep_latents(components, samples, folder, share)
    text = None if trains_text(run) else FreshText(components)
    if text is not None and cache == "all":
        text = keep_text(components, captions, folder, share)
    order, stream = None, samples[0].dataset.stream
    if stream is not None:
        order = StepOrder(stream, run.seed, run.training.batch_size, run.training.steps)
        for part in latents:
            stream.closing.callback(part.pictures.close)
    encoded = EncodedDataset(samples[0], latents[0], text, weights, order)
    if run.data.stages:
        pairs = zip(samples[2:], latents[2:], strict=True)
        encoded = StagedDataset(run, [*(EncodedDataset(*pair, text, weights) for pair in pairs), encoded])
    return encoded, EncodedDataset(samples[1], latents[1], text) if len(samples[1]) else None


def with_its_cache(run: RunConfig) -> RunConfig:
    """The run with `data.cache` as it is: of a stream nothing is kept."""
    return run.model_copy(update={"data": run.data.model_copy(update={"cache": "off"})}) if run.data.streaming else run


def trains_text(run: RunConfig) -> bool:
    """Whether text encoders have adapters or new words, so that captions must be encoded anew in every step."""
    return bool(run.adapter and (run.adapter.text_encoder_targets or run.adapter.tokens))


def needed_in_steps(run: RunConfig, components: Components) -> tuple[str, ...]:
    """The parts besides the UNet that a step works with, by name."""
    text = () if run.data.cache == "all" and not trains_text(run) else tuple(components.text_encoders)
    return (*text, *(("vae",) if run.data.cache == "off" else ()))


def measured_part(held_out: Dataset, most: int) -> Dataset:
    """At most so many of the held-out pictures, the same ones in every run; says so where some are left out."""
    if len(held_out) <= most:
        return held_out
    log.info("%d of %d held-out pictures are measured (evaluation.validation_pictures)", most, len(held_out))
    chosen = numpy_generator_for(GRID_SEED, "held-out pictures").permutation(len(held_out))[:most]
    return held_out.part(sorted(chosen.tolist()))


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
    """Name -> component with trainable parameters, after attaching the adapters, or thawing the UNet or a student of it, as `run` says.
    Of a run that trains nothing there are none, whatever it draws with."""
    if run.trains == "adapter":
        attach = attach_adapters if run.adapter.start is None else attach_started
        modules = attach(components, run.adapter, run.seed)
        for module in modules.values() if run.compute.fused_adapters else ():
            fuse_adapters(module, run.adapter.dropout_kind, run.adapter.dropout)
        return modules
    if run.trains == "unet":
        if run.student is not None:
            become_student(run, components)
        return {"unet": components.unet.requires_grad_(True)}
    attach_finished(components, run.evaluation.adapters)
    return {}


def become_student(run: RunConfig, components: Components) -> None:
    """Puts a student in the place of the base's UNet, which stays only where the objective learns from it."""
    teacher = components.unet
    components.unet = build_student(teacher, run.student.leave_out, run.seed)
    components.teacher = teacher if METHODS[run.objective.method].needs_base(run) else None


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


def begin_base(run: RunConfig, device: torch.device) -> Components:
    """The parts of the base around the fresh UNet that the run's `scratch` section asks for."""
    data = run.data
    return build_base(trained_precision(run), run.scratch, data.resolution, run.seed, device, tuple(data.stages))


def noise_schedule(components: Components):
    """The base's noise schedule as DDPM defines it, whatever sampler the pipeline draws with."""
    from diffusers import DDPMScheduler

    schedule = DDPMScheduler.from_config(components.scheduler.config)
    schedule.alphas_cumprod = schedule.alphas_cumprod.to(components.device)
    return schedule
