"""The noise schedule that a model is trained by, drawn with and saved as: one scheduler of diffusers, changed in what a run asks for.

A base brings the scheduler that its pictures are drawn with, of any class. Where that class cannot draw what the base is now trained
for, DDIM (arXiv 2010.02502) draws in its place.
"""

import inspect
import logging
from typing import Any

from t2ilib.config import ConfigError, DrawnBy

log = logging.getLogger(__name__)

BETAS = {
    "linear": {"beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos_cap_v2": {},
}
"""First and last beta where a schedule replaces one of another kind: DDPM's (arXiv 2006.11239, sec. 4), Stable Diffusion's
(`linear_start` and `linear_end` in the configs of CompVis' first release, over square roots); the cosine schedule has none."""
NOISE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "timestep_spacing",
    "steps_offset",
    "rescale_betas_zero_snr",
    "thresholding",
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "set_alpha_to_one",
)
"""Fields of a scheduler's config that are said to another class by name: diffusers hands on no field that its file leaves to a default,
and the defaults of classes differ."""
NO_SAMPLES = (
    "PNDMScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
)
"""Classes of diffusers that draw by noise or velocity only."""


def scheduler_for(
    scheduler: Any, prediction: str = "auto", beta_schedule: str = "auto", zero_terminal_snr: bool | None = None
) -> Any:
    """`scheduler`, or one like it for a network that predicts `prediction` under `beta_schedule`; "auto" and None: as it has it.

    With zero terminal SNR the betas are rescaled (arXiv 2305.08891, algorithm 1) and pictures drawn from the last timestep on
    ("trailing", sec. 3.3); samplers that would divide by its alpha, which is 0, put 2^-24 there. The cosine schedule ends so near to
    that, that a network's errors in the noise are multiplied by 20,000: where it comes with epsilon, drawing begins before ("leading").

    Raises ConfigError for epsilon with zero terminal SNR: at the last timestep its answer is what it is given (sec. 3.2).
    """
    from diffusers import DDIMScheduler

    config = scheduler.config
    asked: dict[str, Any] = {} if prediction == "auto" else {"prediction_type": prediction}
    if beta_schedule != "auto" and (beta_schedule != config.beta_schedule or config.get("trained_betas") is not None):
        asked |= {"beta_schedule": beta_schedule, "trained_betas": None, **BETAS[beta_schedule]}
    if zero_terminal_snr is not None:
        asked["rescale_betas_zero_snr"] = zero_terminal_snr
        asked |= {"timestep_spacing": "trailing"} if zero_terminal_snr else {}
    before = {"rescale_betas_zero_snr": False, **config}
    changes = {name: value for name, value in asked.items() if before.get(name) != value}
    now = before | changes
    if changes and (now["prediction_type"], now["beta_schedule"]) == ("epsilon", "squaredcos_cap_v2"):
        changes["timestep_spacing"] = "leading"
    if now["rescale_betas_zero_snr"] and now["prediction_type"] == "epsilon":
        raise ConfigError(
            f"the base predicts noise (epsilon){' by objective.name' if prediction == 'epsilon' else ''}, and with zero terminal SNR"
            " the last timestep is noise alone, of which that says nothing about the picture: set objective.name to v_prediction or"
            " sample, or objective.zero_terminal_snr to false"
        )
    kind = type(scheduler)
    rescales = "rescale_betas_zero_snr" in inspect.signature(kind.__init__).parameters
    if (now["rescale_betas_zero_snr"] and not rescales) or (
        now["prediction_type"] == "sample" and kind.__name__ in NO_SAMPLES
    ):
        log.info("%s cannot draw what is trained: DDIM draws in its place", kind.__name__)
        kind = DDIMScheduler
        changes.setdefault("clip_sample", config.get("clip_sample", False))  # DDIM's own default would cut latents off
    return kind.from_config(config, **changes) if changes or kind is not type(scheduler) else scheduler


def drawing_as(scheduler: Any, drawn: DrawnBy) -> Any:
    """`scheduler`'s like for what is drawn in a way of its own, of the same network and noise."""
    import diffusers

    return of_class(
        getattr(diffusers, drawn.scheduler), scheduler, original_inference_steps=drawn.original_inference_steps
    )


def of_class(kind: type, scheduler: Any, **changes: Any) -> Any:
    """A scheduler of another class of diffusers, like `scheduler` in all but how it samples, and what is to be otherwise."""
    taken, config = inspect.signature(kind.__init__).parameters, scheduler.config
    told = {field: config[field] for field in NOISE if field in taken and field in config}
    if "clip_sample" in taken:  # whose default, of some classes, would cut latents off
        told["clip_sample"] = config.get("clip_sample", False)
    return kind.from_config(config, **told | changes)
