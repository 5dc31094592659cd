"""Adapters as files that other programs load: diffusers, peft, kohya (A1111, ComfyUI), or merged into a whole pipeline.

The `diffusers` file is what a run itself writes; the others are made from it by `export_adapter`. Each carries modelspec and
`ss_` metadata: what it was trained on, how big, for how long, which words call it up. A module that a format cannot hold
exactly is refused by name.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from t2ilib.adapters.dora import SAID, check_options, for_program
from t2ilib.adapters.formats import by_component, write_diffusers, write_kohya, write_peft
from t2ilib.adapters.load import (
    BETA_SCHEDULE,
    DRAWN_BY,
    FILE_NAME,
    ZERO_TERMINAL_SNR,
    adapter_file,
    holds_dora,
    load_adapter,
    read_metadata,
    recorded_run,
)
from t2ilib.adapters.placing import about_student
from t2ilib.adapters.tokens import WORDS, fold_words, save_words, stored_words
from t2ilib.adapters.weights import AdapterLayer, WeightDifference, read_layers
from t2ilib.config import ConfigError, ModelConfig, RunConfig, check_choice
from t2ilib.models.components import Components
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
    """Writes the attached adapter as one file that diffusers' `load_lora_weights` reads, and new words beside it; returns the file.

    `start`: see `read_layers`. `metadata`: what to say about it, see `describe`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    layers = read_layers(components, start)
    warn_of_lost_magnitudes(layers)
    words = save_words(components, folder / FILE_NAME)
    write_diffusers(layers, components, folder / FILE_NAME, {**(metadata or {}), **words})
    return folder / FILE_NAME


def warn_of_lost_magnitudes(layers: Sequence[AdapterLayer]) -> None:
    if any(layer.magnitude is not None and layer.component != "unet" for layer in layers):
        log.warning("diffusers' own loader loses the DoRA magnitudes of text encoders; t2ilib.load_adapter keeps them")


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
    fold_words(components)
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
    source: Path,
    target: Path,
    format: str,
    model: ModelConfig | None = None,
    dtype: str = "auto",
    *,
    program: str | None = None,
    form: str | None = None,
    rank: int | None = None,
) -> Path:
    """Writes the adapter of a run's folder, or of a diffusers file, in another format; returns the file or folder.

    Words that were learned beside it are files beside the target, or are part of what is merged.

    `model`: the base it goes with; without it that of the run, in full precision, loaded in `dtype`. A DoRA in kohya's layout
    says for whose arithmetic it is, `program` (one of `dora.PROGRAMS`), or what is written in its place, `form` (one of
    `dora.FORMS`; a LoRA of `rank`); a LoRA is the same for all. Raises ConfigError for a format that does not exist, a target that
    does, and what the format or the program cannot hold.
    """
    writer = FORMATS[check_choice(format, FORMATS, "--format")]
    file = adapter_file(source)
    target = Path(target)
    if format in ("diffusers", "kohya") and target.suffix.lower() != ".safetensors":
        raise ConfigError(f"{format} is one file: name it {target}.safetensors")
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ConfigError(f"{target} exists already: name another one, or delete it first")
    metadata = {
        key: value for key, value in read_metadata(file).items() if key.startswith(("modelspec.", "ss_", "t2ilib."))
    }
    check_options(source, holds_dora(file), format, program, form, rank)
    named = target / FILE_NAME if format == "peft" else target
    beside = [] if format == "merged" else [named.with_name(path.name) for path in stored_words(file).values()]
    if taken := [path for path in beside if path.exists()]:
        raise ConfigError(f"{taken[0]} exists already, and a word of the adapter would go there: name another folder")
    recorded = recorded_run(file)
    if model is None and recorded is None:
        raise ConfigError(f"{source} is not a run's folder, so nothing says which base it goes with: give --model")
    model = model or load_run(recorded).model
    components = load_base(model.in_full().model_copy(update={"dtype": dtype}))
    load_adapter(components, file)
    target.parent.mkdir(parents=True, exist_ok=True)
    layers = read_layers(components)
    if any(layer.magnitude is not None for layer in layers):  # which are the plain ones again, whatever the file had
        metadata = {key: value for key, value in metadata.items() if not key.startswith(SAID)}
        if format == "kohya":
            layers, told = for_program(layers, components, target, program, form, rank)
            metadata = (metadata if form is None else in_another_form(layers, metadata)) | told
    if format == "diffusers":
        warn_of_lost_magnitudes(layers)
    if format == "merged":
        metadata = {key: value for key, value in metadata.items() if key != WORDS}
    else:
        named.parent.mkdir(parents=True, exist_ok=True)
        metadata = {**metadata, **save_words(components, named)}
    writer(layers, components, target, metadata)
    return target


def in_another_form(
    layers: Sequence[AdapterLayer | WeightDifference], metadata: Mapping[str, str]
) -> Mapping[str, str]:
    """What a DoRA's file said of itself, without what is not true of what stands in its place."""
    kept = {key: value for key, value in metadata.items() if not key.startswith("ss_network_")}
    if "modelspec.architecture" in kept:
        kept["modelspec.architecture"] = kept["modelspec.architecture"].removesuffix("/dora") + "/lora"
    loras = [layer for layer in layers if isinstance(layer, AdapterLayer)]
    return kept | (about_network(loras) if len(loras) == len(layers) else {})


def about_network(layers: Sequence[AdapterLayer]) -> dict[str, str]:
    ranks, alphas = {layer.rank for layer in layers}, {layer.alpha for layer in layers}
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(next(iter(ranks))) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{next(iter(alphas)):g}" if len(alphas) == 1 else "Dynamic",
    }


def describe(
    run: RunConfig, components: Components, data_digest: str, layers: Sequence[AdapterLayer]
) -> dict[str, str]:
    """modelspec (github.com/Stability-AI/ModelSpec) and `ss_` metadata of a run's adapter; what is not known is not there."""
    spec, side, noise, drawn = run.adapter, run.data.resolution, components.scheduler.config, run.drawn_by
    values = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{components.family.architecture}/{spec.kind}",
        "modelspec.implementation": "diffusers",
        "modelspec.title": run.name,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": noise.prediction_type.removesuffix("_prediction"),
        "modelspec.trigger_phrase": ", ".join(dict.fromkeys((*spec.trigger_words, *spec.tokens))),
        "ss_sd_model_name": components.path,
        "ss_base_model_version": components.family.version,
        **about_network(layers),
        "ss_network_dropout": f"{spec.dropout:g}",
        "ss_steps": str(run.training.steps),
        "ss_seed": str(run.seed),
        "ss_learning_rate": f"{run.optimizer.learning_rate:g}",
        "ss_optimizer": run.optimizer.name,
        "ss_min_snr_gamma": f"{run.objective.snr_gamma:g}" if run.objective.snr_gamma else "",
        "ss_noise_offset": f"{run.objective.noise_offset:g}" if run.objective.noise_offset else "",
        "ss_clip_skip": str(run.model.clip_skip + 1) if run.model.clip_skip else "",  # where 1 leaves nothing out
        ZERO_TERMINAL_SNR: "True" if noise.get("rescale_betas_zero_snr") else "",
        BETA_SCHEDULE: noise.beta_schedule if run.objective.beta_schedule != "auto" else "",
        DRAWN_BY: drawn.model_dump_json() if drawn else "",
        "modelspec.usage_hint": f"{drawn.scheduler}, {drawn.num_inference_steps} steps, guidance_scale {drawn.guidance_scale:g}"
        if drawn
        else "",
        "t2ilib.data_digest": data_digest,
        "t2ilib.training_digest": run.training_digest(),
        "t2ilib.quantization": run.model.quantization,
        **about_student(components.unet),
    }
    return {key: value for key, value in values.items() if value}
