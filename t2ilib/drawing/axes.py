"""The axes of a grid: what changes along them, and the values that people write, as A1111's X/Y/Z plot takes them.

    seed: 1, 2, 3        steps: 10-30 (+10)        strength: 0-1 [5]        prompt: cat, dog, "a bird, flying"

Values stand between commas; one with a comma is in quotes. Numbers may be ranges, which end with their last number, not before it: `1-5`,
`1-10 (+2)` every second, `10-1 (-3)` down, `0-1 [5]` five from the first to the last. Importing this imports no torch.
"""

import csv
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

from t2ilib.config import ConfigError, check_choice
from t2ilib.drawing.infotext import shown_name
from t2ilib.drawing.settings import AdapterChoice, DrawSettings
from t2ilib.seeds import fresh_seed

MOST_VALUES = 200
"""Of one axis: more are a slip."""
NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)"
RANGE = re.compile(rf"({NUMBER})\s*-\s*({NUMBER})(?:\s*\(\s*({NUMBER})\s*\)|\s*\[\s*(\d+)\s*\])?")
WRITTEN = re.compile(r"\s*(?P<kind>[A-Za-z]+)(?:\s+(?P<which>\d+))?\s*[:=]\s*(?P<values>.*)", re.DOTALL)
NO_ADAPTER = "none"
LAST = "last"
RANDOM = ("random", "-1")


@dataclass(frozen=True)
class Kind:
    """What changes along an axis. `title`: as A1111 calls it, where it has it; `parse`: a value, of its text; `put(settings, value, which,
    values)`: the settings with it, where `which` counts adapters from 0; `label`: of a value. `numbers`: float, int or None: which ranges are
    understood."""

    title: str
    parse: Callable[[str], Any]
    put: Callable[[DrawSettings, Any, int, Sequence[Any]], DrawSettings]
    label: Callable[[Any], str] = str
    numbers: type | None = None


@dataclass(frozen=True)
class Axis:
    """`values` of a `kind`, a name in KINDS, of the adapter number `which` (from 0) where it is about adapters; `written`: as people wrote them."""

    kind: str
    values: tuple[Any, ...]
    written: str
    which: int = 0

    def labels(self) -> list[str]:
        """Of each value what stands at the sheet: "seed 3", and of prompts, adapters and samplers their own names."""
        kind = KINDS[self.kind]
        bare = self.kind in ("prompt", "adapter", "sampler")
        name = self.kind + (f" ({self.which + 1})" if self.which else "")
        return [kind.label(value) if bare else f"{name} {kind.label(value)}" for value in self.values]

    def applied(self, settings: DrawSettings) -> list[DrawSettings]:
        """The settings at each value. Raises ConfigError where they have no place for it, such as the strength of an adapter that is not
        there, and for values that they cannot have."""
        return [KINDS[self.kind].put(settings, value, self.which, self.values) for value in self.values]


def parse_axis(text: str) -> Axis:
    """An axis from `kind: values`; `strength 2: ...` is about the second adapter. Raises ConfigError for an unknown kind, no values, values that are no
    numbers where numbers are meant, and ranges that do not end."""
    found = WRITTEN.fullmatch(text)
    if found is None:
        raise ConfigError(
            f"axis {text!r}: write what changes and its values, such as 'strength: 0-1 [5]' or 'seed: 1, 2, 3'"
        )
    name = check_choice(found["kind"].lower(), KINDS, "axis")
    which = int(found["which"] or 1) - 1
    if which and name not in OF_ADAPTERS:
        raise ConfigError(
            f"axis {text!r}: {name} {which + 1} counts adapters, and {name} is not about them: leave the number out"
        )
    if which < 0:
        raise ConfigError(f"axis {text!r}: adapters are counted from 1")
    written = found["values"].strip()
    return Axis(name, tuple(parse_values(name, written)), written, which)


def parse_values(name: str, text: str) -> list[Any]:
    """The values of an axis of this kind that a text says; raises ConfigError as `parse_axis`."""
    kind, values = KINDS[name], []
    for part in split_values(text):
        spread = spread_range(part, kind.numbers, name) if kind.numbers else None
        for value in [part] if spread is None else spread:
            try:
                values.append(kind.parse(str(value)))
            except ValueError as error:
                raise ConfigError(f"axis {name}: {part!r} is no value of it ({error})") from None
        if len(values) > MOST_VALUES:
            raise ConfigError(f"axis {name}: {text[:60]!r} is more than {MOST_VALUES} values: take fewer")
    if not values:
        raise ConfigError(f"axis {name} has no values: write some, such as {EXAMPLES[name]!r}")
    return values


def split_values(text: str) -> list[str]:
    """What stands between commas and ends of lines, without blanks around; in quotes what has some itself."""
    try:
        rows = list(csv.reader(StringIO(text.strip()), skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise ConfigError(f"values {text[:60]!r}: {error}; a quote in a quoted value is written twice") from None
    return [value for row in rows for part in row if (value := part.strip())]


def spread_range(text: str, kind: type, name: str) -> list[int | float] | None:
    """The numbers of a range, its ends included; None for what is none."""
    found = RANGE.fullmatch(text)
    if found is None:
        return None
    low, high = float(found[1]), float(found[2])
    if found[4] is not None:
        count = int(found[4])
        if not 0 < count <= MOST_VALUES:
            raise ConfigError(f"axis {name}: {text!r} asks for {found[4]} values: ask for 1 to {MOST_VALUES}")
        between = [low + (high - low) * i / max(1, count - 1) for i in range(count)]
    else:
        step = float(found[3] or 1)
        if step == 0 or (high - low) / step < 0:
            raise ConfigError(
                f"axis {name}: {text!r} never gets from {found[1]} to {found[2]}: write (+2), or (-2) for a range that falls"
            )
        count = int((high - low) / step + 1e-9) + 1
        if count > MOST_VALUES:
            raise ConfigError(f"axis {name}: {text!r} is {count} values: take at most {MOST_VALUES}")
        between = [low + step * i for i in range(count)]
    return [int(value) if kind is int else round(value, 8) for value in between]


def put_field(field: str) -> Callable[[DrawSettings, Any, int, Sequence[Any]], DrawSettings]:
    return lambda settings, value, which, values: settings.changed(**{field: value})


def put_prompt(settings: DrawSettings, value: str, which: int, values: Sequence[str]) -> DrawSettings:
    """The first value is looked for in the prompts and replaced by each (A1111's "Prompt S/R"); where there is no prompt, each is one."""
    sought = values[0]
    if not settings.prompt:
        return settings.changed(prompt=value)
    if sought not in settings.prompt and sought not in settings.negative_prompt:
        raise ConfigError(
            f"axis prompt: {sought!r}, its first value, is neither in the prompt nor in the negative prompt, where the others would take its"
            " place: begin with words of the prompt, or leave the prompt empty to have whole prompts along the axis"
        )
    prompts = {"prompt": settings.prompt, "negative_prompt": settings.negative_prompt}
    return settings.changed(**{name: text.replace(sought, value) for name, text in prompts.items()})


def put_adapter(settings: DrawSettings, value: str, which: int, values: Sequence[str]) -> DrawSettings:
    """Another adapter in the place of one, as strong; "none" leaves that one out."""
    choices = list(settings.adapters)
    if which > len(choices):
        raise ConfigError(f"axis adapter {which + 1}: the settings have {len(choices)} adapter(s)")
    strength = choices[which].strength if which < len(choices) else 1.0
    own = [] if value.lower() == NO_ADAPTER else [{"path": value, "strength": strength}]
    return settings.changed(adapters=[*dumped(choices[:which]), *own, *dumped(choices[which + 1 :])])


def put_of_adapter(field: str) -> Callable[[DrawSettings, Any, int, Sequence[Any]], DrawSettings]:
    def put(settings: DrawSettings, value: Any, which: int, values: Sequence[Any]) -> DrawSettings:
        if which >= len(settings.adapters):
            raise ConfigError(
                f"axis {'strength' if field == 'strength' else 'checkpoint'}: there is no adapter number {which + 1}; the settings have"
                f" {len(settings.adapters)}"
            )
        choices = dumped(settings.adapters)
        choices[which] |= {field: value} | ({"digest": None} if field == "step" else {})
        return settings.changed(adapters=choices)

    return put


def dumped(choices: Sequence[AdapterChoice]) -> list[dict[str, Any]]:
    return [choice.model_dump() for choice in choices]


def parse_seed(text: str) -> int:
    return fresh_seed() if text.lower() in RANDOM else int(text)


def parse_step(text: str) -> int | None:
    return None if text.lower() == LAST else int(text)


KINDS: dict[str, Kind] = {
    "prompt": Kind("Prompt S/R", str, put_prompt),
    "adapter": Kind("Adapter", str, put_adapter, lambda value: shown_name(AdapterChoice(path=value))),
    "strength": Kind("Strength", float, put_of_adapter("strength"), lambda value: f"{value:g}", float),
    "checkpoint": Kind(
        "Checkpoint", parse_step, put_of_adapter("step"), lambda value: LAST if value is None else str(value), int
    ),
    "seed": Kind("Seed", parse_seed, put_field("seed"), str, int),
    "guidance": Kind("CFG Scale", float, put_field("guidance_scale"), lambda value: f"{value:g}", float),
    "steps": Kind("Steps", int, put_field("num_inference_steps"), str, int),
    "sampler": Kind("Sampler", str, put_field("sampler")),
}
"""What may change along an axis, by name."""
OF_ADAPTERS = ("adapter", "strength", "checkpoint")
EXAMPLES = {
    "prompt": "cat, dog",
    "adapter": "none, results/cat",
    "strength": "0-1 [5]",
    "checkpoint": "100-500 (+100), last",
    "seed": "1-4",
    "guidance": "1-9 (+2)",
    "steps": "10, 20, 40",
    "sampler": "Euler, DDIM, UniPC",
}
"""Of each kind what its values look like."""
