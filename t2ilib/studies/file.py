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
from t2ilib.studies.scoring import parse_formula
from t2ilib.studies.search import GRID, Search, class_of, refusal, refused_ends, search_of, wrong_names
from t2ilib.studies.tuned import read_tuned

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
    `against`: the variant it is compared with, if not the reference; `notebook`: if not the study's; `search`: what is searched of it, if not
    what the study says."""

    title: str
    overview: str = ""
    hypothesis: str = ""
    how_it_helps: str = ""
    origin: str = ""
    claims: list[Claim] = []
    against: str | None = None
    notebook: str | None = None
    search: Search | None = None
    run: PartialRun = {}


class Preset(Part):
    """How much of the study is run: its seeds, which variants (all, where none are named), and what goes over the study's run but
    under the variants'. `tuned`: variant -> what goes over that too: its best values."""

    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    variants: list[str] = []
    run: PartialRun = {}
    tuned: dict[FolderName, PartialRun] | None = None


class Tuning(Part):
    """The budget of every variant, and what its runs have instead of the preset's. `trials` and `hours` (of notebooks' time; the first GRID
    trials are made in any case) end a search; `extensions`: how often its range may be extended, beyond its trials too. `seeds`: each
    trial is run with every one of them. `prompts`: what is drawn on pictures of one's own; without them captions of the pictures that
    are held out while tuning."""

    trials: Annotated[int, Field(ge=GRID)] = 8
    hours: Annotated[float, Field(gt=0)] | None = None
    seeds: list[Annotated[int, Field(ge=0)]] = Field([1000], min_length=1)
    extensions: Annotated[int, Field(ge=0)] = 4
    prompts: list[str] = []
    run: PartialRun = {}


class Study(Part):
    """A study file. `reference`: the variant others are compared with; `base`: the untouched base model, if among them;
    `margins`: metric -> the difference from which on it would matter, in its own unit (0.05 of a share is 5 percentage points):
    smaller ones count as equivalent, and it is what seeds are counted for; `score`: what a run is worth, a formula over metrics
    (`scoring`); `search`, `tuning`: what is searched before the seeds of a preset are spent."""

    name: str = Field(pattern=r"^[a-z0-9_-]+$")
    question: str
    notebook: str = "train.ipynb"
    reference: str
    base: str | None = None
    margins: dict[str, Annotated[float, Field(gt=0)]] = {}
    score: str | None = None
    search: Search = {}
    tuning: Tuning = Tuning()
    run: PartialRun = {}
    presets: dict[FolderName, Preset] = Field(min_length=1)
    variants: dict[FolderName, Variant] = Field(min_length=1)

    def settings(self, preset: str, variant: str) -> dict[str, Any]:
        """The sections and fields that a variant's runs say, all parts laid over one another."""
        return merge(self.run, self.presets[preset].run, self.delta(preset, variant))

    def delta(self, preset: str, variant: str) -> dict[str, Any]:
        """What a variant changes: its own run, and the values that it was tuned to where the preset has them."""
        return merge(self.variants[variant].run, (self.presets[preset].tuned or {}).get(variant, {}))

    def search_of(self, preset: str, variant: str) -> Search:
        """What is searched of a variant."""
        return search_of(self.variants[variant].search, self.search, self.settings(preset, variant))

    def class_of(self, preset: str, variant: str) -> str:
        """tuned, tunes itself, or as it is."""
        return class_of(self.search_of(preset, variant), self.settings(preset, variant))

    def trains(self, preset: str, variant: str) -> bool:
        """Whether its runs take steps; the untouched base does not."""
        return (self.settings(preset, variant).get("training") or {}).get("trains") != "nothing"

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
    presets = values.get("presets")
    if isinstance(presets, dict):
        values = {**values, "presets": {**presets, **read_tuned(path, presets)}}
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
    if study.score is not None:
        parse_formula(study.score)
    lines = list(dict.fromkeys([*mistakes(study), *claims_of_itself(study), *mistakes_of_search(study)]))
    if lines:
        raise ConfigError(f"{count(lines)} in {path}:\n  " + "\n  ".join(lines))
    return study


def count(lines: list[str]) -> str:
    return f"{len(lines)} mistake{'s' * (len(lines) > 1)}"


def mistakes(study: Study) -> Iterator[str]:
    """What RunConfig refuses of any variant under any preset, each with the part of the file that says it."""
    for preset, chosen in study.presets.items():
        for name, variant in study.variants.items():
            parts = {f"presets.{preset}.tuned.{name}": (chosen.tuned or {}).get(name, {})}
            parts |= {f"variants.{name}.run": variant.run, f"presets.{preset}.run": chosen.run, "run": study.run}
            try:
                RunConfig.model_validate(study.settings(preset, name))
            except ValidationError as error:
                for place, message in describe_mistakes(error):
                    said = [part for part, values in parts.items() if says(values, place)]
                    where = ".".join((said[0], *map(str, place))) if said else f"variants.{name} (preset {preset})"
                    yield f"{where}: {message}"


def mistakes_of_search(study: Study) -> Iterator[str]:
    """Names and values of what is searched that no run can have, and seeds that final runs have too."""
    places = {"search": study.search}
    places |= {f"variants.{name}.search": variant.search or {} for name, variant in study.variants.items()}
    wrong = [line for where, search in places.items() for line in wrong_names(search, where)]
    yield from wrong
    if not any(places.values()) or wrong:
        return
    for preset, chosen in study.presets.items():
        if chosen.tuned is not None:  # what it was made of is checked
            continue
        if shared := sorted({*study.tuning.seeds} & {*chosen.seeds}):
            told = ", ".join(map(str, shared))
            yield f"tuning.seeds: {told}: seeds of the preset {preset} too, whose runs would not be new ones: take others"
        for name, variant in study.variants.items():
            where = "search" if variant.search is None else f"variants.{name}.search"
            settings = merge(study.settings(preset, name), study.tuning.run)
            if refusal(study.settings(preset, name)):  # which is told as a mistake of another part
                continue
            if told := refusal(settings):
                yield f"tuning.run: it is refused over {name}, preset {preset}: {told}"
                continue
            for line in refused_ends(study.search_of(preset, name), where, settings):
                yield line if variant.search is not None else f"{line} (variant {name})"


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
