"""What a run will need in memory, traced on a machine that need not have it.

The model is laid out on the meta device from its config files, quantized and given its adapter there, turned into fake
tensors, and taken through what a run does: encoding pictures and captions, one optimizer step in its steady state (the
optimizer's state is there already, as it is from the second step on), and drawing sample pictures. The run's own functions do
it; a `Ledger` counts. No size is written down here: what another layout or another version of a library needs is
found out by the same trace.

Leaves out: training the VAE and CLIP; the UNet's part in validating and drawing, which is small beside the VAE's at 64 times as
many pixels; what only the GPU knows (see `fitting.RESERVE_BYTES`).
"""

import contextlib
import logging
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from t2ilib.config import ConfigError, RunConfig
from t2ilib.data.cache import CAPTIONS_AT_ONCE, PICTURES_AT_ONCE, EncodedDataset, encode_captions
from t2ilib.memory import pictures_at_once
from t2ilib.models.components import Components
from t2ilib.models.denoiser import Denoiser
from t2ilib.models.load import quantize_parts
from t2ilib.models.pipeline import quiet_libraries
from t2ilib.planning.ledger import CUDA_BLOCK, Ledger, autocast, checkpoint_options, materialize, state_tensors
from t2ilib.planning.unloaded import build_unloaded
from t2ilib.training.objectives import build_objective
from t2ilib.training.optim import build_optimizer, parameter_groups
from t2ilib.training.setups import (
    GRID_PROMPTS,
    checkpoint_gradients,
    noise_schedule,
    trained_modules,
    trained_precision,
)

CATEGORIES = ("weights", "quantization state", "adapters", "gradients", "optimizer", "activations", "caches")
"""Adapters: their float32 weights. Optimizer: its state, and with EMA the averaged weights. Caches: the batch, and on a CPU the
encoded pictures and captions, which otherwise stay in host memory."""


@dataclass(frozen=True)
class MemoryPlan:
    """`phases`: encoding, training, drawing -> category -> bytes at the moment of that phase's peak. `seconds`: of tracing."""

    phases: dict[str, dict[str, int]]
    device_type: str
    seconds: float

    def bytes_of(self, phase: str) -> int:
        return sum(self.phases[phase].values())

    @property
    def largest(self) -> str:
        """The phase that decides whether the run fits."""
        return max(self.phases, key=self.bytes_of)

    @property
    def peak_bytes(self) -> int:
        return self.bytes_of(self.largest)


def plan_memory(run: RunConfig, device_type: str = "cuda", num_pictures: int | None = None) -> MemoryPlan:
    """Traces `run` for a GPU ("cuda": parked parts and encoded data are on the host and do not count) or for "cpu".

    `num_pictures`: how many there are to encode and keep; None takes a batch of them (only on a CPU does it matter). Raises
    ConfigError for what the run itself would refuse: an unknown base, targets that match nothing, an unknown optimizer.
    """
    begun = time.perf_counter()
    if run.trains in ("vae", "clip"):
        raise ConfigError(f"this run trains {run.trains}: only adapter, unet and nothing can be planned")
    dtype = planned_dtype(trained_precision(run).dtype, device_type) or torch.float32
    with undisturbed():
        components = build_unloaded(trained_precision(run), dtype)
        components.tokenizers = {
            name.replace("text_encoder", "tokenizer"): BlankTokenizer(encoder)
            for name, encoder in components.text_encoders.items()
        }
        with torch.device("meta"):
            if run.model.quantization != "none":
                from t2ilib.planning.quantized import hold_quantized

                quantize_parts(components, run.model, dtype, torch.device("meta"), hold_quantized)
            modules = trained_modules(without_init(run), components)
        with FakeTensorMode(allow_non_fake_inputs=True):
            for module in (*components.modules().values(), components.vae):
                materialize(module)
            phases = trace_run(run, components, modules, device_type, num_pictures)
    return MemoryPlan(phases, device_type, time.perf_counter() - begun)


def without_init(run: RunConfig) -> RunConfig:
    """The run with the default initialisation: others take decompositions of real weights, and nothing after them."""
    return (
        run
        if run.adapter is None
        else run.model_copy(update={"adapter": run.adapter.model_copy(update={"init": "default"})})
    )


def planned_dtype(name: str, device_type: str) -> torch.dtype | None:
    """Of the frozen base, or of autocast, where "no" means none. "auto" on a GPU is half precision; which half changes no size."""
    names = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name == "auto":
        return torch.bfloat16 if device_type == "cuda" else None
    return names[name] if name in names else getattr(torch, name)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Leaves random numbers, warnings and the log of the process as they would be without a trace."""
    level = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with torch.random.fork_rng(devices=[]), quiet_libraries(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


class BlankTokenizer:
    """Token ids (B, T) of the length that a CLIP text encoder takes, and of no words."""

    def __init__(self, encoder: nn.Module):
        self.model_max_length = encoder.config.max_position_embeddings

    def __call__(self, captions: list[str], **options) -> SimpleNamespace:
        return SimpleNamespace(input_ids=torch.zeros(len(captions), self.model_max_length, dtype=torch.long))


def trace_run(
    run: RunConfig,
    components: Components,
    modules: dict[str, nn.Module],
    device_type: str,
    num_pictures: int | None = None,
) -> dict[str, dict[str, int]]:
    """Phase -> category -> bytes. `modules`: what `trained_modules` gave. Works on fake tensors and on real ones alike."""
    ledger = Ledger(CUDA_BLOCK if device_type == "cuda" else 1)
    parts = {*components.modules().values(), components.vae}
    trains_text = bool(run.adapter and run.adapter.text_encoder_targets)
    parked = components.parkable(modules if trains_text else ())
    trained = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
    phases = {}

    hold_weights(ledger, parts)
    if run.trains == "adapter":
        ledger.hold(trained, "adapters")
    with ledger.measuring(), torch.no_grad():
        encoded = encode_blank(run, components, num_pictures or run.training.batch_size, with_text=not trains_text)
    phases["encoding"] = ledger.peak
    host = [encoded.latents, encoded.time_ids, *(encoded.text or {}).values()]
    if device_type == "cuda":
        ledger.release(host)
        ledger.release(tensor for module in parked for tensor in stored(module))
    else:
        ledger.hold(host, "caches")

    if run.training.gradient_checkpointing:
        checkpoint_gradients(components, modules, **checkpoint_options(device_type))
    if modules:
        denoiser = Denoiser(components, trains_text).train()
        with ledger.measuring():
            kept = take_step(run, denoiser, modules, trained, encoded, ledger, device_type)
        phases["training"] = ledger.peak
    hold_weights(ledger, parked)
    with ledger.measuring(), torch.no_grad():
        draw_blank(run, components)
    phases["drawing"] = ledger.peak
    if modules:
        del kept
    return phases


def stored(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers(), *state_tensors(module)]


def hold_weights(ledger: Ledger, modules: Iterable[nn.Module]) -> None:
    for module in modules:
        ledger.hold((*module.parameters(), *module.buffers()), "weights")
        ledger.hold(state_tensors(module), "quantization state")


def encode_blank(run: RunConfig, components: Components, num_pictures: int, with_text: bool) -> EncodedDataset:
    """`encode_dataset` on no pictures in particular: one batch goes through the VAE and the text encoders, all are kept."""
    vae, side = components.vae, run.data.resolution
    at_once = pictures_at_once(side, PICTURES_AT_ONCE)
    pixels = torch.zeros(at_once, 3, side, side, dtype=torch.uint8).to(vae.dtype)
    latents = (vae.encode(pixels / 127.5 - 1).latent_dist.mode() * vae.config.scaling_factor).float()
    captions = [""] + ["a caption"] * num_pictures
    text = encode_captions(components, captions[:CAPTIONS_AT_ONCE], CAPTIONS_AT_ONCE) if with_text else None
    return EncodedDataset(
        captions[1:],
        latents.new_zeros(num_pictures, *latents.shape[1:]),
        latents.new_zeros(num_pictures, 6),
        list(range(1, num_pictures + 1)),
        text and {name: values.new_zeros(len(captions), *values.shape[1:]) for name, values in text.items()},
    )


def take_step(
    run: RunConfig,
    denoiser: Denoiser,
    modules: dict[str, nn.Module],
    trained: list[nn.Parameter],
    encoded: EncodedDataset,
    ledger: Ledger,
    device_type: str,
) -> list:
    """A step as `train` takes it, its last micro-batch, on top of the optimizer's state. Returns what outlives a step."""
    with unset_fake_temporarily():  # its tables are looked into
        objective = build_objective(run.objective, noise_schedule(denoiser.components))
    with ledger.counting_as("gradients"):
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
    with ledger.counting_as("optimizer"):
        optimizer, average = build_optimizer(parameter_groups(modules, run.optimizer), run.optimizer), None
        optimizer.step()
        if run.training.ema_decay:
            from diffusers.training_utils import EMAModel

            average = EMAModel(trained, decay=run.training.ema_decay, use_ema_warmup=True, power=0.75)
    if run.training.accumulation == 1:
        optimizer.zero_grad()
    hooks = [p.register_post_accumulate_grad_hook(lambda p: ledger.hold([p.grad], "gradients")) for p in trained]
    precision = planned_dtype(run.training.mixed_precision, device_type)

    def predict(*inputs) -> Tensor:
        with autocast(precision, device_type):
            return denoiser(*inputs)

    size = run.training.batch_size // run.training.accumulation
    with ledger.counting_as("caches"):
        ids = [i % len(encoded) for i in range(size)]
        batch = encoded.batch(ids, [False] * size, encoded.latents.device)
        noise, timesteps = torch.randn_like(batch["latents"]), torch.zeros(size, dtype=torch.long)
    losses = objective(predict, batch, noise, timesteps)
    (losses.mean() / run.training.accumulation).backward()
    torch.nn.utils.clip_grad_norm_(trained, run.optimizer.max_grad_norm)
    with ledger.counting_as("optimizer"):
        optimizer.step()
    optimizer.zero_grad()
    if average is not None:
        average.step(trained)
    for hook in hooks:
        hook.remove()
    return [optimizer, average]


def draw_blank(run: RunConfig, components: Components) -> None:
    """What decoding the sample pictures takes; nothing else in drawing or validating works at the size of pictures."""
    vae, side = components.vae, run.data.resolution // components.vae_scale
    at_once = pictures_at_once(run.data.resolution, len(run.evaluation.prompts) or GRID_PROMPTS)
    latents = torch.zeros(at_once, vae.config.latent_channels, side, side, dtype=vae.dtype)
    pictures = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
    (pictures * 0.5 + 0.5).clamp(0, 1)
