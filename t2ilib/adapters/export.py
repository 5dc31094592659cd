"""Adapters as files: diffusers' LoRA layout, with the metadata that keeps alpha, and back again."""

from pathlib import Path

import torch

from t2ilib.config import AdapterSpec, ConfigError
from t2ilib.models.components import Components

FILE_NAME = "pytorch_lora_weights.safetensors"


def save_adapter(components: Components, folder: Path, spec: AdapterSpec) -> Path:
    """Writes the attached adapters as one file that `load_lora_weights` of diffusers reads; returns the file."""
    import diffusers
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict

    pipeline_class = getattr(diffusers, components.family.pipeline_class)
    adapted = {name: module for name, module in components.modules().items() if getattr(module, "peft_config", None)}
    layers = {f"{name}_lora_layers": contiguous(get_peft_model_state_dict(module)) for name, module in adapted.items()}
    folder.mkdir(parents=True, exist_ok=True)
    pipeline_class.save_lora_weights(folder, **layers, **_collate_lora_metadata(adapted))
    return folder / FILE_NAME


def contiguous(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def load_adapter(components: Components, path: Path, name: str = "default") -> None:
    """Attaches a saved adapter, frozen, to `components`. `path`: the file, or a run's or adapter's folder.

    Raises ConfigError where there is no adapter file, or its layers are not this model's.
    """
    from t2ilib.models.components import build_pipeline

    path = Path(path)
    candidates = [path, path / FILE_NAME, path / "adapter" / FILE_NAME]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise ConfigError(f"no adapter at {path}: give a .safetensors file, or a folder that holds {FILE_NAME} or adapter/{FILE_NAME}")
    try:
        build_pipeline(components).load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ConfigError(f"{file} does not fit {components.path}: {error}") from error
