"""The model card of a trained UNet: what was trained, on what and how, and how to draw with it. Everything in it is of the run itself.

It lies beside the weights as README.md, with the front matter that the Hub reads (https://huggingface.co/docs/hub/model-cards). Leaves out what
the run does not know: how good the pictures are, what they may be used for, and under which licence.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from t2ilib import __version__
from t2ilib.config import ObjectiveConfig, RunConfig
from t2ilib.data.dataset import Dataset
from t2ilib.models.components import Components
from t2ilib.models.files.locate import SHIPPED
from t2ilib.models.text_to_image import DRAWING
from t2ilib.text import shown

CARD = "README.md"
DRAWING_LATENTS = """```python
from diffusers import DiffusionPipeline

folder = "."  # this folder, or the id of its repository
pipeline = DiffusionPipeline.from_pretrained(folder)
pipeline({prompt}, num_inference_steps={steps}, guidance_scale={guidance}).images[0].save("picture.png")
```"""


def save_card(run: RunConfig, components: Components, training: Dataset, prompts: Sequence[str], folder: Path) -> None:
    """Writes the card of the UNet in the pipeline folder `folder`."""
    (folder / CARD).write_text(write_card(run, components, training, prompts), encoding="utf-8")


def write_card(run: RunConfig, components: Components, training: Dataset, prompts: Sequence[str]) -> str:
    drawing = DRAWING_LATENTS if components.family.has_vae else DRAWING
    code = drawing.format(
        prompt=json.dumps(prompts[0] if prompts else "a photo", ensure_ascii=False),
        steps=run.evaluation.num_inference_steps,
        guidance=run.evaluation.guidance_scale,
    )
    side, count = run.data.resolution, sum(parameter.numel() for parameter in components.unet.parameters())
    base, seen = known_as(run.model.base), "pixels" if not components.family.has_vae else "latents"
    origin = "trained from scratch" if run.scratch else f"trained on from that of {base}"
    if run.student:
        origin = (
            f"which began with weights of that of {base}, without {' and '.join(map(spelled, run.student.leave_out))}"
        )
    rows = "\n".join(f"| {what} | {value} |" for what, value in facts(run, components, training).items())
    return f"""---
{yaml.safe_dump(front_matter(run), sort_keys=False).strip()}
---

# {shown(run.name)}

A UNet of {count:,} parameters, {origin}, that works on {seen}. It draws pictures of {side}x{side} pixels from text.
{parts_of(run, components)}

## Drawing

{code}

## Training

| | |
|---|---|
{rows}
"""


def front_matter(run: RunConfig) -> dict[str, object]:
    """What the Hub reads of a card, of a UNet or an adapter."""
    of_adapter = {"lora": ["lora"], "dora": ["lora", "dora"]}  # a DoRA is loaded, and shown, as a LoRA is
    method = of_adapter[run.adapter.kind] if run.adapter else ["from-scratch" if run.scratch else "full-fine-tuning"]
    if run.student:
        method = ["pruning"]
    method += [] if run.objective.method == "denoising" else [run.objective.method]
    tags = ["text-to-image", "diffusers", "t2ilib", *method]
    told: dict[str, object] = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": tags}
    if run.scratch is None and is_id(run.model.base):
        told["base_model"] = run.model.base
    return told


def parts_of(run: RunConfig, components: Components) -> str:
    """Where the parts come from that were not trained."""
    base, scratch = known_as(run.model.base), run.scratch
    encoders = known_as(scratch.text_encoder) if scratch and scratch.text_encoder else base
    one = len(components.text_encoders) == 1
    told = f"The text encoder{'' if one else 's'} of {encoders}"
    if components.family.has_vae:
        told += f" and the VAE of {known_as(run.model.vae or base)}"
    return f"{told} {'was' if one and not components.family.has_vae else 'were'} not trained."


def facts(run: RunConfig, components: Components, training: Dataset) -> dict[str, object]:
    """What was trained, on what and how; what has no say in a run is left out."""
    objective, optimizer, steps = run.objective, run.optimizer, run.training
    noise = components.scheduler.config
    stages = ", ".join(f"{side} for {count} steps" for side, count in run.data.stages.items())
    loss = (
        objective.loss
        if objective.snr_gamma is None
        else f"{objective.loss}, min-SNR weights at {objective.snr_gamma:g}"
    )
    betas = f", {noise.beta_start:g} to {noise.beta_end:g}" if "linear" in noise.beta_schedule else ""
    drawn = (
        []
        if objective.timesteps == "uniform"
        else [f"{objective.timesteps} of {objective.timestep_mean:g}, {objective.timestep_std:g}"]
    )
    drawn += (
        []
        if objective.timestep_range == (0.0, 1.0)
        else ["from {:g} to {:g} of the schedule".format(*objective.timestep_range)]
    )
    own = training.own
    pictures = f"{len(dict.fromkeys(own.records)):,}" if training.stream is None else "a stream"
    found: dict[str, object] = {
        "pictures": f"{pictures} of {shown(own.name)}",
        "pictures of the class": f"{training.num_class:,}" if training.num_class else None,
        "digest of pictures and captions": f"`{own.digest}`",
        "resolution": f"{stages}, then {run.data.resolution}" if stages else run.data.resolution,
        "predicts": noise.prediction_type,
        "noise": f"{noise.beta_schedule}{betas}, {noise.num_train_timesteps} timesteps"
        + (", zero terminal SNR" if noise.get("rescale_betas_zero_snr") else ""),
        "timesteps": ", ".join(drawn) or None,
        "noise offset": objective.noise_offset or None,
        "objective": told_method(objective),
        "loss": loss,
        "captions dropped": f"{objective.caption_dropout:g}" if objective.caption_dropout else None,
        "steps": f"{steps.steps:,} of {steps.batch_size} pictures",
        "optimizer": f"{optimizer.name}, learning rate {optimizer.learning_rate:g}, {optimizer.schedule},"
        f" {optimizer.warmup_steps} steps of warm-up",
        "weights": f"averaged over some {steps.ema_horizon} steps" if steps.ema_horizon else "those of the last step",
        "seed": run.seed,
        "trained by": f"t2ilib {__version__}",
    }
    return {what: value for what, value in found.items() if value is not None}


def told_method(objective: ObjectiveConfig) -> str:
    """The method by its name, with its own settings."""
    section = getattr(objective, objective.method, None)
    settings = section.model_dump(exclude_none=True) if section else {}
    told = ", ".join(f"{name} {value}" for name, value in settings.items())
    return f"{objective.method} ({told})" if told else objective.method


def spelled(part: str) -> str:
    """What a student leaves out, in words."""
    return f"the {part.replace('_', ' ')}"


def is_id(name: str) -> bool:
    """Whether a name is that of a Hub repository rather than of something here."""
    return name.count("/") == 1 and not name.startswith((".", "~", "/")) and not Path(name).exists()


def known_as(name: str) -> str:
    """A base by its name; of one that lies in a folder here no more than the folder's, which means something to nobody else."""
    return name if name in SHIPPED or is_id(name) else shown(Path(name).name)
