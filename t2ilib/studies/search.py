"""What a study searches: fields of a run config, each with its range or choices, and a budget that is the same for every variant.

    search:
      optimizer.learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}
      adapter.dropout: {choices: [0.0, 0.1, 0.3]}
    tuning: {trials: 8, hours: 6}

The study's `search` holds for every variant that trains; a variant with a `search` of its own has that instead, and `search: {}` is none.
Optimizers that tune themselves have no learning rate to search and are a class of their own, as AlgoPerf's rules have it (arXiv
2306.07179, section 3). How a run is judged is not searched: that would tune the ruler.
"""

import math
import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from t2ilib.config import RunConfig, did_you_mean
from t2ilib.runfile import describe_mistakes, known_fields, merge

SELF_TUNING = ("prodigy",)
"""Optimizers that find their step size themselves."""
RATES = (
    "optimizer.learning_rate",
    "optimizer.text_encoder_learning_rate",
    "optimizer.token_learning_rate",
    "optimizer.lora_plus_ratio",
)
"""What they leave nothing to search of, where the study searches it."""
NOT_SEARCHED = ("evaluation.", "tracking.", "data.part", "shapes.checked_prompts", "shapes.seed")
"""Beginnings of fields that say how a run is judged or logged."""
GRID = 5
"""Values that every variant begins with."""
EXTENSION = 3.0
"""How far a range is extended at the end where the best value lies."""
Class = Literal["tuned", "tunes itself", "as it is"]


class Searched(BaseModel):
    """One field: from `low` to `high` (`log`: by ratios; `step`: low, low + step, ...), or one of `choices`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    low: float | None = None
    high: float | None = None
    log: bool = False
    step: Annotated[float, Field(gt=0)] | None = None
    choices: list[Any] = []

    @model_validator(mode="after")
    def range_or_choices(self) -> "Searched":
        ends = (self.low, self.high)
        if self.choices:
            if ends != (None, None) or self.log or self.step:
                raise ValueError("choices stand alone: leave low, high, log and step out, or the choices")
            if len(self.choices) < 2 or any(value in self.choices[:i] for i, value in enumerate(self.choices)):
                raise ValueError(f"choices must be two different ones at least, not {self.choices}")
            return self
        if None in ends:
            raise ValueError("give low and high, or choices")
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
        if self.log and (self.low <= 0 or self.step):
            raise ValueError(
                f"log goes by ratios: it has no step, and low must be above 0 (it is {self.low:g}, step {self.step})"
            )
        return self

    @property
    def ends(self) -> list[Any]:
        return self.choices or [self.low, self.high]


Search = dict[str, Searched]


def self_tuning(settings: Mapping[str, Any]) -> bool:
    return (settings.get("optimizer") or {}).get("name") in SELF_TUNING


def search_of(own: Search | None, common: Search, settings: Mapping[str, Any]) -> Search:
    """What is searched of a variant of these settings: its `own`, or the study's."""
    if (settings.get("training") or {}).get("trains") == "nothing":
        return {}
    if own is not None:
        return own
    return {name: field for name, field in common.items() if not (self_tuning(settings) and name in RATES)}


def class_of(search: Search, settings: Mapping[str, Any]) -> Class:
    return "tunes itself" if self_tuning(settings) else "tuned" if search else "as it is"


def partial(values: Mapping[str, Any]) -> dict[str, Any]:
    """`section.field` -> value as sections."""
    found: dict[str, Any] = {}
    for address, value in values.items():
        section, _, field = address.partition(".")
        found.setdefault(section, {})[field] = value
    return found


def wrong_names(search: Search, where: str) -> Iterator[str]:
    """Fields that RunConfig does not have, or that are not to be searched."""
    for address in search:
        section, _, field = address.partition(".")
        known = known_fields([section])
        if section not in RunConfig.model_fields or not known:
            sections = [name for name in RunConfig.model_fields if known_fields([name])]
            yield f"{where}.{address}: write section.field; sections are {', '.join(sections)}.{did_you_mean(section, sections)}"
        elif field not in known:
            homes = [name for name in RunConfig.model_fields if field in known_fields([name])]
            hint = f" It is a field of {' and of '.join(homes)}." if homes else did_you_mean(field, known)
            yield f"{where}.{address}: no such field; {section} has {', '.join(sorted(known))}.{hint}"
        elif address.startswith(NOT_SEARCHED):
            yield f"{where}.{address}: it says how a run is judged, not what it is: leave it out"


def refused_ends(search: Search, where: str, settings: Mapping[str, Any]) -> Iterator[str]:
    """Ends of ranges, and choices, that RunConfig refuses over these settings."""
    for address, field in search.items():
        if field.low is not None and kind_of(address) is None:
            yield f"{where}.{address}: it is no number: give choices"
            continue
        for value in field.ends:
            if told := refusal(merge(settings, partial({address: as_kind(address, value)}))):
                yield f"{where}.{address}: {value!r} is refused: {told}"


def refusal(settings: Mapping[str, Any]) -> str:
    """Why RunConfig refuses these settings; "" where it takes them."""
    try:
        RunConfig.model_validate(settings)
    except ValidationError as error:
        return "; ".join(message for _, message in describe_mistakes(error))
    return ""


def kind_of(address: str) -> type | None:
    """int or float, where the field is a number; float where it may be either."""
    section, _, name = address.partition(".")
    kinds = kinds_in(RunConfig.model_fields[section].annotation)
    model = next(kind for kind in kinds if issubclass(kind, BaseModel))
    found = kinds_in(model.model_fields[name].annotation)
    return float if float in found else int if int in found else None


def kinds_in(annotation: Any) -> list[type]:
    """The classes in an annotation, without what else is said of them."""
    if get_origin(annotation) in (Annotated, Union, types.UnionType):
        parts = get_args(annotation)[:1] if get_origin(annotation) is Annotated else get_args(annotation)
        return [kind for part in parts for kind in kinds_in(part)]
    return [annotation] if isinstance(annotation, type) else []


def as_kind(address: str, value: Any) -> Any:
    """A number of a range as the field has it."""
    whole = isinstance(value, float) and kind_of(address) is int and value.is_integer()
    return int(value) if whole else value


def in_search(field: Searched, value: Any) -> bool:
    if field.choices:
        return value in field.choices
    return isinstance(value, int | float) and field.low <= value <= field.high


def middle(address: str, field: Searched) -> Any:
    """Where a field stands while another one's grid is laid, where the study says nothing that is searched."""
    if field.choices:
        return field.choices[0]
    center = math.sqrt(field.low * field.high) if field.log else (field.low + field.high) / 2
    if field.step:
        center = field.low + field.step * round((center - field.low) / field.step)
    return round(center) if kind_of(address) is int else center


def grid(search: Search, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The trials that every search begins with: GRID values of its first field that goes by ratios (or else of its first range, or all its
    first choices), evenly from end to end, the others standing where the study has them. Of nothing to search it is one trial."""
    if not search:
        return [{}]
    flat = RunConfig.model_validate(dict(settings)).flat()
    still = {
        name: flat[name] if in_search(field, flat[name]) else middle(name, field) for name, field in search.items()
    }
    order = sorted(search, key=lambda name: (not search[name].log, bool(search[name].choices)))
    return [still | {order[0]: value} for value in spread(order[0], search[order[0]])]


def spread(address: str, field: Searched) -> list[Any]:
    if field.choices:
        return list(field.choices)
    if field.step:
        count = int((field.high - field.low) / field.step + 1e-9)
        values = [field.low + field.step * round(i * count / (GRID - 1)) for i in range(GRID)]
    elif field.log:
        values = [significant(field.low * (field.high / field.low) ** (i / (GRID - 1))) for i in range(1, GRID - 1)]
        values = [field.low, *values, field.high]
    else:
        values = [field.low + (field.high - field.low) * i / (GRID - 1) for i in range(GRID)]
    if kind_of(address) is int:
        values = [round(value) for value in values]
    return list(dict.fromkeys(values))


def significant(value: float, digits: int = 3) -> float:
    """A number that people would write."""
    return float(f"{value:.{digits}g}")
