"""A run's checkpoints side by side: the same prompts and noise drawn by the base alone and as the adapter was at every step.

Which step to keep is for the eye to say; the one that is kept becomes an adapter file in the format of the program that is to use it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from t2ilib.app.asking import prompts_of
from t2ilib.config import ConfigError
from t2ilib.drawing.desk import Desk
from t2ilib.drawing.finding import Found
from t2ilib.drawing.settings import DrawSettings

DIFFUSERS, PEFT = ("diffusers", {}), ("peft", {})
FORMATS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "lora": {
        "t2ilib, diffusers": DIFFUSERS,
        "A1111, ComfyUI, Forge (kohya)": ("kohya", {}),
        "peft": PEFT,
    },
    "dora": {
        "t2ilib, diffusers": DIFFUSERS,
        "ComfyUI, Forge (kohya)": ("kohya", {"program": "comfyui"}),
        "LyCORIS (kohya)": ("kohya", {"program": "lycoris"}),
        "A1111 and all others (kohya, exact and large)": ("kohya", {"form": "diff"}),
        "peft": PEFT,
    },
}
"""Kind of adapter -> what the page calls a format -> the format and its options (`adapters.export`)."""


@dataclass(frozen=True)
class Moment:
    """One place of the slider. `step`: None for the end of the run; `base`: whether it is the base alone instead."""

    label: str
    step: int | None = None
    base: bool = False


@dataclass
class StepPictures:
    """What was drawn of a run. `pictures`: number of a moment -> what the page shows of it, (path, caption), as far as it was drawn."""

    run: Found
    moments: tuple[Moment, ...]
    each: int
    pictures: dict[int, list[tuple[str, str]]] = field(default_factory=dict)

    def add(self, number: int, shown: tuple[str, str]) -> int:
        """Takes in picture `number` of all that are drawn; returns which moment it is of."""
        moment = number // self.each
        self.pictures.setdefault(moment, []).append(shown)
        return moment

    def title(self, number: int) -> str:
        """What the page says above a moment's pictures."""
        return f"{self.moments[number].label} ({number + 1} of {len(self.moments)})"


def moments_of(run: Found) -> tuple[Moment, ...]:
    """The base alone, all steps that can be had, and the end, where it is none of them."""
    steps = [Moment(f"Step {step}", step) for step in run.steps]
    ends = run.finished and (not run.steps or run.steps[-1] < run.run.training.steps)
    return (Moment("The base alone", base=True), *steps, *([Moment("The end of the run")] if ends else []))


def jobs_of(run: Found, moments: Sequence[Moment], settings: DrawSettings, prompts: str) -> list[DrawSettings]:
    """What is drawn: at every moment the same prompts and noise, over the run's own base, without other adapters."""
    plain = settings.changed(model=run.run.model.model_dump(), adapters=())
    jobs = []
    for moment in moments:
        own = [] if moment.base else [{"path": str(run.path), "step": moment.step}]
        jobs += prompts_of(prompts, plain.changed(adapters=own))
    return jobs


def find_run(runs: Sequence[Found], path: str | None) -> Found:
    """The run in a folder. Raises ConfigError where it is not there, or nothing was chosen."""
    if not path:
        raise ConfigError("choose a run first: those are listed that kept checkpoints")
    found = next((run for run in runs if str(run.path) == path), None)
    if found is None or not found.steps:
        raise ConfigError(f"{path} is no run with checkpoints any more: look for adapters again, and choose another")
    return found


def formats_for(run: Found) -> list[str]:
    """What the page calls the formats that a run's adapter can be had in."""
    return list(FORMATS[run.kind])


def export_moment(desk: Desk, drawn: StepPictures | None, number: int, form: str, folder: Path) -> list[Path]:
    """Writes the adapter of a moment into a folder; returns its files. Raises ConfigError where there is none to keep."""
    require_kept(drawn, number)
    formats = FORMATS[drawn.run.kind]
    if form not in formats:
        raise ConfigError(f"format {form!r}: choose {', '.join(formats)}")
    format, options = formats[form]
    target = folder if format == "peft" else folder / f"{export_name(drawn, number)}.safetensors"
    desk.export(drawn.run.path, drawn.moments[number].step, target, format, **options)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def require_kept(drawn: StepPictures | None, number: int) -> None:
    """Raises ConfigError where no adapter is shown."""
    if drawn is None:
        raise ConfigError("draw a run's checkpoints first, and choose one on the slider")
    if drawn.moments[number].base:
        raise ConfigError("this is the base alone, without an adapter to keep: move the slider to a step")


def export_name(drawn: StepPictures, number: int) -> str:
    """What an exported adapter is called: the run, and the step."""
    step = drawn.moments[number].step
    return drawn.run.name.replace("/", "-") + ("" if step is None else f"-step-{step:06d}")
