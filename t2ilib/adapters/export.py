"""Adapters as files: diffusers' LoRA layout, with the metadata that keeps alpha, and back again."""

import logging
from pathlib import Path

import torch
from safetensors.torch import load_file

from t2ilib.config import AdapterSpec, ConfigError
from t2ilib.models.components import Components, build_pipeline, quiet_libraries

log = logging.getLogger(__name__)

FILE_NAME = "pytorch_lora_weights.safetensors"


def save_adapter(components: Components, folder: Path, spec: AdapterSpec) -> Path:
    """Writes the attached adapters as one file that `load_lora_weights` of diffusers reads; returns the file."""
    import diffusers
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict

    pipeline_class = getattr(diffusers, components.family.pipeline_class)
    adapted = {name: module for name, module in components.modules().items() if getattr(module, "peft_config", None)}
    layers = {f"{name}_lora_layers": contiguous(get_peft_model_state_dict(module)) for name, module in adapted.items()}
    for module in adapted.values():
        for config in module.peft_config.values():
            config.base_model_name_or_path = components.path  # transformers puts the path on this machine there
    if spec.kind == "dora" and len(adapted) > 1:
        log.warning("diffusers' own loader loses the DoRA magnitudes of text encoders; t2ilib.load_adapter keeps them")
    folder.mkdir(parents=True, exist_ok=True)
    pipeline_class.save_lora_weights(folder, **layers, **_collate_lora_metadata(adapted))
    return folder / FILE_NAME


def contiguous(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def load_adapter(components: Components, path: Path, name: str = "default") -> None:
    """Attaches a saved adapter, frozen, to `components`. `path`: the file, or a run's or adapter's folder.

    Raises ConfigError where there is no adapter file, or its layers are not this model's.
    """
    path = Path(path)
    candidates = [path, path / FILE_NAME, path / "adapter" / FILE_NAME]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise ConfigError(
            f"no adapter at {path}: give a .safetensors file, or a folder that holds {FILE_NAME} or adapter/{FILE_NAME}"
        )
    try:
        with quiet_libraries():
            build_pipeline(components).load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ConfigError(f"{file} does not fit {components.path}: {error}") from error
    put_weights(components, file, name)


def put_weights(components: Components, file: Path, name: str) -> None:
    """Sets every weight of the file once more, through peft: transformers' loader loses the DoRA magnitudes of text encoders.

    Raises ConfigError for weights in the file that found no place. The adapter is frozen afterwards.
    """
    from peft import set_peft_model_state_dict

    weights = load_file(file)
    for component, module in components.modules().items():
        own = {k.removeprefix(f"{component}."): v for k, v in weights.items() if k.startswith(f"{component}.")}
        if own:
            left = set_peft_model_state_dict(module, own, adapter_name=name)
            if left is not None and left.unexpected_keys:
                raise ConfigError(
                    f"{file} has weights that {components.path} has no place for: {', '.join(left.unexpected_keys[:4])}"
                )
        module.requires_grad_(False)


def load_checkpoint_adapter(components: Components, folder: Path, step: int) -> None:
    """Attaches the adapter of a run's folder as it was at a checkpoint; raises ConfigError naming the steps there are."""
    from t2ilib.adapters.attach import attach_adapters
    from t2ilib.config import load_run
    from t2ilib.training.checkpoint import list_checkpoints, load_checkpoint

    paths = {int(path.name.removeprefix("step-")): path for path in list_checkpoints(folder / "checkpoints")}
    if step not in paths:
        raise ConfigError(
            f"{folder} has no checkpoint of step {step}; there are {', '.join(map(str, paths)) or 'none'}"
        )
    run = load_run(folder / "run.yaml")
    if run.adapter is None:
        raise ConfigError(
            f"{folder} trained {run.training.trains}, not an adapter: draw with --model {folder / 'model'}"
        )
    weights = load_checkpoint(paths[step]).tensors["weights"]
    for name, module in attach_adapters(components, run.adapter, run.seed).items():
        with torch.no_grad():
            for key, parameter in module.named_parameters():
                if f"{name}.{key}" in weights:
                    parameter.copy_(weights[f"{name}.{key}"])
        module.requires_grad_(False)


def scale_adapter(components: Components, scale: float) -> None:
    """Sets how strongly every attached adapter acts: 1 as trained, 0 switched off (a DoRA of scale 0 would still rescale)."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in components.modules().values():
        for layer in module.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.enable_adapters(scale != 0)
                layer.requires_grad_(False)
                for adapter in layer.active_adapters:
                    layer.set_scale(adapter, scale)
