"""What a step is told: the file, the options of the command, the run that it is about; and how sizes and times are written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2ilib.config import RunConfig
from t2ilib.pipeline.file import PipelineConfig


@dataclass(frozen=True)
class Options:
    """Of the command line. `dry`: nothing is done, fetched or asked; what is planned is told."""

    skip_download: bool = False
    force_extract: bool = False
    checkpoint: int | None = None
    prompts: tuple[str, ...] = ()
    dry: bool = False


@dataclass(frozen=True)
class Job:
    """One step for one run, or for all. `name`: of the run, None for a step that is done once. `given`: results of the steps before, by
    step, as far as they are known. `seconds_left`: of the run's time budget, None without one."""

    pipeline: PipelineConfig
    options: Options
    runs: dict[str, RunConfig]
    name: str | None
    given: dict[str, Any]
    seconds_left: float | None = None

    @property
    def run(self) -> RunConfig:
        """The run that the step is about; of a step that is done once, the first."""
        return self.runs[self.name] if self.name is not None else next(iter(self.runs.values()))

    @property
    def results(self) -> Path:
        """Where the default MLflow store lies: beside the pipeline's output."""
        return self.pipeline.output.absolute().parent


def size_told(size: float) -> str:
    for unit, bytes_of in (("GB", 1e9), ("MB", 1e6)):
        if size >= bytes_of:
            return f"{size / bytes_of:,.1f} {unit}"
    return f"{size / 1e3:,.0f} kB"


def time_told(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
