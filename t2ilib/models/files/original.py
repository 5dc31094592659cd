"""The names that Stable Diffusion's parts had before diffusers: the layout of single-file checkpoints.

CompVis' latent-diffusion (SD1.x) and Stability's generative-models (SD2, SDXL) number a UNet's blocks in one flat list
(`input_blocks.4.1`) where diffusers nests them (`down_blocks.1.attentions.0`). What is here goes from the modules in memory to
those names, for any depth; diffusers' `from_single_file` goes the other way. Text encoders are CLIP as transformers names it
in SD1.x and SDXL's first, and OpenCLIP, with one fused matrix for query, key and value, in SD2 and SDXL's second.

Leaves out: UNets with parts that the original code does not have, which are errors.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from t2ilib.config import ConfigError

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
CLIP = ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")
"""What comes before the names of SD1.x's text encoder, and of SDXL's first."""
SD2_TEXT_WIDTH = 1024
"""Hidden size of OpenCLIP-H, by which SD2's text encoder is told from SD1.x's."""


def original_unet_names(unet: nn.Module) -> dict[str, str]:
    """Module of a diffusers UNet -> its name in the original layout, for every module that owns weights.

    `down_blocks.1.attentions.0.proj_in` -> `input_blocks.4.1.proj_in` (SDXL). Names are without `.weight` and `.bias`, and
    without the checkpoint's prefix `model.diffusion_model.`. An attached adapter changes nothing: a wrapped layer keeps the
    name it had. Raises ConfigError for a UNet with modules that the original layout has no place for.
    """
    homes = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    index = 0
    for number, block in enumerate(unet.down_blocks):
        for layer in range(len(block.resnets)):
            index += 1
            homes[f"down_blocks.{number}.resnets.{layer}"] = f"input_blocks.{index}.0"
            homes[f"down_blocks.{number}.attentions.{layer}"] = f"input_blocks.{index}.1"
        if block.downsamplers:
            index += 1
            homes[f"down_blocks.{number}.downsamplers.0.conv"] = f"input_blocks.{index}.0.op"
    for layer in range(len(unet.mid_block.resnets) if unet.mid_block is not None else 0):
        homes[f"mid_block.resnets.{layer}"] = f"middle_block.{2 * layer}"
        homes[f"mid_block.attentions.{layer}"] = f"middle_block.{2 * layer + 1}"
    index = -1
    for number, block in enumerate(unet.up_blocks):
        attends = hasattr(block, "attentions")
        for layer in range(len(block.resnets)):
            index += 1
            homes[f"up_blocks.{number}.resnets.{layer}"] = f"output_blocks.{index}.0"
            homes[f"up_blocks.{number}.attentions.{layer}"] = f"output_blocks.{index}.1"
        homes[f"up_blocks.{number}.upsamplers.0.conv"] = f"output_blocks.{index}.{1 + attends}.conv"
    return rename(unet, homes, RESNET, "resnets")


def original_vae_names(vae: nn.Module) -> dict[str, str]:
    """The same for an AutoencoderKL, without the checkpoint's prefix `first_stage_model.`."""
    homes = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half, blocks, side in (("encoder", vae.encoder.down_blocks, "down"), ("decoder", vae.decoder.up_blocks, "up")):
        homes |= {f"{half}.{name}": f"{half}.{name}" for name in ("conv_in", "conv_out")}
        homes[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        homes |= {f"{half}.mid_block.resnets.{layer}": f"{half}.mid.block_{layer + 1}" for layer in range(2)}
        homes[f"{half}.mid_block.attentions.0"] = f"{half}.mid.attn_1"
        for number, block in enumerate(blocks):
            level = number if side == "down" else len(blocks) - 1 - number  # the original counts from the pixels' side
            for layer in range(len(block.resnets)):
                homes[f"{half}.{side}_blocks.{number}.resnets.{layer}"] = f"{half}.{side}.{level}.block.{layer}"
            homes[f"{half}.{side}_blocks.{number}.{side}samplers.0.conv"] = f"{half}.{side}.{level}.{side}sample.conv"
    return rename(vae, homes, {"conv_shortcut": "nin_shortcut", **VAE_ATTENTION}, "")


def rename(model: nn.Module, homes: Mapping[str, str], inner: Mapping[str, str], within: str) -> dict[str, str]:
    """Module -> original name: the home of its nearest renamed parent, then its own name there.

    `inner` renames what lies below homes whose name contains `within`. Raises ConfigError naming modules without a home.
    """
    names, homeless = {}, []
    for name in weight_owners(model):
        parts = name.split(".")
        home = next((h for n in range(len(parts), 0, -1) if (h := ".".join(parts[:n])) in homes), None)
        if home is None:
            homeless.append(name)
            continue
        rest = name.removeprefix(home).removeprefix(".")
        rest = inner.get(rest, rest) if within in home else rest
        names[name] = f"{homes[home]}.{rest}" if rest else homes[home]
    if homeless:
        raise ConfigError(
            f"the original layout has no place for {', '.join(homeless[:4])} of this {type(model).__name__}"
            f"{f' and {len(homeless) - 4} more modules' if homeless[4:] else ''}: keep it as a diffusers folder"
        )
    return names


def weight_owners(model: nn.Module) -> Iterator[str]:
    """Modules that hold weights themselves, in order; of an adapted layer (peft) the base layer, under its old name."""
    for name, module in model.named_modules():
        if any(part.startswith("lora_") for part in name.split(".")):
            continue
        if next(module.parameters(recurse=False), None) is not None:
            yield name.removesuffix(".base_layer")


def renamed(model: nn.Module, names: Mapping[str, str], prefix: str) -> dict[str, Tensor]:
    state = model.state_dict()
    return {f"{prefix}{names[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": x for key, x in state.items()}


def unet_tensors(unet: nn.Module) -> dict[str, Tensor]:
    """A UNet's weights under the names of a single-file checkpoint; shapes are the same in both layouts."""
    return renamed(unet, original_unet_names(unet), "model.diffusion_model.")


def vae_tensors(vae: nn.Module, prefix: str = "first_stage_model.") -> dict[str, Tensor]:
    """A VAE's weights under original names; its attention's linear layers become the 1x1 convolutions they were."""
    tensors = renamed(vae, original_vae_names(vae), prefix)
    return {key: x[:, :, None, None] if ".attn_1." in key and x.ndim == 2 else x for key, x in tensors.items()}


def clip_tensors(encoder: nn.Module, prefix: str) -> dict[str, Tensor]:
    """A CLIP text encoder's weights as older transformers named them: `text_model.` before everything."""
    state = encoder.state_dict()
    return {f"{prefix}text_model.{key.removeprefix('text_model.')}": x for key, x in state.items()}


def with_text_model(name: str) -> str:
    """A tensor of a checkpoint under its published name: some files leave `text_model.` out of those of CLIP, as transformers
    has done since 5.6."""
    prefix = next((prefix for prefix in CLIP if name.startswith(prefix)), None)
    bare = prefix is not None and not name.startswith(f"{prefix}text_model.")
    return f"{prefix}text_model.{name.removeprefix(prefix)}" if bare else name


def openclip_tensors(encoder: nn.Module, prefix: str) -> dict[str, Tensor]:
    """A CLIP text encoder's weights as OpenCLIP names and shapes them.

    Query, key and value are one matrix (3D, D), and the text projection multiplies from the right: (D, P), not (P, D).
    """
    state = {key.removeprefix("text_model."): x for key, x in encoder.state_dict().items()}
    tensors = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
    }
    if "text_projection.weight" in state:
        tensors["text_projection"] = state["text_projection.weight"].T
    for layer in range(encoder.config.num_hidden_layers):
        source, target = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for leaf in ("weight", "bias"):
            fused = [state[f"{source}.self_attn.{x}_proj.{leaf}"] for x in "qkv"]
            tensors[f"{target}.attn.in_proj_{leaf}"] = torch.cat(fused)
            for name, original in OPENCLIP_LAYER.items():
                tensors[f"{target}.{original}.{leaf}"] = state[f"{source}.{name}.{leaf}"]
    return {prefix + key: x for key, x in tensors.items()}


def text_tensors(encoders: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The weights of the text encoders, by their names in the pipeline, as the checkpoint of their family has them."""
    first = encoders["text_encoder"]
    if "text_encoder_2" in encoders:
        second = openclip_tensors(encoders["text_encoder_2"], "conditioner.embedders.1.model.")
        return clip_tensors(first, CLIP[1]) | second
    if first.config.hidden_size == SD2_TEXT_WIDTH:
        return openclip_tensors(first, "cond_stage_model.model.")
    return clip_tensors(first, CLIP[0])
