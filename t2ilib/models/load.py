"""`load_base`: the parts of a Stable Diffusion model, whatever its family and wherever it comes from.

A base is a pipeline folder, one on the Hub, or a single file; `files.locate` finds and checks it before a weight is read. What
is loaded is frozen, in the precision asked for, in aligned memory, and quantized where the config says so.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from t2ilib.config import ConfigError, ModelConfig
from t2ilib.memory import align, require_memory
from t2ilib.models.components import Components
from t2ilib.models.families import Family
from t2ilib.models.files.autoencoders import load_vae
from t2ilib.models.files.locate import check_folder, fetch_pipeline, folder_bytes, load_family, locate
from t2ilib.models.files.single_file import load_single_file
from t2ilib.models.pipeline import quiet_libraries
from t2ilib.models.quantize import QuantizationReport, has_layer, quantize

log = logging.getLogger(__name__)


def choose_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype for frozen weights and autocast; bfloat16 only where the hardware has it (a T4 claims it by emulation)."""
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_folder(path: str, config: ModelConfig, dtype: torch.dtype) -> tuple[Family, Any]:
    """The family and the diffusers pipeline of a folder or Hub id: the VAE in float32, the rest in `dtype`."""
    import diffusers

    if config.config is not None:
        raise ConfigError(
            f"model.config describes a single file, but model.base {config.base} has configs: leave it out"
        )
    family = load_family(path, config)
    folder = Path(path) if Path(path).is_dir() else fetch_pipeline(path, config, family)
    files = check_folder(folder, family, config)
    chosen = {} if config.vae is None else {"vae": load_vae(config, folder)}
    remedy = "close other programs, set model.dtype to bfloat16, or use a machine with more"
    require_memory(folder_bytes(files, dtype), f"model.base {config.base}", remedy)
    pipeline = getattr(diffusers, family.pipeline_class).from_pretrained(
        folder,
        variant=config.variant,
        torch_dtype={"vae": torch.float32, "default": dtype},
        use_safetensors=True,
        **chosen,
        **family.left_out,
    )
    return family, pipeline


def load_base(config: ModelConfig, device: torch.device | None = None) -> Components:
    """Loads a base model: frozen, in eval mode, on `device`, quantized if `config` says so.

    The VAE stays in float32, because SDXL's overflows in float16. Raises ConfigError for a name that is neither shipped, nor a
    folder, nor a file, nor on the Hub, for a model of another family, and for one that memory or disk cannot hold.
    """
    device = device or choose_device()
    dtype = choose_dtype(config.dtype, device)
    path = locate(config.base)
    with quiet_libraries():
        if Path(path).is_file():
            family, pipeline = load_single_file(Path(path), config, dtype)
        else:
            family, pipeline = load_folder(path, config, dtype)
    require_known_latents(config, pipeline)
    components = Components(
        family=family,
        path=config.base,
        unet=pipeline.unet,
        vae=pipeline.vae,
        text_encoders={name: getattr(pipeline, name) for name in family.text_encoders},
        tokenizers={
            (n := name.replace("text_encoder", "tokenizer")): getattr(pipeline, n) for name in family.text_encoders
        },
        scheduler=pipeline.scheduler,
        zero_empty=bool(pipeline.config.get("force_zeros_for_empty_prompt", False)),
        config=config,
    )
    for module in (*components.modules().values(), components.vae):
        module.requires_grad_(False).eval()
        align(module)
    if config.quantization != "none":
        quantize_parts(components, config, dtype, device)
    for module in (*components.modules().values(), components.vae):
        module.to(device)
    return components


def require_known_latents(config: ModelConfig, pipeline: Any) -> None:
    """Raises ConfigError for a model of another noise formulation or scaling of latents than training here follows."""
    scheduler, vae = type(pipeline.scheduler).__name__, pipeline.vae.config
    if "EDM" in scheduler or "FlowMatch" in scheduler:
        raise ConfigError(
            f"model.base {config.base} draws with {scheduler}, another noise formulation (EDM, as Playground v2.5 has it) than the"
            " DDPM that t2ilib trains by: it cannot be trained or drawn with here"
        )
    odd = [name for name in ("latents_mean", "latents_std", "shift_factor") if getattr(vae, name, None) is not None]
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
