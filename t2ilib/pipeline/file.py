"""Pipeline files: which steps, where the data set comes from, a run, variants of it, and what is drawn in the end. Imports no torch.

`run` and each of `variants` speak RunConfig's own sections and fields, a variant's laid over the run's field by field. Every mistake in any of
them is found before anything starts.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from t2ilib.config import ConfigError, RunConfig, Section, did_you_mean
from t2ilib.config.section import Place
from t2ilib.runfile import build_run, load_yaml, merge, override_values

StepName = Literal["download", "process", "train", "measure", "draw"]
NAMES: tuple[str, ...] = get_args(StepName)
"""Steps, in the order in which they are done."""
OWN = {"output": "runs lie under the pipeline's output", "name": "a run is named after its variant"}
"""Fields of a run that the pipeline decides -> why."""
ONLY_RUN = "run"
"""What the run is called where there are no variants."""


def leave_own_out(values: dict[str, Any]) -> dict[str, Any]:
    for name in OWN.keys() & values.keys():
        raise ValueError(f"leave {name} out: {OWN[name]}")
    return values


PartialRun = Annotated[dict[str, Any], AfterValidator(leave_own_out)]
"""Some sections and fields of a RunConfig."""
FolderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_-]{0,99}$")]


class DownloadConfig(Section):
    """What `t2ilib data download` is told."""

    dataset: str = "coco"
    folder: Place
    server: str | None = None
    """Another than the official one: an address, or a folder in which the files lie as a server has them."""
    parts: tuple[str, ...] = ()
    keep_zips: bool = True
    extract: bool = True


class DrawConfig(Section):
    """What is drawn in the end, by every variant from the same noise."""

    prompts: tuple[str, ...] = ()
    """Empty: `evaluation.prompts`, or what the samples of the training were drawn of."""
    checkpoint: Annotated[int, Field(ge=1)] | None = None
    """The adapters as they were at this step; None: as they are in the end."""
    seed: Annotated[int, Field(ge=0)] = 0
    base: bool = True
    """Whether the untouched base draws them too."""


class PipelineConfig(Section):
    """A pipeline file. `output` receives marks, pipeline.log and pictures, and a folder for each variant's run."""

    output: Place
    steps: Annotated[tuple[StepName, ...], Field(min_length=1)] = NAMES
    download: DownloadConfig | None = None
    run: PartialRun
    variants: dict[FolderName, PartialRun] = {}
    draw: DrawConfig = DrawConfig()

    @field_validator("steps")
    @classmethod
    def in_their_order(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if list(value) != sorted(set(value), key=NAMES.index):
            raise ValueError(f"name each step once, in the order {', '.join(NAMES)}")
        return value

    @model_validator(mode="after")
    def holds_together(self) -> "PipelineConfig":
        if ("download" in self.steps) != (self.download is not None):
            raise ValueError(
                "steps names download, and there is no section that says what: add one, or name the other steps alone"
                if self.download is None
                else "the download section is there, and steps does not name download: add it, or leave the section out"
            )
        return self

    def settings(self, name: str) -> dict[str, Any]:
        """What the file says of a run; pictures that are downloaded are its data, unless it says otherwise."""
        data = {} if self.download is None else {"source": self.download.dataset, "path": str(self.download.folder)}
        own = {"name": name, "output": str(self.output / name)}
        return own | merge({"data": data}, self.run, self.variants.get(name, {}))


def load_pipeline(
    path: Path, overrides: tuple[str, ...] | list[str] = ()
) -> tuple[PipelineConfig, dict[str, RunConfig]]:
    """Reads a pipeline file, with overrides such as `run.training.steps=100` put in; gives it, and its runs by name. Raises ConfigError that
    lists every mistake."""
    values = override_values(load_yaml(path), overrides)
    try:
        pipeline = PipelineConfig.model_validate(values)
    except ValidationError as error:
        lines = list(mistakes(error))
        raise ConfigError(f"{len(lines)} mistake{'s' * (len(lines) > 1)} in {path}:\n  " + "\n  ".join(lines)) from None
    runs = {name: build_run(pipeline.settings(name), f"{path}, {name}") for name in pipeline.variants or (ONLY_RUN,)}
    for name, run in runs.items():
        if run.trains in ("vae", "clip"):
            raise ConfigError(f"{path}, {name}: it trains {run.trains}, which draws nothing: use `t2ilib train`")
        if run.data.streaming and "process" in pipeline.steps:
            raise ConfigError(
                f"{path}, {name}: data.streaming reads pictures as training goes, so there is nothing to process before: leave the step out"
            )
    return pipeline, runs


def mistakes(error: ValidationError) -> Iterator[str]:
    for found in error.errors():
        place, message = found["loc"], found["msg"].removeprefix("Value error, ")
        if found["type"] == "extra_forbidden":
            section = {"download": DownloadConfig, "draw": DrawConfig}.get(str(place[0]), PipelineConfig)
            message = f"no such field.{did_you_mean(place[-1], section.model_fields)}"
            if place[-1] in RunConfig.model_fields and len(place) == 1:
                message = f"no such field of a pipeline: it is one of its run, run.{place[-1]}"
        yield f"{'.'.join(map(str, place)) or 'the file'}: {message}"
