"""Samplers by the names that AUTOMATIC1111's web UI has made known, as diffusers has them.

A sampler is built from the config of the base's own scheduler, so what the network was trained by (betas, prediction, zero terminal
SNR) and how timesteps are spaced live on; so does what pixel models need, that predictions are clipped. Not every sampler can draw for
every network: `samplers_for` gives those that can. Which names are which of diffusers' classes follows the table in diffusers'
documentation of schedulers ("A1111/k-diffusion").

Importing this imports no torch. Leaves out: TCD, of distilled models, and samplers that need other packages (DPM++ SDE).
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from t2ilib.config import ConfigError, check_choice
from t2ilib.models.noise import NO_SAMPLES, of_class

AUTO = "auto"
"""The base's own sampler, as it came, or what an adapter's file says that it is drawn by."""


@dataclass(frozen=True)
class Sampler:
    """`scheduler`: a class of diffusers; `changes`: of its config; `also`: other names that are read as this one."""

    scheduler: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    also: tuple[str, ...] = ()


EVEN = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
KARRAS = EVEN | {"use_karras_sigmas": True}
"""Levels of noise as in arXiv 2206.00364, equation 5."""
ODE, SDE = (
    {"algorithm_type": "dpmsolver++", "solver_order": 2},
    {"algorithm_type": "sde-dpmsolver++", "solver_order": 2},
)

SAMPLERS: dict[str, Sampler] = {
    "Euler": Sampler("EulerDiscreteScheduler", EVEN),
    "Euler Karras": Sampler("EulerDiscreteScheduler", KARRAS),
    "Euler a": Sampler("EulerAncestralDiscreteScheduler"),
    "Heun": Sampler("HeunDiscreteScheduler", EVEN),
    "LMS": Sampler("LMSDiscreteScheduler", EVEN),
    "LMS Karras": Sampler("LMSDiscreteScheduler", KARRAS),
    "DPM2": Sampler("KDPM2DiscreteScheduler", EVEN),
    "DPM2 Karras": Sampler("KDPM2DiscreteScheduler", KARRAS),
    "DPM2 a": Sampler("KDPM2AncestralDiscreteScheduler", EVEN),
    "DPM2 a Karras": Sampler("KDPM2AncestralDiscreteScheduler", KARRAS),
    "DPM++ 2M": Sampler("DPMSolverMultistepScheduler", EVEN | ODE),
    "DPM++ 2M Karras": Sampler("DPMSolverMultistepScheduler", KARRAS | ODE),
    "DPM++ 2M SDE": Sampler("DPMSolverMultistepScheduler", EVEN | SDE),
    "DPM++ 2M SDE Karras": Sampler("DPMSolverMultistepScheduler", KARRAS | SDE),
    "UniPC": Sampler("UniPCMultistepScheduler", EVEN),
    "DEIS": Sampler("DEISMultistepScheduler", EVEN),
    "DDIM": Sampler("DDIMScheduler"),
    "DDPM": Sampler("DDPMScheduler"),
    "PNDM": Sampler("PNDMScheduler", {"skip_prk_steps": True}, ("PLMS",)),
    "LCM": Sampler("LCMScheduler"),
}
"""Name -> sampler."""


def samplers_for(scheduler: Any) -> list[str]:
    """Names of the samplers that can draw for the network that `scheduler` (a base's own, of diffusers) draws for."""
    return [name for name in SAMPLERS if not unfit(scheduler, name)]


def build_sampler(scheduler: Any, name: str) -> Any:
    """A scheduler of diffusers to draw with, by name, like `scheduler` in all but how it samples; for "auto" `scheduler` itself.

    Raises ConfigError, with the names that fit, for a name that does not exist or cannot draw for this network.
    """
    if name == AUTO:
        return scheduler
    sampler = SAMPLERS[check_choice(name, SAMPLERS, "sampler")]
    if reason := unfit(scheduler, name):
        raise ConfigError(
            f"sampler {name!r} cannot draw for this base, {reason}: choose from {', '.join([AUTO, *samplers_for(scheduler)])}"
        )
    return of_class(class_of(sampler), scheduler, **sampler.changes)


def unfit(scheduler: Any, name: str) -> str:
    """Why a sampler cannot draw for the network of `scheduler`, in half a sentence; "" where it can."""
    kind, config = class_of(SAMPLERS[name]), scheduler.config
    taken = inspect.signature(kind.__init__).parameters
    if config.prediction_type == "sample" and kind.__name__ in NO_SAMPLES:
        return "which predicts the picture itself (sample)"
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in taken:
        return "which was trained with zero terminal SNR"
    if config.get("thresholding") and "thresholding" not in taken:
        return "whose predictions have to be clipped (it works on pixels)"
    return ""


def class_of(sampler: Sampler) -> Any:
    import diffusers

    return getattr(diffusers, sampler.scheduler)


def name_of(scheduler: Any) -> str:
    """The name in SAMPLERS that fits a scheduler of diffusers; its class without "Scheduler" where none does."""
    kind, config = type(scheduler).__name__, scheduler.config

    def fits(sampler: Sampler) -> bool:
        telling = {
            key: value for key, value in sampler.changes.items() if key not in ("skip_prk_steps", "solver_order")
        }
        return sampler.scheduler == kind and all(config.get(key, value) == value for key, value in telling.items())

    return next((name for name, sampler in SAMPLERS.items() if fits(sampler)), kind.removesuffix("Scheduler"))


def known_sampler(name: str) -> str | None:
    """The name in SAMPLERS that somebody means by `name`, whatever its letters' case; None for one that is not there."""
    named = {other.lower(): own for own, sampler in SAMPLERS.items() for other in (own, *sampler.also)}
    return AUTO if name.lower() == AUTO else named.get(" ".join(name.split()).lower())
