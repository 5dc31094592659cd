"""`load_base`: the parts of a Stable Diffusion model, whatever its family and wherever it comes from.

A base is a pipeline folder, one on the Hub, or a single file; `files.locate` finds and checks it before a weight is read. What
is loaded is frozen, in the precision asked for, in aligned memory, and quantized where the config says so.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from t2ilib.config import ConfigError, ModelConfig
from t2ilib.memory import align, require_memory
from t2ilib.models.components import Components
from t2ilib.models.families import Family, skip_layers
from t2ilib.models.files.autoencoders import load_vae
from t2ilib.models.files.locate import (
    check_folder,
    fetch_pipeline,
    folder_bytes,
    load_family,
    locate,
    weight_stems,
)
from t2ilib.models.files.single_file import load_single_file
from t2ilib.models.pipeline import quiet_libraries
from t2ilib.models.pixels import PixelSpace
from t2ilib.models.quantize import QuantizationReport, has_layer, quantize

log = logging.getLogger(__name__)


def choose_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def name_of_device(device: torch.device) -> str:
    """ "cpu", or what a card is called by its driver."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype for frozen weights and autocast; bfloat16 only where the hardware has it (a T4 claims it by emulation)."""
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_folder(path: str, config: ModelConfig, dtype: torch.dtype, without: Sequence[str] = ()) -> tuple[Family, Any]:
    """The family and the diffusers pipeline of a folder or Hub id: the VAE in float32, the rest in `dtype`. Parts `without` which it is
    wanted are neither fetched nor read, and None in it."""
    if config.config is not None:
        raise ConfigError(
            f"model.config describes a single file, but model.base {config.base} has configs: leave it out"
        )
    family = load_family(path, config)
    if config.vae is not None and not family.has_vae:
        raise ConfigError(f"model.base {config.base} works on pixels and has no VAE: leave model.vae out")
    left_out = dict.fromkeys(part for part in without if part in weight_stems(family))
    wanted = replace(family, left_out={**family.left_out, **left_out})
    folder = Path(path) if Path(path).is_dir() else fetch_pipeline(path, config, wanted)
    files = check_folder(folder, wanted, config)
    chosen = {} if config.vae is None else {"vae": load_vae(config, folder, its_unet="unet" not in without)}
    remedy = "close other programs, set model.dtype to bfloat16, or use a machine with more"
    require_memory(folder_bytes(files, dtype), f"model.base {config.base}", remedy)
    parts = {"vae": torch.float32} if family.has_vae else {}
    pipeline = family.load_pipeline_class().from_pretrained(
        folder,
        variant=config.variant,
        torch_dtype={**parts, "default": dtype},
        use_safetensors=True,
        **{**wanted.left_out, **chosen},
    )
    return family, pipeline


def load_base(config: ModelConfig, device: torch.device | None = None) -> Components:
    """Loads a base model: frozen, in eval mode, on `device`, quantized if `config` says so.

    The VAE stays in float32, because SDXL's overflows in float16. Raises ConfigError for a name that is neither shipped, nor a
    folder, nor a file, nor on the Hub, for a model of another family, for one that memory or disk cannot hold, and for layers that
    `model.clip_skip` cannot leave out.
    """
    device = device or choose_device()
    dtype = choose_dtype(config.dtype, device)
    family, pipeline = load_pipeline(config, dtype)
    if not follows_ddpm(pipeline.scheduler):
        raise ConfigError(
            f"model.base {config.base} draws with {type(pipeline.scheduler).__name__}, another noise formulation (EDM, as Playground"
            " v2.5 has it) than the DDPM that t2ilib trains by: it cannot be trained or drawn with here"
        )
    if family.has_vae:
        require_known_latents(config, pipeline.vae)
    components = Components(
        family=family,
        path=config.base,
        unet=pipeline.unet,
        vae=pipeline.vae if family.has_vae else PixelSpace(),
        text_encoders={name: getattr(pipeline, name) for name in family.text_encoders},
        tokenizers={
            (n := name.replace("text_encoder", "tokenizer")): getattr(pipeline, n) for name in family.text_encoders
        },
        scheduler=pipeline.scheduler,
        zero_empty=bool(pipeline.config.get("force_zeros_for_empty_prompt", False)),
        config=config,
    )
    return settled(components, dtype, device)


def load_pipeline(config: ModelConfig, dtype: torch.dtype, without: Sequence[str] = ()) -> tuple[Family, Any]:
    """The family and the diffusers pipeline of a base. Parts `without` which it is wanted: see `load_folder`; a single file is read whole."""
    path = locate(config.base)
    with quiet_libraries():
        if Path(path).is_file():
            return load_single_file(Path(path), config, dtype)
        return load_folder(path, config, dtype, without)


def settled(components: Components, dtype: torch.dtype, device: torch.device) -> Components:
    """The same parts frozen, in eval mode and aligned memory, quantized where their config says so, on `device`."""
    config = components.config
    skip_layers(components.family, components.text_encoders, config.clip_skip)
    for module in (*components.modules().values(), components.vae):
        module.requires_grad_(False).eval()
        align(module)
    if config.quantization != "none":
        quantize_parts(components, config, dtype, device)
    for module in (*components.modules().values(), components.vae):
        module.to(device)
    return components


def follows_ddpm(scheduler: Any) -> bool:
    """Whether a scheduler is of the noise formulation that training here follows, DDPM's (arXiv 2006.11239)."""
    return not any(other in type(scheduler).__name__ for other in ("EDM", "FlowMatch"))


def require_known_latents(config: ModelConfig, vae: Any) -> None:
    """Raises ConfigError for a VAE of another scaling of latents than training here follows."""
    odd = [
        name for name in ("latents_mean", "latents_std", "shift_factor") if getattr(vae.config, name, None) is not None
    ]
    if odd:
        raise ConfigError(
            f"the VAE of model.base {config.base} scales its latents by {' and '.join(odd)}, which Stable Diffusion's do not:"
            " t2ilib trains on latents that are multiplied by scaling_factor alone"
        )


def quantize_parts(
    components: Components,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    method: Callable[..., QuantizationReport] = quantize,
) -> None:
    """Quantizes the UNet and, unless `config` spares them, the text encoders; reports each part.

    `method`: `quantize`, or what stands in for it. Raises ConfigError for a name in the skip list that no part has.
    """
    parts = components.modules() if config.quantize_text_encoders else {"unet": components.unet}
    skip = {name: [s for s in config.quantization_skip if has_layer(part, s)] for name, part in parts.items()}
    unknown = set(config.quantization_skip) - {found for names in skip.values() for found in names}
    if unknown:
        raise ConfigError(f"model.quantization_skip {', '.join(sorted(unknown))} names no layer of {', '.join(parts)}")
    for name, part in parts.items():
        convolutions = config.quantize_convolutions and name == "unet"
        report = method(part, config.quantization, dtype, device, convolutions, skip[name])
        components.quantization[name] = report
        log.info(
            "%s in %s: %d layers, %.1f -> %.1f MiB%s",
            name,
            config.quantization,
            len(report.quantized),
            report.bytes_before / 2**20,
            report.bytes_after / 2**20,
            f", kept {', '.join(report.kept)}" if report.kept else "",
        )


def load_full(components: Components) -> Components:
    """The base of `components` before quantization, on the host, in the dtype it was quantized from. Raises ValueError for one
    that was not loaded from anywhere."""
    config = components.config
    if config is None:
        raise ValueError(f"{components.path} was not loaded from anywhere, so it cannot be in full precision either")
    dtype = str(choose_dtype(config.dtype, components.device)).removeprefix("torch.")
    return load_base(config.in_full().model_copy(update={"dtype": dtype}), torch.device("cpu"))
