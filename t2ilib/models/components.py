"""`load_base`: the parts of a Stable Diffusion model, whatever its family and wherever it comes from.

A pipeline in diffusers is for drawing; training wants its parts by name, frozen, in the right precision, and perhaps
quantized. `Components` is that; `build_pipeline` makes it a diffusers pipeline again, with whatever adapters are attached.

Only safetensors weights are read. Leaves out: single-file checkpoints, other VAEs.
"""

import contextlib
import json
import logging
import shutil
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from t2ilib.config import ConfigError, ModelConfig, check_choice
from t2ilib.models.families import FAMILIES, Family
from t2ilib.models.quantize import QuantizationReport, quantize_nf4

log = logging.getLogger(__name__)

WEIGHTS = Path(__file__).parent / "weights"
SHIPPED = {"tiny-sdxl": WEIGHTS / "tiny-sdxl"}


@dataclass
class Components:
    """A model in parts. `text_encoders` and `tokenizers` keep the pipeline's names; `path` is a folder or a Hub id.

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

    def parkable(self, trained: Iterable[str]) -> list[nn.Module]:
        """What a training step does without: the VAE and the text encoders that nothing trains."""
        return [self.vae, *(encoder for name, encoder in self.text_encoders.items() if name not in trained)]

    def park(self, trained: Iterable[str]) -> None:
        """Moves the VAE and the text encoders that nothing trains from the device to host memory until they are needed."""
        self.parked = self.parkable(trained)
        for module in self.parked:
            module.to("cpu")

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """All parts on the device, for as long as the scope lasts."""
        for module in self.parked:
            module.to(self.device)
        try:
            yield
        finally:
            for module in self.parked:
                module.to("cpu")

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


def locate(base: str) -> str:
    """The folder or Hub id behind a name; raises ConfigError that says what a name can be."""
    if base in SHIPPED:
        if not (SHIPPED[base] / "model_index.json").exists():
            raise ConfigError(f"the weights of {base} are missing from {SHIPPED[base]}: reinstall t2ilib")
        return str(SHIPPED[base])
    path = Path(base).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").exists():
            raise ConfigError(
                f"model.base {base}: this folder holds no model_index.json, so it is not a diffusers pipeline"
            )
        return str(path)
    if base.count("/") == 1 and not path.is_absolute() and not base.startswith("."):
        return base
    check_choice(base, SHIPPED, "model.base (no such folder, and not a Hub id like owner/name):")
    raise AssertionError("unreachable")


def load_family(path: str, config: ModelConfig) -> Family:
    """The family of a pipeline, from its model_index.json; raises ConfigError naming what the model is instead."""
    folder = Path(path)
    file = folder / "model_index.json" if folder.is_dir() else download(path, "model_index.json", config.revision)
    try:
        name = json.loads(file.read_text())["_class_name"]
    except (ValueError, KeyError):
        raise ConfigError(f"model.base {path}: model_index.json names no pipeline class, it is damaged") from None
    for family in FAMILIES.values():
        if name == family.pipeline_class:
            return family
    known = ", ".join(family.pipeline_class for family in FAMILIES.values())
    raise ConfigError(f"model.base {path} is a {name}; t2ilib trains {known}")


def download(repository: str, name: str, revision: str | None) -> Path:
    """A file of a Hub repository, from the cache or the network; raises ConfigError with one sentence about what is wrong."""
    from huggingface_hub import constants, errors, hf_hub_download

    try:
        return Path(hf_hub_download(repository, name, revision=revision))
    except errors.GatedRepoError:
        reason = f"is gated: accept its licence on https://huggingface.co/{repository}, then `hf auth login`"
    except errors.RevisionNotFoundError:
        reason = f"has no revision {revision!r}"
    except errors.RepositoryNotFoundError:
        reason = "does not exist on the Hub, or is private (then `hf auth login`)"
    except errors.EntryNotFoundError as error:
        if not isinstance(error, errors.LocalEntryNotFoundError):
            reason = f"holds no {name}, so it is not a diffusers pipeline"
        elif constants.HF_HUB_OFFLINE:
            reason = "is not in the local cache, and HF_HUB_OFFLINE=1 forbids fetching it: unset that, or give a local folder"
        else:
            reason = (
                "is not in the local cache and the Hub cannot be reached: connect, or give a local folder or tiny-sdxl"
            )
    except (OSError, errors.HfHubHTTPError) as error:
        reason = f"could not be fetched ({type(error).__name__}: {error}): connect, or give a local folder or tiny-sdxl"
    raise ConfigError(f"model.base {repository} {reason}")


def check_folder(folder: Path, family: Family, variant: str | None) -> None:
    """Raises ConfigError naming every file that a pipeline folder lacks; for pickled weights, how to convert them."""
    lacking, pickled, variants = [], [], set()
    stems = {
        "unet": "diffusion_pytorch_model",
        "vae": "diffusion_pytorch_model",
        **dict.fromkeys(family.text_encoders, "model"),
    }
    for part, stem in stems.items():
        if not (folder / part / "config.json").exists():
            lacking.append(f"{part}/config.json")
        infixes = [f".{variant}", ""] if variant else [""]
        whole = [folder / part / f"{stem}{infix}.safetensors" for infix in infixes]
        indices = [folder / part / f"{stem}.safetensors.index{infix}.json" for infix in infixes]
        index = next(filter(Path.exists, indices), None)
        if any(map(Path.exists, whole)):
            continue
        if index is not None:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            lacking += [f"{part}/{shard}" for shard in shards if not (folder / part / shard).exists()]
            continue
        lacking.append(f"{part}/{whole[-1].name}")
        pickled += [f"{part}/{path.name}" for path in sorted((folder / part).glob(f"{stem}*.bin"))]
        variants |= {path.name.split(".")[1] for path in (folder / part).glob(f"{stem}.*.safetensors")}
    for name in family.text_encoders:
        tokenizer = name.replace("text_encoder", "tokenizer")
        if not any((folder / tokenizer / file).exists() for file in ("tokenizer.json", "vocab.json")):
            lacking.append(f"{tokenizer}/vocab.json")
    if not (folder / "scheduler" / "scheduler_config.json").exists():
        lacking.append("scheduler/scheduler_config.json")
    if not lacking:
        return
    hint = ""
    if pickled:
        hint = (
            f". Its weights are pickles ({', '.join(pickled)}), which can run any code when they are opened. If you trust where they"
            " are from, convert them once: load the pipeline in diffusers with use_safetensors=False and call"
            " save_pretrained(folder, safe_serialization=True)"
        )
    elif variants:
        hint = f". It holds the variant {', '.join(sorted(variants))}: set model.variant"
    raise ConfigError(f"model.base {folder} is incomplete, it lacks {', '.join(lacking)}{hint}")


def load_base(config: ModelConfig, device: torch.device | None = None) -> Components:
    """Loads a base model: frozen, in eval mode, on `device`, quantized if `config` says so.

    The VAE stays in float32, because SDXL's overflows in float16. Raises ConfigError for a name that is neither shipped,
    nor a folder, nor on the Hub, and for a model of another family.
    """
    import diffusers

    device = device or choose_device()
    dtype = choose_dtype(config.dtype, device)
    path = locate(config.base)
    family = load_family(path, config)
    if Path(path).is_dir():
        check_folder(Path(path), family, config.variant)
    with quiet_libraries():
        pipeline = getattr(diffusers, family.pipeline_class).from_pretrained(
            path,
            revision=config.revision,
            variant=config.variant,
            torch_dtype={"vae": torch.float32, "default": dtype},
            use_safetensors=True,
        )
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
    )
    for name, module in (*components.modules().items(), ("vae", components.vae)):
        module.requires_grad_(False).eval()
        if config.quantization == "nf4" and name != "vae":
            report = components.quantization[name] = quantize_nf4(module, dtype, device)
            log.info(
                "%s in NF4: %d linear layers, %.1f -> %.1f MiB%s",
                name,
                len(report.quantized),
                report.bytes_before / 2**20,
                report.bytes_after / 2**20,
                f", kept {', '.join(report.kept)}" if report.kept else "",
            )
        module.to(device)
    return components


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

    options = {
        "sd15": {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
        "sdxl": {"force_zeros_for_empty_prompt": components.zero_empty, "add_watermarker": False},
    }[components.family.name]
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
    """The contrastive model that lies beside the parts of the tiny models, None for others."""
    folder = SHIPPED.get(components.path, Path(components.path)) / "clip"
    return folder if folder.is_dir() else None
