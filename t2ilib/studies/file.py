"""Study files: a question, a base run, presets that say how much of it is run, and variants with a small delta and a reason each.

All three speak RunConfig's own sections and fields, laid over one another field by field (`config.merge`): the study's `run`,
the preset's, the variant's. Every mistake in any of them is found by RunConfig before anything starts, and told with the place
that it stands in.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from t2ilib.config import ConfigError, RunConfig, check_choice
from t2ilib.runfile import describe_mistakes, load_yaml, merge
from t2ilib.studies.flat import refuse_flat_form

OWN = {
    "name": "a run is named after its variant and seed",
    "seed": "the seeds are the preset's",
    "output": "runs lie under results/<study>-<preset>",
    "tracking": "a study is its own experiment",
}
"""Fields of a run that the study decides itself -> why."""


def leave_own_out(values: dict[str, Any]) -> dict[str, Any]:
    """`values`, unless they say what the study decides; then ValueError."""
    for name in OWN.keys() & values.keys():
        raise ValueError(f"leave {name} out: {OWN[name]}")
    return values


PartialRun = Annotated[dict[str, Any], AfterValidator(leave_own_out)]
"""Some sections and fields of a RunConfig."""


def name_of_a_folder(name: str) -> str:
    """`name`, if a folder can be called so on every system; otherwise ValueError."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", name) or name.endswith("."):
        raise ValueError(f"{name!r} is the name of a folder too: use letters, digits, _, - and . alone")
    return name


FolderName = Annotated[str, AfterValidator(name_of_a_folder)]


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Claim(Part):
    """What a hypothesis comes down to, so that it can be judged: this `metric` of the variant is higher, lower, better or
    worse (`is`) than that of another, by the test of the report's tables. `than`: if not the one that the variant is
    compared with."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    metric: str
    direction: Literal["higher", "lower", "better", "worse"] = Field(alias="is")
    than: str | None = None


class Variant(Part):
    """A named delta to the study's run, with why it is there. The report quotes its `hypothesis` and judges its `claims`.
    `against`: the variant it is compared with, if not the reference; `notebook`: if not the study's."""

    title: str
    overview: str = ""
    hypothesis: str = ""
    how_it_helps: str = ""
    origin: str = ""
    claims: list[Claim] = []
    against: str | None = None
    notebook: str | None = None
    run: PartialRun = {}


class Preset(Part):
    """How much of the study is run: its seeds, which variants (all, where none are named), and what goes over the study's run but
    under the variants'."""

    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    variants: list[str] = []
    run: PartialRun = {}


class Study(Part):
    """A study file. `reference`: the variant others are compared with; `base`: the untouched base model, if among them;
    `margins`: metric -> the difference from which on it would matter, in its own unit (0.05 of a share is 5 percentage points):
    smaller ones count as equivalent, and it is what seeds are counted for."""

    name: str = Field(pattern=r"^[a-z0-9_-]+$")
    question: str
    notebook: str = "train.ipynb"
    reference: str
    base: str | None = None
    margins: dict[str, Annotated[float, Field(gt=0)]] = {}
    run: PartialRun = {}
    presets: dict[FolderName, Preset] = Field(min_length=1)
    variants: dict[FolderName, Variant] = Field(min_length=1)

    def settings(self, preset: str, variant: str) -> dict[str, Any]:
        """The sections and fields that a variant's runs say, all parts laid over one another."""
        return merge(self.run, self.presets[preset].run, self.variants[variant].run)

    def of_preset(self, preset: str) -> list[str]:
        """The variants that a preset runs."""
        return self.presets[preset].variants or list(self.variants)

    def notebooks(self) -> dict[str, str]:
        """Variant -> the name of its notebook."""
        return {name: variant.notebook or self.notebook for name, variant in self.variants.items()}


def load_study(path: Path) -> Study:
    """Reads and checks a study file, every variant of it under every preset; raises ConfigError that lists every mistake."""
    values = load_yaml(path)
    refuse_flat_form(values, path)
    try:
        study = Study.model_validate(values)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()]
        raise ConfigError(f"{count(lines)} in {path}:\n  " + "\n  ".join(lines)) from None
    others = [claim.than for variant in study.variants.values() for claim in variant.claims]
    for name in filter(None, (study.reference, study.base, *(v.against for v in study.variants.values()), *others)):
        check_choice(name, study.variants, f"{path}: variant")
    for preset, chosen in study.presets.items():
        for name in chosen.variants:
            check_choice(name, study.variants, f"{path}: presets.{preset}.variants: variant")
        asked = study.of_preset(preset)
        needed = [study.reference, *(study.variants[name].against for name in asked)]
        if lacking := next((name for name in needed if name and name not in asked), None):
            raise ConfigError(f"{path}: presets.{preset}.variants leaves out {lacking}, which others are compared with")
    lines = list(dict.fromkeys([*mistakes(study), *claims_of_itself(study)]))
    if lines:
        raise ConfigError(f"{count(lines)} in {path}:\n  " + "\n  ".join(lines))
    return study


def count(lines: list[str]) -> str:
    return f"{len(lines)} mistake{'s' * (len(lines) > 1)}"


def mistakes(study: Study) -> Iterator[str]:
    """What RunConfig refuses of any variant under any preset, each with the part of the file that says it."""
    for preset, chosen in study.presets.items():
        for name, variant in study.variants.items():
            parts = {f"variants.{name}.run": variant.run, f"presets.{preset}.run": chosen.run, "run": study.run}
            try:
                RunConfig.model_validate(study.settings(preset, name))
            except ValidationError as error:
                for place, message in describe_mistakes(error):
                    said = [part for part, values in parts.items() if says(values, place)]
                    where = ".".join((said[0], *map(str, place))) if said else f"variants.{name} (preset {preset})"
                    yield f"{where}: {message}"


def claims_of_itself(study: Study) -> Iterator[str]:
    """Claims that hold a variant against itself; for the reference that is what leaving `than` out means."""
    for name, variant in study.variants.items():
        for number, claim in enumerate(variant.claims):
            if name == (claim.than or variant.against or study.reference):
                yield f"variants.{name}.claims.{number}.than: say which other variant {name} is held against"


def says(values: Any, place: tuple[int | str, ...]) -> bool:
    """Whether a partial config has something at this address; the whole of it, the empty address, is no part's own."""
    if not place:
        return False
    for key in place:
        if (isinstance(values, Mapping) and key in values) or (
            isinstance(values, list) and isinstance(key, int) and key < len(values)
        ):
            values = values[key]
        else:
            return False
    return True
