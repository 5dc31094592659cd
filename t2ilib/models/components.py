"""`load_base`: the parts of a Stable Diffusion model, whatever its family and wherever it comes from.

A pipeline in diffusers is for drawing; training wants its parts by name, frozen, in the right precision, and perhaps
quantized. `Components` is that; `build_pipeline` makes it a diffusers pipeline again, with whatever adapters are attached.

A base is a pipeline folder, one on the Hub, or a single file; `locate` finds and checks it before a weight is read.
"""

import contextlib
import logging
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from t2ilib.config import ConfigError, ModelConfig
from t2ilib.memory import align, require_memory
from t2ilib.models.autoencoders import load_vae
from t2ilib.models.families import Family
from t2ilib.models.locate import SHIPPED, UNUSED, check_folder, fetch_pipeline, folder_bytes, load_family, locate
from t2ilib.models.quantize import QuantizationReport, has_layer, move, quantize
from t2ilib.models.single_file import load_single_file

log = logging.getLogger(__name__)


@dataclass
class Components:
    """A model in parts. `text_encoders` and `tokenizers` keep the pipeline's names; `path`: `model.base`.

    `zero_empty`: the pipeline conditions its unconditional half on zeros, not on the encoded "" (SDXL's
    `force_zeros_for_empty_prompt`); a dropped caption must then be zeros in training too.
    """

    family: Family
    path: str
    unet: nn.Module
    vae: nn.Module
    text_encoders: dict[str, nn.Module]
    tokenizers: dict[str, Any]
    scheduler: Any
    zero_empty: bool = False
    config: ModelConfig | None = None
    quantization: dict[str, QuantizationReport] = field(default_factory=dict)
    parked: list[nn.Module] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def vae_scale(self) -> int:
        """Pixels a latent, along one side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def modules(self) -> dict[str, nn.Module]:
        """Pipeline name -> trainable-in-principle part: the UNet and the text encoders."""
        return {"unet": self.unet, **self.text_encoders}

    def load_full(self) -> "Components":
        """The same base before quantization, on the host, in the dtype it was quantized from. Raises ValueError for one that was
        not loaded from anywhere."""
        if self.config is None:
            raise ValueError(f"{self.path} was not loaded from anywhere, so it cannot be in full precision either")
        dtype = str(choose_dtype(self.config.dtype, self.device)).removeprefix("torch.")
        return load_base(self.config.in_full().model_copy(update={"dtype": dtype}), torch.device("cpu"))

    def parkable(self, trained: Iterable[str]) -> list[nn.Module]:
        """What a training step does without: the VAE and the text encoders that nothing trains."""
        return [self.vae, *(encoder for name, encoder in self.text_encoders.items() if name not in trained)]

    def park(self, trained: Iterable[str]) -> None:
        """Moves the VAE and the text encoders that nothing trains from the device to host memory until they are needed."""
        self.parked = self.parkable(trained)
        for module in self.parked:
            move(module, "cpu")

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """All parts on the device, for as long as the scope lasts."""
        for module in self.parked:
            move(module, self.device)
        try:
            yield
        finally:
            for module in self.parked:
                move(module, "cpu")

    def encode_text(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """What the UNet is conditioned on (see `families`), without time ids; an empty caption as the pipeline has it."""
        encoded = self.family.encode_text(self, captions)
        if self.zero_empty and "" in captions:
            kept = torch.tensor([float(caption != "") for caption in captions])
            encoded = {name: x * kept.to(x).view(-1, *[1] * (x.ndim - 1)) for name, x in encoded.items()}
        return encoded


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
        **UNUSED[family.name],
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


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keeps progress bars and notes about optional packages off the screen while models are read or written."""
    import diffusers
    import transformers

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [(library, library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for library, level, bars in before:
            library.set_verbosity(level)
            if bars:
                library.enable_progress_bar()


def build_pipeline(components: Components):
    """The diffusers pipeline of these parts, attached adapters included; without safety checker, progress bar off."""
    import diffusers

    options = dict(UNUSED[components.family.name])
    if components.family.pooled_conditioning:
        options["force_zeros_for_empty_prompt"] = components.zero_empty
    pipeline = getattr(diffusers, components.family.pipeline_class)(
        vae=components.vae,
        unet=components.unet,
        scheduler=components.scheduler,
        **components.text_encoders,
        **components.tokenizers,
        **options,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_pipeline(components: Components, folder: Path) -> None:
    """Writes the pipeline as a diffusers folder, and takes along the base's `clip` folder, if it has one."""
    with quiet_libraries():
        build_pipeline(components).save_pretrained(folder)
    clip = clip_folder(components)
    if clip is not None:
        shutil.copytree(clip, folder / "clip", dirs_exist_ok=True)


def clip_folder(components: Components) -> Path | None:
    """The contrastive model that lies beside the parts of the tiny models, None for others. tiny-sd15 borrows tiny-sdxl's."""
    if components.path in SHIPPED:
        return SHIPPED["tiny-sdxl"] / "clip"
    folder = Path(components.path) / "clip"
    return folder if folder.is_dir() else None
