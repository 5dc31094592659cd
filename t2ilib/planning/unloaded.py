"""A model as `load_base` would load it, without its weights: on the meta device, from config files alone, for planning.

Leaves out tokenizers, which hold no memory worth the name, and `model.vae` beside a trained UNet: the base's own VAE stands for it.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from t2ilib.config import ConfigError, ModelConfig, RunConfig
from t2ilib.models.components import Components
from t2ilib.models.families import FAMILIES, Family, skip_layers
from t2ilib.models.files.autoencoders import find_vae, read_vae_config
from t2ilib.models.files.headers import read_header
from t2ilib.models.files.layouts import LAYOUTS, build_layout, is_layout
from t2ilib.models.files.locate import CONFIGS, fetch_files, lacking_configs, load_family, locate
from t2ilib.models.files.single_file import empty_parts, find_configs, recognise
from t2ilib.models.files.text_encoders import find_text_encoder, read_text_config
from t2ilib.models.pipeline import quiet_libraries
from t2ilib.models.pixels import PixelSpace
from t2ilib.models.scratch import begin


def begin_unloaded(run: RunConfig, dtype: torch.dtype) -> Components:
    """What `scratch.build_base` gives of the run, in `dtype`, but on the meta device; its base may be a layout too."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel

    scratch, data = run.scratch, run.data
    base = build_unloaded(
        run.model.model_copy(update={"clip_skip": 0}), dtype
    )  # of the encoder that it is about, below
    with torch.device("meta"), quiet_libraries():
        encoder = None
        if run.model.vae is not None and (folder := find_vae(run.model.vae, with_weights=False)).is_dir():
            base.vae = AutoencoderKL.from_config(read_vae_config(folder, run.model.vae)).requires_grad_(False).eval()
        if scratch.text_encoder is not None:
            folder, _ = find_text_encoder(scratch.text_encoder, with_weights=False)
            encoder = CLIPTextModel(read_text_config(folder)).requires_grad_(False).eval().to(dtype), None
        components = begin(base, scratch, data.resolution, run.seed, encoder, tuple(data.stages))
        components.unet.requires_grad_(False).eval().to(dtype)
    skip_layers(components.family, components.text_encoders, run.model.clip_skip)
    return components


def build_unloaded(config: ModelConfig, dtype: torch.dtype) -> Components:
    """UNet and text encoders in `dtype`, the VAE in float32, as `load_base` has them, but on the meta device.

    `config.base` may also be the name of a layout. Of a folder or a Hub repository only config files are read, of a single file
    its header. Raises ConfigError for what is none of these, and for a config file that is missing.
    """
    from diffusers import DDPMScheduler

    if is_layout(config.base):
        components = build_layout(config.base, dtype)
        components.vae.float()
        skip_layers(components.family, components.text_encoders, config.clip_skip)
        return components
    with config_folder(config) as (folder, family), quiet_libraries():
        parts = empty_parts(folder, family)
        scheduler = DDPMScheduler.from_config(read_config(folder, "scheduler/scheduler_config.json"))
        zero_empty = bool(read_config(folder, "model_index.json").get("force_zeros_for_empty_prompt", False))
        for name, part in parts.items():
            part.requires_grad_(False).eval().to(torch.float32 if name == "vae" else dtype)
    unet, vae = parts.pop("unet"), parts.pop("vae", None) or PixelSpace().to("meta")
    skip_layers(family, parts, config.clip_skip)
    return Components(family, config.base, unet, vae, parts, {}, scheduler, zero_empty)


def native_resolution(config: ModelConfig) -> int:
    """Side in pixels of the pictures that the UNet was made for; reads config files only."""
    if is_layout(config.base):
        unet, vae = LAYOUTS[config.base]["unet"], LAYOUTS[config.base]["vae"]
    else:
        with config_folder(config) as (folder, family):
            unet = read_config(folder, "unet/config.json")
            if not family.has_vae:
                return unet["sample_size"]
            vae = read_config(folder, "vae/config.json")
    return unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)


@contextlib.contextmanager
def config_folder(config: ModelConfig) -> Iterator[tuple[Path, Family]]:
    """A folder with the configs of `config.base`, whatever that is, for as long as the scope lasts, and the model's family."""
    path = locate(config.base)
    with tempfile.TemporaryDirectory(prefix="t2ilib-") as scratch:
        if Path(path).is_file():
            kind = recognise(read_header(Path(path), f"model.base {path}"), Path(path))
            family = FAMILIES["sdxl" if kind == "sdxl" else "sd15"]
            yield find_configs(Path(path), kind, family, config, Path(scratch)), family
        else:
            family = load_family(path, config)
            folder = Path(path)
            if not folder.is_dir():
                folder = fetch_files(path, CONFIGS, "model.base", revision=config.revision)
            lacking = [name for name in lacking_configs(folder, family) if not name.startswith("tokenizer")]
            if lacking:
                raise ConfigError(f"model.base {config.base} is incomplete, it lacks {', '.join(lacking)}")
            yield folder, family


def read_config(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text())
