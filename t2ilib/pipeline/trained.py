"""What a run has trained, loaded again from its folder: for the steps that measure and draw, in whichever process."""

from pathlib import Path

from t2ilib.adapters.load import FILE_NAME, load_adapter
from t2ilib.config import ConfigError, ModelConfig, RunConfig
from t2ilib.models.components import Components
from t2ilib.models.load import load_base
from t2ilib.training.checkpoint import list_checkpoints
from t2ilib.training.state import load_checkpoint_adapter


def trained_file(run: RunConfig) -> Path | None:
    """The file with the weights that a finished run has trained; None where there is none."""
    places = {
        "adapter": run.output / "adapter" / FILE_NAME,
        "unet": run.output / "model" / "unet" / "diffusion_pytorch_model.safetensors",
    }
    file = places.get(run.trains)
    return file if file is not None and file.is_file() else None


def load_trained(run: RunConfig, checkpoint: int | None = None) -> Components:
    """The model that a run has trained, or its base with the adapter of a `checkpoint`. Raises ConfigError where there is none."""
    if run.trains == "nothing":
        return load_base(run.model)
    if checkpoint is not None and run.trains != "adapter":
        raise ConfigError(f"--checkpoint is about adapters, and {run.output} trained {run.trains}: leave it out")
    if checkpoint is None and trained_file(run) is None:
        begun = list_checkpoints(run.output / "checkpoints")
        told = f", but checkpoints up to {begun[-1].name}" if begun else ""
        raise ConfigError(f"{run.output} holds nothing that was trained to its end{told}: run the step train first")
    if run.trains == "unet":
        return load_base(
            ModelConfig(base=str(run.output / "model"), dtype=run.model.dtype, clip_skip=run.model.clip_skip)
        )
    components = load_base(run.model)
    if checkpoint is not None:
        load_checkpoint_adapter(components, run.output, checkpoint)
    else:
        load_adapter(components, run.output)
    return components
