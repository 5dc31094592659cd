"""What pictures are drawn by beside a base: the sampler of what was trained to be drawn in a way of its own, which is what a run is measured by and
what an adapter's file says (`models.noise`, `adapters.load`); and adapters that are there already."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from t2ilib.config.section import Location, Positive, Section


class DrawnBy(Section):
    """`scheduler`: a class of diffusers. `original_inference_steps`: of LCM, how many timesteps there are to choose from, those that it was
    taught on."""

    scheduler: Literal["LCMScheduler"]
    num_inference_steps: Positive
    guidance_scale: Annotated[float, Field(ge=1)]
    original_inference_steps: Positive = 50


MOST_STRENGTH = 100
"""Beyond what anyone means."""


class FinishedAdapter(Section):
    """One adapter that is there already, and how strongly it acts."""

    path: Location
    """A run's folder, an adapter file or its folder."""
    strength: Annotated[float, Field(ge=-MOST_STRENGTH, le=MOST_STRENGTH)] = 1.0
    """1 as trained, 0 switched off."""
    partial: bool = False
    """Whether layers that the base does not have are left out, as those of a teacher's adapter that a student has not."""

    @field_validator("path")
    @classmethod
    def not_empty(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("it is empty: name a run's folder, or an adapter file")
        return value
