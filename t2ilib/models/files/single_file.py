"""One `.safetensors` file with a whole Stable Diffusion model, as people download and exchange them: read, refused, written.

Such a file holds weights under the names of the original code (see `original`) and no configs, tokenizers or scheduler. Its
kind is told from its header alone; the configs come from `layouts` for models of the published sizes and from `model.config`
for others; then diffusers' `from_single_file` loads it, without asking the Hub for anything that is here.

The file does not say what its UNet predicts, unless it carries the keys `v_pred` and `ztsnr` (as ComfyUI and others write
them): then velocity, on a schedule of zero terminal SNR. Otherwise it is what the configs say, noise for the published
layouts; `objective.name` trains another. Leaves out: EMA weights beside the trained ones, which are not read.
"""

import logging
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from t2ilib.config import ConfigError, ModelConfig
from t2ilib.memory import require_disk, require_memory
from t2ilib.models.components import Components
from t2ilib.models.families import FAMILIES, Family
from t2ilib.models.files.autoencoders import load_vae, squeezed
from t2ilib.models.files.headers import TensorInfo, read_header
from t2ilib.models.files.layouts import write_configs
from t2ilib.models.files.locate import (
    CONFIGS,
    ENDING,
    fetch_files,
    in_small_letters,
    lacking_configs,
    load_family,
    locate,
)
from t2ilib.models.files.original import (
    CLIP,
    original_unet_names,
    text_tensors,
    unet_tensors,
    vae_tensors,
    with_text_model,
)
from t2ilib.models.noise import BETAS, scheduler_for

__all__ = ["load_single_file", "original_unet_names", "recognise", "save_single_file"]

log = logging.getLogger(__name__)

UNET = "model.diffusion_model."
VAE = "first_stage_model."
VOCABULARY = "openai/clip-vit-large-patch14"
"""Whose tokenizer all Stable Diffusion text encoders share; it cannot be shipped."""
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")

ARCHITECTURES = {name: family.architecture for name, family in FAMILIES.items()} | {"sd2": "stable-diffusion-v2"}
IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"
"""Whose code the original names are of, as modelspec wants it said."""
TITLES = {"sd15": "SD1.x", "sd2": "SD2", "sdxl": "SDXL"}

REFUSED = (
    (
        r"lora_(unet|te\d?)_|\.lora_(A|B|down|up|magnitude_vector)\b|\.(hada_w1_a|lokr_w1\w*|oft_blocks|dora_scale)$",
        "an adapter (a LoRA or one of its kin), not a model: model.base is the model that it was trained on",
    ),
    (r"(^|\.)joint_blocks\.0\.", "an SD3 model"),
    (r"(^|\.)double_blocks\.0\.img_attn\.|(^|\.)single_transformer_blocks\.0\.", "a Flux model"),
    (r"(^|\.)transformer_blocks\.0\.attn\.add_q_proj\.", "an SD3 or Flux transformer in diffusers' layout"),
    (r"^(control_model|controlnet_cond_embedding|zero_convs)\.", "a ControlNet, not a model"),
    (r"^conditioner\.embedders\.0\.model\.", "the SDXL refiner, which only finishes what the base has drawn"),
    (r"^edm_mean$", "Playground v2.5, which is SDXL in another noise formulation (EDM)"),
    (r"^(model\.)?(clip_txt_mapper|down_blocks\.0\.0\.channelwise)\.", "a Stable Cascade model"),
    (r"^(emb_params|clip_[lg])$", "a textual inversion embedding, not a model"),
    (r"^(down_blocks|mid_block)\.\S+\.motion_modules\.|motion_modules\.", "an AnimateDiff motion module"),
)
"""Pattern of a tensor name -> what the file is."""
INPUTS = {
    5: "a depth-conditioned model",
    7: "an upscaler",
    8: "an editing model (InstructPix2Pix)",
    9: "an inpainting model",
}
"""Channels that the UNet takes -> what the file is; text to image takes the latents alone."""
TRAINED = "t2ilib trains SD1.x, SD2 and SDXL"


def recognise(header: dict[str, TensorInfo], path: Path) -> str:
    """`sd15`, `sd2` or `sdxl`, from tensor names and shapes; raises ConfigError that names what the file is instead."""
    for pattern, what in REFUSED:
        if any(re.search(pattern, name) for name in header):
            raise ConfigError(f"model.base {path} is {what}; {TRAINED}")
    inputs = header.get(f"{UNET}input_blocks.0.0.weight")
    if inputs is not None and inputs.shape[1] in INPUTS:
        raise ConfigError(
            f"model.base {path} is {INPUTS[inputs.shape[1]]}: its UNet takes {inputs.shape[1]} channels; {TRAINED}"
        )
    if inputs is not None:
        prefixes = {
            "sdxl": "conditioner.embedders.1.model.",
            "sd2": "cond_stage_model.model.",
            "sd15": CLIP[0],
        }
        for kind, prefix in prefixes.items():
            if any(name.startswith(prefix) for name in header):
                return kind
        raise ConfigError(f"model.base {path} holds a UNet without its text encoders: take the file of the whole model")
    parts = (
        ("down_blocks.0.resnets.0.conv1.weight", "a UNet in diffusers' layout: give the whole pipeline folder"),
        ("decoder.conv_in.weight", "a VAE: give it as model.vae, beside the model as model.base"),
        ("text_model.embeddings.token_embedding.weight", "a text encoder: give the whole model"),
        ("embeddings.token_embedding.weight", "a text encoder: give the whole model"),
    )
    for name, what in parts:
        if name in header:
            raise ConfigError(f"model.base {path} is only {what}")
    some = ", ".join(sorted(header)[:3]) or "none"
    raise ConfigError(f"model.base {path} is no Stable Diffusion checkpoint (its tensors: {some}, ...); {TRAINED}")


def load_single_file(path: Path, config: ModelConfig, dtype: torch.dtype) -> tuple[Family, Any]:
    """The family and the diffusers pipeline of a file: the VAE in float32, the rest in `dtype`.

    Raises ConfigError for what is not a whole SD1.x, SD2 or SDXL model, or does not fit into memory, before reading weights.
    """
    import diffusers

    stored = read_header(path, f"model.base {path}")
    header = {with_text_model(name): tensor for name, tensor in stored.items()}
    kind = recognise(header, path)
    family = FAMILIES["sdxl" if kind == "sdxl" else "sd15"]
    with tempfile.TemporaryDirectory(prefix="t2ilib-") as scratch:
        configs = find_configs(path, kind, family, config, Path(scratch))
        parts = empty_parts(configs, family)
        check_tensors(header, parts, path, config)
        tokenizers = {} if config.config else load_tokenizers(parts, path)
        vae = None if config.vae is None else load_vae(config, configs)
        require_memory_of(parts, dtype, path, vae is None)
        options = {"config": str(configs), "local_files_only": True}
        named = str(in_small_letters(path, Path(scratch)))
        if vae is None:
            vae = diffusers.AutoencoderKL.from_single_file(named, subfolder="vae", torch_dtype=torch.float32, **options)
        if header.keys() != stored.keys():
            options["text_encoder"] = load_clip(path, parts["text_encoder"], dtype)
        pipeline = getattr(diffusers, family.pipeline_class).from_single_file(
            named, vae=vae, torch_dtype=dtype, **options, **tokenizers, **family.left_out
        )
    pipeline.scheduler = marked_scheduler(pipeline.scheduler, header)
    return family, pipeline


def load_clip(path: Path, empty: nn.Module, dtype: torch.dtype) -> nn.Module:
    """CLIP's text encoder from a file that leaves out `text_model.`: diffusers does not find it there. `empty`: see `empty_parts`."""
    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if name.startswith(CLIP)]  # noqa: SIM118, it is no dict
        state = {with_text_model(name).partition(".text_model.")[2]: file.get_tensor(name) for name in names}
    own = {key: state[key.removeprefix("text_model.")] for key in empty.state_dict()}
    return type(empty).from_pretrained(None, config=empty.config, state_dict=own, dtype=dtype)


def find_configs(path: Path, kind: str, family: Family, config: ModelConfig, scratch: Path) -> Path:
    """The folder with the configs of a file's parts: `model.config`'s, or the published ones, written into `scratch`."""
    if config.config is None:
        if kind == "sd2":
            raise ConfigError(
                f"model.base {path} is an SD2 model, and its file does not say whether it predicts noise or velocity: set"
                " model.config to the diffusers folder or Hub id of the SD2 model that it was made from"
            )
        write_configs(kind, scratch)
        return scratch
    folder = Path(locate(config.config, "model.config"))
    if folder.is_file():
        raise ConfigError(f"model.config {folder} is a file: give a diffusers folder, whose configs describe the model")
    if not folder.is_dir():
        folder = fetch_files(config.config, CONFIGS, "model.config")
    described = load_family(str(folder), config, "model.config")
    if described is not family:
        raise ConfigError(
            f"model.config {config.config} is a {described.pipeline_class}, but model.base {path} is an {TITLES[kind]} model"
        )
    lacking = lacking_configs(folder, family)
    if lacking:
        raise ConfigError(f"model.config {config.config} is incomplete, it lacks {', '.join(lacking)}")
    return folder


def empty_parts(configs: Path, family: Family) -> dict[str, nn.Module]:
    """The modules that a pipeline folder's configs describe, without weights (on the meta device)."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    encoders = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    with torch.device("meta"):
        parts = {
            "unet": UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(configs, subfolder="unet")),
        }
        if family.has_vae:
            parts["vae"] = AutoencoderKL.from_config(AutoencoderKL.load_config(configs, subfolder="vae"))
        for name in family.text_encoders:
            parts[name] = encoders[name](CLIPTextConfig.from_pretrained(configs, subfolder=name))
    return parts


def original_tensors(parts: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The tensors of a whole checkpoint, from the pipeline's modules by name; the VAE may be left out.

    Raises ConfigError for an SDXL whose text encoders are equally wide: readers tell them apart by that.
    """
    encoders = {name: module for name, module in parts.items() if name.startswith("text_encoder")}
    widths = [module.config.hidden_size for module in encoders.values()]
    if len(widths) > len(set(widths)):
        raise ConfigError(
            f"both text encoders are {widths[0]} wide, and a single file tells them apart by width: keep it as a folder"
        )
    vae = vae_tensors(parts["vae"], VAE) if "vae" in parts else {}
    return unet_tensors(parts["unet"]) | vae | text_tensors(encoders)


def check_tensors(header: dict[str, TensorInfo], parts: dict[str, nn.Module], path: Path, config: ModelConfig) -> None:
    """Raises ConfigError where a file lacks a tensor that its configs ask for, or has it in another shape."""
    if config.vae is not None:
        parts = {name: part for name, part in parts.items() if name != "vae"}
    elif not any(name.startswith(VAE) for name in header):
        raise ConfigError(f"model.base {path} holds no VAE: set model.vae to one that was made for this kind of model")
    expected = original_tensors(parts)
    lacking = [name for name in expected if name not in header]
    source = f"model.config {config.config}" if config.config else "the published model of its kind"
    if lacking:
        raise ConfigError(
            f"model.base {path} lacks {len(lacking)} of the {len(expected)} tensors of {source}, the first being"
            f" {lacking[0]}: it is not whole, or of another size{advice(config)}"
        )
    for name, tensor in expected.items():
        found, wanted = header[name].shape, tuple(tensor.shape)
        if found != wanted and not (".attn_1." in name and squeezed(found) == squeezed(wanted)):
            raise ConfigError(
                f"model.base {path} does not have the sizes of {source}: {name} is {' x '.join(map(str, found))}, not"
                f" {' x '.join(map(str, wanted))}{advice(config)}"
            )


def advice(config: ModelConfig) -> str:
    given = "another one" if config.config else "a diffusers folder, tiny-sdxl or a Hub id"
    return f"; if it is meant to be so, set model.config to {given} whose configs describe it"


def load_tokenizers(parts: dict[str, nn.Module], path: Path) -> dict[str, Any]:
    """CLIP's tokenizer from the Hub's cache or the Hub, under the names of the pipeline; raises ConfigError without it.

    The files are fetched and checked here: asked for a repository that it cannot reach, transformers returns a tokenizer of two
    tokens instead of an error. SDXL's second encoder was trained with "!" (token 0) as padding, the others with the end of text.
    """
    from transformers import CLIPTokenizer

    instead = "set model.config to a diffusers folder that has tokenizers"
    folder = fetch_files(VOCABULARY, TOKENIZER, f"model.base {path} holds no tokenizer, and that of", instead)
    tokenizers = {}
    for name, encoder in parts.items():
        if not name.startswith("text_encoder"):
            continue
        padding = {"pad_token": "!"} if name == "text_encoder_2" else {}
        tokenizer = CLIPTokenizer.from_pretrained(folder, **padding)
        if len(tokenizer) != encoder.config.vocab_size:
            raise ConfigError(
                f"CLIP's tokenizer from {VOCABULARY} in {folder} has {len(tokenizer)} tokens, not"
                f" {encoder.config.vocab_size}: delete that folder to fetch it again, or set model.config"
            )
        tokenizers[name.replace("text_encoder", "tokenizer")] = tokenizer
    return tokenizers


def require_memory_of(parts: dict[str, nn.Module], dtype: torch.dtype, path: Path, with_vae: bool) -> None:
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    vae = counts.pop("vae") * torch.float32.itemsize * with_vae
    remedy = "close other programs, set model.dtype to bfloat16, or use a machine with more"
    require_memory(sum(counts.values()) * dtype.itemsize + vae, f"model.base {path}", remedy)


def marked_scheduler(scheduler: Any, header: dict[str, TensorInfo]) -> Any:
    """The scheduler as the file's marks `v_pred` and `ztsnr` want it (arXiv 2305.08891); without marks as it is."""
    if "v_pred" not in header:
        return scheduler
    return scheduler_for(scheduler, "v_prediction", zero_terminal_snr=True if "ztsnr" in header else None)


def save_single_file(components: Components, path: Path) -> None:
    """Writes the whole model as one .safetensors file in the original layout, in the precision that it is held in.

    diffusers, A1111 and ComfyUI read such files. Raises ConfigError where that layout cannot hold the model: adapters that
    are still attached, quantized weights, a UNet that predicts samples or was trained by another noise schedule than Stable
    Diffusion's, or text encoders that cannot be told apart or lack layers.
    """
    from safetensors.torch import save_file

    path = Path(path)
    if path.suffix.lower() != ENDING:
        raise ConfigError(f"{path}: a single file is written as .safetensors")
    if components.quantization:
        raise ConfigError(f"{components.path} is quantized: load it with model.quantization none to write it")
    adapted = [name for name, module in components.modules().items() if getattr(module, "peft_config", None)]
    if adapted:
        raise ConfigError(
            f"{', '.join(adapted)} of {components.path} carry an adapter: merge it or save it as a file of its own"
        )
    scheduler = components.scheduler.config
    if scheduler.prediction_type not in ("epsilon", "v_prediction"):
        raise ConfigError(
            f"a single file cannot say that its UNet predicts {scheduler.prediction_type}: keep the folder"
        )
    betas = {"beta_schedule": "scaled_linear", **BETAS["scaled_linear"]}
    if scheduler.get("trained_betas") is not None or any(scheduler[name] != value for name, value in betas.items()):
        raise ConfigError(
            f"a single file cannot say that its UNet was trained by the betas {scheduler.beta_schedule}, {scheduler.beta_start:g} to"
            f" {scheduler.beta_end:g}: those who read it take Stable Diffusion's own. Keep the folder"
        )
    if components.config is not None and components.config.clip_skip:
        raise ConfigError(
            f"model.clip_skip has left out {components.config.clip_skip} of the text encoder's layers, and a single file holds all of"
            " them: keep the folder"
        )
    tensors = original_tensors({"vae": components.vae, **components.modules()})
    kind = "sd2" if any(name.startswith("cond_stage_model.model.") for name in tensors) else components.family.name
    if scheduler.prediction_type == "v_prediction":
        tensors["v_pred"] = torch.tensor([])
        if scheduler.get("rescale_betas_zero_snr"):
            tensors["ztsnr"] = torch.tensor([])
    bytes_needed = sum(x.numel() * x.element_size() for x in tensors.values())
    require_disk(path.parent, bytes_needed, f"the weights of {path.name}", "free some, or write to another disk")
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": ARCHITECTURES[kind],
        "modelspec.implementation": IMPLEMENTATION,
        "modelspec.title": path.stem,
        "modelspec.prediction_type": {"epsilon": "epsilon", "v_prediction": "v"}[scheduler.prediction_type],
    }
    save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, path, metadata)
    log.info("%s: %d tensors, %.1f MiB", path, len(tensors), bytes_needed / 2**20)
