"""`build_base`: a model whose UNet begins with fresh weights, between the frozen parts of a base or others in their place.

Of `model.base` comes what is not said otherwise: text encoders and tokenizers, the VAE and the noise schedule; its UNet is neither fetched
nor read. With `scratch.text_encoder` a model has that one encoder, whose last hidden state conditions the UNet, as SD1.x has it; in
pixels it has one in any case, of SDXL's two the first.

A pixel model draws by DDIM over the base's noise schedule, and in every step the predicted picture is clipped to [-1, 1], which early
steps and guidance lead out of: pixels have that range, latents have none (static thresholding, arXiv 2205.11487, sec. 2.3). It is set
as `thresholding` with a largest value of 1, which is clipping, and which DDPM, DPM-Solver++ and UniPC heed too when they are made
from this scheduler's config.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from t2ilib.config import ConfigError, ModelConfig, ScratchConfig
from t2ilib.models.components import Components
from t2ilib.models.families import FAMILIES, Family
from t2ilib.models.files.layouts import NOISE
from t2ilib.models.files.text_encoders import load_text_encoder
from t2ilib.models.load import choose_device, choose_dtype, follows_ddpm, load_pipeline, require_known_latents, settled
from t2ilib.models.pipeline import quiet_libraries
from t2ilib.models.pixels import PixelSpace
from t2ilib.models.sizes import Surroundings, build_unet
from t2ilib.seeds import seed_for

log = logging.getLogger(__name__)

SAMPLER = {"timestep_spacing": "trailing"}
"""From the last timestep, where there is noise alone, on (arXiv 2305.08891, sec. 3.3)."""
CLIPPED = SAMPLER | {"thresholding": True, "sample_max_value": 1.0, "clip_sample": False, "set_alpha_to_one": True}
"""For pixels; the last step ends at the predicted picture itself."""
UNCLIPPED = SAMPLER | {"clip_sample": False, "set_alpha_to_one": False}


def build_base(
    model: ModelConfig,
    scratch: ScratchConfig,
    resolution: int,
    seed: int,
    device: torch.device | None = None,
    smaller: Sequence[int] = (),
) -> Components:
    """The parts of a model with a fresh UNet, as `load_base` gives those of a trained one.

    `resolution`: of the pictures that it is for, in pixels; `smaller`: others that it is trained at before. The weights are addressed by
    the run's `seed`. Raises ConfigError for what cannot be found, does not fit together, or is of another kind.
    """
    device = device or choose_device()
    dtype = choose_dtype(model.dtype, device)
    family, pipeline = load_pipeline(model, dtype, unused_parts(scratch))
    names = [name for name in family.text_encoders if getattr(pipeline, name) is not None]
    tokenizers = (name.replace("text_encoder", "tokenizer") for name in names)
    base = Components(
        family=family,
        path=model.base,
        unet=nn.Module(),
        vae=getattr(pipeline, "vae", None) or PixelSpace(),
        text_encoders={name: getattr(pipeline, name) for name in names},
        tokenizers={name: getattr(pipeline, name) for name in tokenizers},
        scheduler=pipeline.scheduler,
        zero_empty=bool(pipeline.config.get("force_zeros_for_empty_prompt", False)),
        config=model,
    )
    encoder = None if scratch.text_encoder is None else load_text_encoder(scratch.text_encoder, dtype)
    components = begin(base, scratch, resolution, seed, encoder, smaller)
    if components.family.has_vae:
        require_known_latents(model, components.vae)
    count = sum(parameter.numel() for parameter in components.unet.parameters())
    log.info(
        "a fresh UNet (%s) of %s parameters for %s, by the text encoder(s) of %s",
        scratch.unet,
        f"{count:,}",
        f"pixels at {resolution}" if not components.family.has_vae else f"latents of pictures at {resolution}",
        scratch.text_encoder or model.base,
    )
    return settled(components, dtype, device)


def begin(
    base: Components,
    scratch: ScratchConfig,
    resolution: int,
    seed: int,
    encoder: tuple[nn.Module, Any] | None = None,
    smaller: Sequence[int] = (),
) -> Components:
    """`base` with a fresh UNet on the current device, and what else `scratch` asks for in place of its own. `encoder`: another text encoder,
    with its tokenizer."""
    family = family_of(base.family, scratch, base.path)
    parts = replace(base, family=family, zero_empty=base.zero_empty and family is base.family)
    if not family.has_vae:
        parts.vae = PixelSpace()
    if encoder is not None:
        parts.text_encoders, parts.tokenizers = {"text_encoder": encoder[0]}, {"tokenizer": encoder[1]}
    parts.text_encoders = {name: parts.text_encoders[name] for name in family.text_encoders}
    kept = {name.replace("text_encoder", "tokenizer") for name in family.text_encoders}
    parts.tokenizers = {name: tokenizer for name, tokenizer in parts.tokenizers.items() if name in kept}
    parts.scheduler = fresh_scheduler(base.scheduler, family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "unet weights"))
        parts.unet = build_unet(scratch.unet, surroundings(parts, resolution))
    for field, side in (("data.resolution", resolution), *(("data.stages", side) for side in smaller)):
        require_whole_halves(parts, scratch.unet, field, side)
    return parts


def unused_parts(scratch: ScratchConfig) -> tuple[str, ...]:
    """The parts of a base that a fresh UNet has no use for."""
    pixels = scratch.space == "pixels"
    others = ("text_encoder", "text_encoder_2") if scratch.text_encoder else ("text_encoder_2",) if pixels else ()
    return ("unet", *(("vae",) if pixels else ()), *others)


def family_of(base: Family, scratch: ScratchConfig, name: str) -> Family:
    """What the model becomes: see above. Raises ConfigError for latents of a base that has none."""
    if scratch.space == "pixels":
        return FAMILIES["pixels"]
    if not base.has_vae:
        raise ConfigError(
            f"scratch.space is latents, and model.base {name} works on pixels and has no VAE: set space to pixels, or model.base to a"
            " model that has one"
        )
    return base if scratch.text_encoder is None else FAMILIES["sd15"]


def surroundings(components: Components, resolution: int) -> Surroundings:
    """What the UNet of these parts sees of pictures of `resolution` pixels."""
    encoders, family, vae = list(components.text_encoders.values()), components.family, components.vae
    return Surroundings(
        text_width=sum(encoder.config.hidden_size for encoder in encoders),
        pooled_width=encoders[-1].config.projection_dim if family.pooled_conditioning else None,
        channels=vae.config.latent_channels,
        side=resolution // components.vae_scale,
        pixels=not family.has_vae,
    )


def fresh_scheduler(base: Any, family: Family) -> Any:
    """The base's; for pixels, and where the base's is of another formulation than DDPM's, DDIM."""
    from diffusers import DDIMScheduler

    if family.has_vae and follows_ddpm(base):
        return base
    noise = dict(base.config) if follows_ddpm(base) else NOISE
    with quiet_libraries():  # the base's config may have fields that DDIM has not
        return DDIMScheduler.from_config(noise, **(UNCLIPPED if family.has_vae else CLIPPED))


def require_whole_halves(components: Components, unet: str, field: str, resolution: int) -> None:
    """Raises ConfigError for pictures of a side that the VAE and the UNet do not halve evenly down to its middle, or not down to it at all."""
    halvings, scale = len(components.unet.config.block_out_channels) - 1, components.vae_scale
    multiple = scale * 2**halvings
    if resolution % multiple:
        latents = f", and of {scale} pixels a latent" if scale > 1 else ""
        raise ConfigError(
            f"{field} {resolution} is no multiple of {multiple}, and scratch.unet {unet} halves what it sees {halvings} times{latents}: choose"
            " another resolution, or a UNet of fewer levels"
        )
