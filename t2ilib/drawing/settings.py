"""DrawSettings: everything that a picture needs to be drawn again, as frozen, validated data. Importing it imports no torch.

The noise of a picture is addressed by `seed` and its number, as in `evaluation.sampling.draw`: picture `first + i` of a seed is the same
whatever is drawn beside it. Leaves out what only a loaded base can tell: whether it has the layers of an adapter, which samplers fit, which
sides its VAE can decode.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator, model_validator

from t2ilib.config import ConfigError, DrawnBy, FinishedAdapter, ModelConfig, RunConfig, Section, did_you_mean
from t2ilib.config.section import Location
from t2ilib.drawing.samplers import AUTO, SAMPLERS, known_sampler
from t2ilib.runfile import describe_errors

MOST_STEPS, MOST_SIDE, MOST_PICTURES, MOST_GUIDANCE = 1000, 4096, 1000, 100
"""What no one means: beyond these settings are refused, wherever they come from."""
USUAL_STEPS, USUAL_GUIDANCE = 20, 5.0
"""Where neither settings nor adapters say anything."""
Side = Annotated[int, Field(ge=8, le=MOST_SIDE)]


class AdapterChoice(FinishedAdapter):
    """One adapter, how strongly it acts, and as it was at which step. Its path may also be `models:/<name>@<alias>` or
    `models:/<name>/<version>` in the MLflow store in use."""

    step: Annotated[int, Field(ge=0)] | None = None
    """Of a run's folder: as the adapter was at this step. None: as it is at the end."""
    digest: str | None = None
    """The first 12 hex digits of its file's SHA-256, which saved pictures have; drawing warns where the file is another now."""


class DrawSettings(Section):
    """What is drawn, and how. Sampling is that of diffusers' pipelines."""

    prompt: str = ""
    negative_prompt: str = ""
    """What guidance leads away from."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    first: Annotated[int, Field(ge=0)] = 0
    """The number, under this seed, of the first picture's noise."""
    num_pictures: Annotated[int, Field(ge=1, le=MOST_PICTURES)] = 1
    num_inference_steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] | None = None
    """None: as an adapter's file says that it is drawn, or else 20."""
    guidance_scale: Annotated[float, Field(ge=1, le=MOST_GUIDANCE)] | None = None
    """Of classifier-free guidance (arXiv 2207.12598), as diffusers counts: at 1 there is none. None: as an adapter's file says, or else 5."""
    width: Side | None = None
    """In pixels; None: the side that the base was made for. Likewise the height."""
    height: Side | None = None
    sampler: str = AUTO
    """A name of `drawing.samplers.SAMPLERS`, or "auto": what an adapter's file says, or else the base's own."""
    vae_tiling: bool = False
    """Decoded in tiles: see `evaluation.vae_tiling`."""
    model: ModelConfig = ModelConfig()
    adapters: tuple[AdapterChoice, ...] = ()
    embeddings: tuple[Location, ...] = ()
    """Files of words' embeddings; adapters bring their own along."""

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def whole_characters(cls, value: str) -> str:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"character {error.start} is half a character (a lone surrogate): leave it out") from None
        return value

    @field_validator("sampler")
    @classmethod
    def a_sampler(cls, value: str) -> str:
        known = known_sampler(value)
        if known is None:
            names = [AUTO, *SAMPLERS]
            raise ValueError(f"{value!r} does not exist; choose {', '.join(names)}.{did_you_mean(value, names)}")
        return known

    @model_validator(mode="after")
    def something_to_lead_away_from(self) -> "DrawSettings":
        if self.negative_prompt and self.guidance_scale == 1:
            raise ValueError(
                "negative_prompt is what guidance leads away from, and at guidance_scale 1 there is none: raise it, or leave it out"
            )
        return self

    def changed(self, **values: Any) -> "DrawSettings":
        """The same with other values of some fields, checked; raises ConfigError as `build_settings`."""
        return build_settings(self.model_dump() | values)

    def settled(self, drawn: DrawnBy | None) -> "DrawSettings":
        """The same with steps and guidance as numbers; `drawn`: how what is loaded is drawn, where it says so. Raises ConfigError as
        `build_settings`."""
        usual = {"num_inference_steps": USUAL_STEPS, "guidance_scale": USUAL_GUIDANCE}
        usual |= drawn.model_dump(include=set(usual)) if drawn else {}
        lacking = {name: value for name, value in usual.items() if getattr(self, name) is None}
        return self.changed(**lacking) if lacking else self

    def pictures(self) -> list["DrawSettings"]:
        """The settings of each of its pictures alone."""
        return [self.model_copy(update={"num_pictures": 1, "first": self.first + i}) for i in range(self.num_pictures)]

    def without_adapters(self) -> "DrawSettings":
        return self.model_copy(update={"adapters": ()})


def build_settings(values: Mapping[str, Any], source: str = "the settings") -> DrawSettings:
    """DrawSettings from nested plain values; raises ConfigError listing every mistake. `source`: what errors call them."""
    try:
        return DrawSettings.model_validate(values)
    except ValidationError as error:
        raise describe_errors(error, source, DrawSettings, "the picture") from None


def settings_of_run(run: RunConfig) -> DrawSettings:
    """How a run draws the pictures that it is measured by, over its base, without a prompt and without its adapter."""
    values = {
        "negative_prompt": run.evaluation.negative_prompt,
        "num_inference_steps": run.evaluation.num_inference_steps,
        "guidance_scale": run.evaluation.guidance_scale,
        "vae_tiling": run.evaluation.vae_tiling,
        "width": run.data.resolution,
        "height": run.data.resolution,
        "model": run.model.model_dump(),
    }
    return build_settings(values, "the run's evaluation")


def require_size(width: int, height: int, multiple: int, base: str) -> None:
    """Raises ConfigError for sides that are no multiples of what the base works in."""
    for name, side in (("width", width), ("height", height)):
        if side % multiple:
            lower = side // multiple * multiple
            near = " or ".join(str(value) for value in (lower, lower + multiple) if value)
            raise ConfigError(f"{name} {side} is no multiple of {multiple}, which {base} draws in: set it to {near}")
