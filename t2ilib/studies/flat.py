"""The form that study files had before they spoke RunConfig's sections: flat parameters of a notebook. Told apart, and shown anew.

Nothing runs from the old form; the error has the new form of what a file says in full, ready to be put in its place.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from t2ilib.config import ConfigError

SECTIONS = {
    "model": ("base", "quantization", "quantize_convolutions"),
    "adapter": (
        *("kind", "rank", "alpha", "rank_stabilized", "init", "targets", "text_encoder_targets", "text_encoder_rank"),
        *("dropout", "dropout_kind"),
    ),
    "data": ("source", "path", "resolution"),
    "shapes": ("scenes", "num_pictures", "checked_prompts"),
    "objective": ("snr_gamma", "caption_dropout"),
    "optimizer": ("name", "learning_rate", "text_encoder_learning_rate", "lora_plus_ratio"),
    "training": ("steps", "batch_size", "accumulation", "gradient_checkpointing", "checkpoint_every"),
    "evaluation": ("validate_every", "sample_every", "prompts", "guidance_scale", "num_inference_steps"),
}
"""Section -> the fields of it that were parameters; `optimizer.name` was called `optimizer`."""
PLACES = {field: (section, field) for section, fields in SECTIONS.items() for field in fields if field != "name"}
PLACES["optimizer"] = ("optimizer", "name")
DROPPED = ("study", "variant", "seed", "output", "experiment", "preset", "parent_run_id")
FORMER_DEFAULTS = {
    "quantization": "nf4",
    "source": "shapes",
    "scenes": ["heart", "striped", "blueprint"],
    "batch_size": 8,
    "caption_dropout": 0.1,
    "guidance_scale": 1.5,
    "checkpoint_every": 50,
}
"""What the notebook said where a study did not, and RunConfig says otherwise."""
UNTRAINED = {"adapter": None, "training": {"trains": "nothing", "steps": 0}}
"""What `kind: none` meant."""


def sections(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Flat parameters as sections and fields; one that has no place in a RunConfig stands under `unknown`."""
    found: dict[str, Any] = {}
    for name, value in parameters.items():
        if name not in DROPPED:
            section, field = PLACES.get(name, ("unknown", name))
            found.setdefault(section, {})[field] = value
    if parameters.get("kind") == "none":
        found |= {"adapter": None, "training": found.get("training", {}) | UNTRAINED["training"]}
    return found


def translate(values: Mapping[str, Any]) -> dict[str, Any]:
    """A study file in the old form -> what its `run`s are in the new one."""
    shown: dict[str, Any] = {"run": sections(FORMER_DEFAULTS | (values.get("parameters") or {}))}
    for group in ("presets", "variants"):
        shown[group] = {
            name: {"run": sections(part["parameters"])}
            for name, part in (values.get(group) or {}).items()
            if isinstance(part, Mapping) and part.get("parameters")
        }
    return {name: content for name, content in shown.items() if content}


def refuse_flat_form(values: Mapping[str, Any], path: Path) -> None:
    """Raises ConfigError with the new form of a study file that still has `parameters`."""
    parts = [part for group in ("presets", "variants") for part in (values.get(group) or {}).values()]
    if not any(isinstance(part, Mapping) and "parameters" in part for part in (values, *parts)):
        return
    new = yaml.safe_dump(translate(values), sort_keys=False, width=110, default_flow_style=None)
    raise ConfigError(
        f"{path} has `parameters`, as study files had them before they spoke the sections and fields of a run config. Put `run` in"
        f" their place; this is what the file says, in the new form:\n\n{new}"
    )
