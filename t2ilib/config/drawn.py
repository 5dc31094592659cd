"""How pictures are drawn by what was trained to be drawn in a way of its own, whatever its base's is: what a run is measured by, and what an
adapter's file says (`models.noise`, `adapters.load`)."""

from typing import Annotated, Literal

from pydantic import Field

from t2ilib.config.section import Positive, Section


class DrawnBy(Section):
    """`scheduler`: a class of diffusers. `original_inference_steps`: of LCM, how many timesteps there are to choose from, those that it was
    taught on."""

    scheduler: Literal["LCMScheduler"]
    num_inference_steps: Positive
    guidance_scale: Annotated[float, Field(ge=1)]
    original_inference_steps: Positive = 50
