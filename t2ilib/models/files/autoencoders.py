"""The VAE of the user's choice (`model.vae`), in place of the one that a base came with.

A UNet knows latents only by their channels, their size and their scale. Channels and size are checked against the base's
own VAE here; the scale is the chosen VAE's `scaling_factor`, which is the one that caching and drawing then use.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from t2ilib.config import ConfigError, ModelConfig
from t2ilib.memory import require_memory
from t2ilib.models.files.headers import TensorInfo, bytes_in_memory, read_header
from t2ilib.models.files.locate import fetch_files, locate
from t2ilib.models.files.original import vae_tensors

WEIGHTS = "diffusion_pytorch_model.safetensors"
PREFIXES = ("first_stage_model.", "vae.", "")


def load_vae(config: ModelConfig, base: Path, its_unet: bool = True) -> nn.Module:
    """The AutoencoderKL that `model.vae` names, in float32.

    `base`: the folder whose `vae/config.json` describes the base's own VAE. A single file has no config, so it must be of that
    architecture and takes over its scaling factor. `its_unet`: whether the base's UNet, which knows latents of one shape, is used with
    it. Raises ConfigError for what is no such VAE or does not go with the base.
    """
    from diffusers import AutoencoderKL

    path = find_vae(config.vae)
    own = json.loads((base / "vae" / "config.json").read_text())
    if path.is_file():
        header = read_header(path, f"model.vae {path}")
        prefix = check_single_file(header, config, own)
        require_memory_for({name: info for name, info in header.items() if name.startswith(prefix)}, config.vae)
        stored = load_file(path)  # diffusers knows a prefix before original names only, so it gets none
        tensors = {name.removeprefix(prefix): x for name, x in stored.items() if name.startswith(prefix)}
        return AutoencoderKL.from_single_file(
            tensors, config=str(base), subfolder="vae", torch_dtype=torch.float32, local_files_only=True
        )
    chosen = read_vae_config(path, config.vae)
    if its_unet:
        check_match(chosen, own, config)
    require_memory_for(read_header(path / WEIGHTS, f"model.vae: {path / WEIGHTS}"), config.vae)
    return AutoencoderKL.from_pretrained(path, torch_dtype=torch.float32, use_safetensors=True)


def find_vae(name: str, with_weights: bool = True) -> Path:
    """The file, or the folder with config and weights, that `model.vae` names, fetched where it is on the Hub."""
    path, files = Path(locate(name, "model.vae")), ("config.json", *((WEIGHTS,) if with_weights else ()))
    if path.is_file():
        return path
    if not path.exists():
        path = fetch_files(name, (*files, *(f"vae/{file}" for file in files)), "model.vae")
    folder = path if (path / "config.json").exists() else path / "vae"
    lacking = [file for file in files if not (folder / file).exists()]
    if lacking:
        raise ConfigError(
            f"model.vae {name} lacks {' and '.join(lacking)}: give a VAE folder, a pipeline folder with vae/, or a"
            " .safetensors file"
        )
    return folder


def read_vae_config(folder: Path, name: str) -> dict[str, Any]:
    """The config of an AutoencoderKL; raises ConfigError where it is another class's."""
    config = json.loads((folder / "config.json").read_text())
    if (kind := config.get("_class_name")) != "AutoencoderKL":
        raise ConfigError(f"model.vae {name} is a {kind}; Stable Diffusion's VAEs are of the class AutoencoderKL")
    return config


def check_match(chosen: dict[str, Any], own: dict[str, Any], config: ModelConfig) -> None:
    """Raises ConfigError where a VAE makes latents of another shape than the base's UNet was trained on."""
    for what, measure in (("latent channels", latent_channels), ("pixels a latent, along one side,", pixels_a_latent)):
        if measure(chosen) != measure(own):
            raise ConfigError(
                f"model.vae {config.vae} has {measure(chosen)} {what} where model.base {config.base} has {measure(own)}:"
                " choose a VAE that was made for this base"
            )


def latent_channels(config: dict[str, Any]) -> int:
    return config.get("latent_channels", 4)


def pixels_a_latent(config: dict[str, Any]) -> int:
    return 2 ** (len(config.get("block_out_channels", [64])) - 1)


def check_single_file(header: dict[str, TensorInfo], config: ModelConfig, own: dict[str, Any]) -> str:
    """What comes before the names of a file's VAE; raises ConfigError where it does not hold one of the base's architecture, in
    original or diffusers' names."""
    from diffusers import AutoencoderKL

    prefix = next((p for p in PREFIXES if f"{p}decoder.conv_in.weight" in header), None)
    if prefix is None:
        raise ConfigError(f"model.vae {config.vae} holds no VAE: it has no tensor decoder.conv_in.weight")
    channels = header[f"{prefix}decoder.conv_in.weight"].shape[1]
    check_match(own | {"latent_channels": channels}, own, config)
    with torch.device("meta"):
        empty = AutoencoderKL.from_config(own)
    original = f"{prefix}encoder.down.0.block.0.conv1.weight" in header
    expected = vae_tensors(empty, prefix) if original else {prefix + k: x for k, x in empty.state_dict().items()}
    for name, tensor in expected.items():
        if name not in header or squeezed(header[name].shape) != squeezed(tensor.shape):
            found = header[name].shape if name in header else "missing"
            raise ConfigError(
                f"model.vae {config.vae} is not built as the VAE of model.base {config.base} ({name} is {found}, not"
                f" {tuple(tensor.shape)}): a single file has no config, so give a VAE folder with its config.json"
            )
    return prefix


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without trailing ones: a 1x1 convolution in the middle attention is stored as one or as a matrix."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return tuple(shape)


def require_memory_for(header: dict[str, TensorInfo], name: str) -> None:
    needed = bytes_in_memory(header.values(), torch.float32.itemsize)
    require_memory(needed, f"model.vae {name}", "close other programs, or use a machine with more")
