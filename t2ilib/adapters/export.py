"""Adapters as files that other programs load: diffusers, peft, kohya (A1111, ComfyUI), or merged into a whole pipeline.

The `diffusers` file is what a run itself writes; the others are made from it by `export_adapter`. Each carries modelspec and
`ss_` metadata: what it was trained on, how big, for how long, which words call it up. A module that a format cannot hold
exactly is refused by name.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from t2ilib.adapters.load import FILE_NAME, adapter_file, load_adapter, read_metadata
from t2ilib.adapters.weights import AdapterLayer, read_layers
from t2ilib.config import ConfigError, ModelConfig, RunConfig, check_choice
from t2ilib.models.components import Components
from t2ilib.models.files.original import original_unet_names
from t2ilib.models.files.single_file import IMPLEMENTATION
from t2ilib.models.load import load_base
from t2ilib.models.pipeline import build_pipeline, quiet_libraries, save_pipeline
from t2ilib.runfile import load_run

log = logging.getLogger(__name__)


def save_adapter(
    components: Components,
    folder: Path,
    start: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes the attached adapter as one file that diffusers' `load_lora_weights` reads; returns the file.

    `start`: see `read_layers`. `metadata`: what to say about it, see `describe`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_diffusers(read_layers(components, start), components, folder / FILE_NAME, metadata or {})
    return folder / FILE_NAME


def write_diffusers(
    layers: Sequence[AdapterLayer], components: Components, file: Path, metadata: Mapping[str, str]
) -> None:
    """One file with the peft config of every component in its metadata, without which alpha is lost."""
    configs = {
        f"{component}.{key}": value
        for component, own in by_component(layers).items()
        for key, value in peft_fields(own).items()
    }
    tensors = {f"{layer.component}.{name}": tensor for layer in layers for name, tensor in peft_tensors(layer).items()}
    if any(layer.magnitude is not None and layer.component != "unet" for layer in layers):
        log.warning("diffusers' own loader loses the DoRA magnitudes of text encoders; t2ilib.load_adapter keeps them")
    write(file, tensors, {**metadata, "format": "pt", "lora_adapter_metadata": json.dumps(configs, sort_keys=True)})


def write_peft(
    layers: Sequence[AdapterLayer], components: Components, folder: Path, metadata: Mapping[str, str]
) -> None:
    """A folder for each component, which `PeftModel.from_pretrained(component, folder)` reads."""
    from peft import LoraConfig

    for component, own in by_component(layers).items():
        config = LoraConfig(**peft_fields(own), base_model_name_or_path=components.path)
        config.inference_mode = True
        (folder / component).mkdir(parents=True, exist_ok=True)
        config.save_pretrained(folder / component)
        tensors = {
            f"base_model.model.{name.removeprefix('text_model.') if not in_text_model(components, component) else name}": tensor
            for layer in own
            for name, tensor in peft_tensors(layer).items()
        }
        write(folder / component / "adapter_model.safetensors", tensors, {**metadata, "format": "pt"})


def write_kohya(
    layers: Sequence[AdapterLayer], components: Components, file: Path, metadata: Mapping[str, str]
) -> None:
    """One file in the layout of kohya's sd-scripts, as A1111 and ComfyUI read it.

    `lora_unet_`, `lora_te_` (SD1.x) or `lora_te1_`, `lora_te2_` (SDXL); `.alpha` is the real alpha of each layer. SDXL's UNet goes
    by its original block names. DoRA's magnitude is `.dora_scale`, (out, 1) or (out, 1, 1, 1): one a row, the norm over
    all else. Raises ConfigError naming the modules that have no name there.
    """
    tensors = {}
    names = kohya_names(components)
    lacking = [f"{layer.component}.{layer.module}" for layer in layers if (layer.component, layer.module) not in names]
    if lacking:
        raise ConfigError(
            f"the kohya layout has no name for {', '.join(lacking[:6])}: exclude these layers, or export as diffusers"
        )
    for layer in layers:
        name = names[layer.component, layer.module]
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = layer.down, layer.up
        tensors[f"{name}.alpha"] = torch.tensor(layer.alpha)
        if layer.magnitude is not None:
            tensors[f"{name}.dora_scale"] = layer.magnitude.reshape(-1, *[1] * (layer.down.ndim - 1))
    implementation = {"modelspec.implementation": IMPLEMENTATION} if components.family.original_names else {}
    write(file, tensors, {**metadata, **implementation})


def kohya_names(components: Components) -> dict[tuple[str, str], str]:
    """(component, module) -> the name of its tensors in kohya's layout, for every linear and convolution layer."""
    family = components.family
    names = {name: name for name, _ in components.unet.named_modules()}
    unet = original_unet_names(components.unet) if family.original_names else names
    modules = {"unet": unet}
    for component, encoder in components.text_encoders.items():
        modules[component] = {name: with_text_model(name) for name, _ in encoder.named_modules()}
    return {
        (component, module): f"{family.kohya_prefixes[component]}_{name.replace('.', '_')}"
        for component, own in modules.items()
        for module, name in own.items()
    }


def write_merged(
    layers: Sequence[AdapterLayer], components: Components, folder: Path, metadata: Mapping[str, str]
) -> None:
    """The whole pipeline with the adapter merged into its weights, as a diffusers folder; `components` must not be quantized."""
    if components.quantization:
        raise ConfigError(
            "merging into quantized weights would round the result again: give the base in full precision"
        )
    pipeline = build_pipeline(components)
    with quiet_libraries():
        pipeline.fuse_lora(components=list(by_component(layers)), safe_fusing=True)
        pipeline.unload_lora_weights()
    save_pipeline(components, folder)
    told = f"An adapter merged into {components.path} in {components.unet.dtype}."
    trained_on = metadata.get("t2ilib.quantization", "none")
    if trained_on != "none":
        told += f" It was trained over that base in {trained_on}."
    rows = "".join(f"- {key}: {value}\n" for key, value in sorted(metadata.items()))
    title = metadata.get("modelspec.title", "merged")
    (folder / "README.md").write_text(f"# {title}\n\n{told} What its file said of it:\n\n{rows}")


FORMATS: dict[str, Callable[[Sequence[AdapterLayer], Components, Path, Mapping[str, str]], None]] = {
    "diffusers": write_diffusers,
    "peft": write_peft,
    "kohya": write_kohya,
    "merged": write_merged,
}
"""Format -> what writes it. diffusers and kohya are a file, peft and merged a folder."""


def export_adapter(
    source: Path, target: Path, format: str, model: ModelConfig | None = None, dtype: str = "auto"
) -> Path:
    """Writes the adapter of a run's folder, or of a diffusers file, in another format; returns the file or folder.

    `model`: the base it goes with; without it that of the run, in full precision, loaded in `dtype`. Raises ConfigError for a
    format that does not exist, a target that does, and what the format cannot hold.
    """
    writer = FORMATS[check_choice(format, FORMATS, "--format")]
    file = adapter_file(source)
    target = Path(target)
    if format in ("diffusers", "kohya") and target.suffix != ".safetensors":
        raise ConfigError(f"{format} is one file: name it {target}.safetensors")
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ConfigError(f"{target} exists already: name another one, or delete it first")
    recorded = next(
        (p / "run.yaml" for p in (source, file.parent, file.parent.parent) if (p / "run.yaml").is_file()), None
    )
    if model is None and recorded is None:
        raise ConfigError(f"{source} is not a run's folder, so nothing says which base it goes with: give --model")
    model = model or load_run(recorded).model
    components = load_base(model.in_full().model_copy(update={"dtype": dtype}))
    load_adapter(components, file)
    target.parent.mkdir(parents=True, exist_ok=True)
    metadata = {
        key: value for key, value in read_metadata(file).items() if key.startswith(("modelspec.", "ss_", "t2ilib."))
    }
    writer(read_layers(components), components, target, metadata)
    return target


def describe(
    run: RunConfig, components: Components, data_digest: str, layers: Sequence[AdapterLayer]
) -> dict[str, str]:
    """modelspec (github.com/Stability-AI/ModelSpec) and `ss_` metadata of a run's adapter; what is not known is not there."""
    spec, side = run.adapter, run.data.resolution
    ranks, alphas = {layer.rank for layer in layers}, {layer.alpha for layer in layers}
    values = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{components.family.architecture}/{spec.kind}",
        "modelspec.implementation": "diffusers",
        "modelspec.title": run.name,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": components.scheduler.config.prediction_type.removesuffix("_prediction"),
        "modelspec.trigger_phrase": ", ".join(spec.trigger_words),
        "ss_sd_model_name": components.path,
        "ss_base_model_version": components.family.version,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(next(iter(ranks))) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{next(iter(alphas)):g}" if len(alphas) == 1 else "Dynamic",
        "ss_network_dropout": f"{spec.dropout:g}",
        "ss_steps": str(run.training.steps),
        "ss_seed": str(run.seed),
        "ss_learning_rate": f"{run.optimizer.learning_rate:g}",
        "ss_optimizer": run.optimizer.name,
        "ss_min_snr_gamma": f"{run.objective.snr_gamma:g}" if run.objective.snr_gamma else "",
        "t2ilib.data_digest": data_digest,
        "t2ilib.training_digest": run.training_digest(),
        "t2ilib.quantization": run.model.quantization,
    }
    return {key: value for key, value in values.items() if value}


def by_component(layers: Sequence[AdapterLayer]) -> dict[str, list[AdapterLayer]]:
    """Component -> its layers, in order."""
    return {
        name: [layer for layer in layers if layer.component == name]
        for name in dict.fromkeys(a.component for a in layers)
    }


def peft_fields(layers: Sequence[AdapterLayer]) -> dict:
    """What a LoraConfig must say about the layers of one component. Names go without `text_model.`, which some versions of
    transformers have and others have not: peft matches by the end of a name."""
    (rank, alpha), _ = Counter((layer.rank, layer.alpha) for layer in layers).most_common(1)[0]
    name = {layer.module: layer.module.removeprefix("text_model.") for layer in layers}
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(name.values()),
        "rank_pattern": {name[layer.module]: layer.rank for layer in layers if layer.rank != rank},
        "alpha_pattern": {name[layer.module]: layer.alpha for layer in layers if layer.alpha != alpha},
        "use_dora": layers[0].magnitude is not None,
    }


def peft_tensors(layer: AdapterLayer) -> dict[str, Tensor]:
    """Names as peft and diffusers have them; those of text encoders with `text_model.`, which their loaders take off if need be."""
    name = layer.module if layer.component == "unet" else with_text_model(layer.module)
    tensors = {f"{name}.lora_A.weight": layer.down, f"{name}.lora_B.weight": layer.up}
    if layer.magnitude is not None:
        tensors[f"{name}.lora_magnitude_vector"] = layer.magnitude
    return tensors


def with_text_model(name: str) -> str:
    """transformers 5 flattened one of the two CLIP text models; files keep the older name, which every loader knows."""
    return name if name.startswith("text_model.") or not name.startswith("encoder.") else f"text_model.{name}"


def in_text_model(components: Components, component: str) -> bool:
    return component == "unet" or hasattr(components.modules()[component], "text_model")


def write(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file whose bytes follow from its content alone, readable as other new files are.

    safetensors writes metadata in an order that differs from process to process, and files that only their owner may read.
    """
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, dict(metadata))
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    draft = file.with_name(f".{file.name}.part")
    draft.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    draft.replace(file)
