"""A picture's settings as the text that AUTOMATIC1111's web UI writes into a PNG and reads, and others after it.

    prompt, in lines of its own <lora:name:strength>
    Negative prompt: what guidance leads away from
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 5.0, Seed: 7, Size: 512x768, Model: name, Clip skip: 2

as its modules/processing.py (create_infotext) and modules/infotext_utils.py (parse_generation_parameters) have it since version 1.9. The
last line is the settings', where it has at least three of them, and otherwise belongs to the prompt. A value with a comma, a colon or a
line's end in it is a JSON string. Since every line before "Negative prompt:" is the prompt's, and lines lose the blanks at their ends, a
prompt need not come back as it was: for that a picture has text of our own beside this (`pngtext`).

Older versions wrote the schedule behind the sampler ("DPM++ 2M Karras"); both are read.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from t2ilib.drawing.samplers import SAMPLERS, known_sampler
from t2ilib.drawing.settings import AdapterChoice, DrawSettings, build_settings

NEGATIVE = "Negative prompt:"
FIELD = re.compile(r'(?P<name>\w[\w \-/]{1,40}):\s*(?P<value>"(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
"""Names have an end, so that a text of a million letters is read in seconds too."""
LEAST_FIELDS = 3
"""Of a last line that is the settings'."""
LORA = re.compile(r"[ \t]{0,4}<lora:(?P<name>[^:<>]+)(?::(?P<strength>[^:<>]*))?(?::[^<>]*)?>")
SIZE = re.compile(r"(\d{1,9})x(\d{1,9})")
KARRAS = " Karras"
SHIPPED = ("tiny-sdxl", "tiny-sd15")
"""Bases that are known by this name everywhere."""
UNNAMED = ("pytorch_lora_weights", "adapter")
"""File and folder names that say nothing of an adapter."""


@dataclass
class Infotext:
    """What such a text says. `fields`: all of its last line, as text; `adapters`: name -> strength, of the prompt's <lora:...>."""

    prompt: str
    negative_prompt: str
    adapters: dict[str, float]
    fields: dict[str, str]
    notes: list[str] = field(default_factory=list)
    """What was odd, a sentence each."""


def write_infotext(
    settings: DrawSettings, sampler: str, size: tuple[int, int], more: Mapping[str, Any] | None = None
) -> str:
    """The text of one picture. `sampler`, `size`: what "auto" and None were in the end; `more`: further fields."""
    settings = settings.settled(None)
    loras = "".join(f" <lora:{shown_name(choice)}:{choice.strength:g}>" for choice in settings.adapters)
    plain = sampler.partition(KARRAS)[0]
    skipped = settings.model.clip_skip
    fields = {
        "Steps": settings.num_inference_steps,
        "Sampler": next(iter(SAMPLERS[sampler].also), plain) if sampler in SAMPLERS else sampler,
        "Schedule type": None if plain == sampler else KARRAS.strip(),
        "CFG scale": settings.guidance_scale,
        "Seed": settings.seed,
        "Size": f"{size[0]}x{size[1]}",
        "Model": model_name(settings.model.base),
        "Clip skip": skipped + 1 if skipped else None,
        **(more or {}),
    }
    told = ", ".join(f"{name}: {quoted(value)}" for name, value in fields.items() if value is not None)
    negative = f"\n{NEGATIVE} {settings.negative_prompt}" if settings.negative_prompt else ""
    return f"{settings.prompt}{loras}{negative}\n{told}".replace("\0", " ").strip()


def quoted(value: Any) -> str:
    """A value as it stands, or as a JSON string where it has what ends one, or begins like one."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:\n]|^"', text) else text


def unquoted(text: str) -> str:
    if len(text) < 2 or text[0] != '"' or text[-1] != '"':
        return text
    try:
        return str(json.loads(text))
    except ValueError:
        return text


def shown_name(choice: AdapterChoice) -> str:
    """What an adapter is called in a prompt: the name of its file, or of the folder above those that all runs have, with its step."""
    parts = [part for part in PurePath(choice.path.removeprefix("models:/")).parts if part not in ("/", "\\")]
    parts[-1] = parts[-1].removesuffix(".safetensors")
    telling = [part for part in parts if part not in UNNAMED] or parts
    name = "-".join(telling[-2:]) if re.fullmatch(r"(seed|step-)?\d+", telling[-1]) else telling[-1]
    step = "" if choice.step is None else f"-{choice.step:06d}"
    return re.sub(r"[<>:,]", "_", name) + step


def model_name(base: str) -> str:
    """The last part of a base's name, without what would end a field."""
    return re.sub(r"[,:]", "", PurePath(base).name.removesuffix(".safetensors"))


def read_infotext(text: str) -> Infotext:
    """What a text says; whatever it is, this raises nothing."""
    lines = text.strip().split("\n")
    found = [(m["name"].strip(), unquoted(m["value"].strip())) for m in FIELD.finditer(lines[-1])]
    if len(found) < LEAST_FIELDS:
        found = []
    else:
        lines.pop()
    lines = [line.strip() for line in lines]
    start = next((number for number, line in enumerate(lines) if line.startswith(NEGATIVE)), len(lines))
    negative = [line.removeprefix(NEGATIVE).strip() for line in lines[start:]]
    adapters, notes = {}, []
    for lora in LORA.finditer("\n".join(lines[:start])):
        strength = number(lora["strength"] or "1", float)
        if strength is None:
            notes.append(f"{lora[0].strip()}: its strength is no number, so 1 is taken")
        adapters[lora["name"].strip()] = 1.0 if strength is None else strength
    return Infotext(
        LORA.sub("", "\n".join(lines[:start])).strip(), "\n".join(negative).strip(), adapters, dict(found), notes
    )


def settings_of(info: Infotext) -> tuple[DrawSettings, dict[str, str], list[str]]:
    """What a text says as settings; the fields that say nothing here, as text; and notes on what could not be taken as it stands.

    Adapters are named, not found: they are left out, and a note says so. Raises ConfigError for absurd values.
    """
    rest, notes = dict(info.fields), list(info.notes)
    values: dict[str, Any] = {"prompt": info.prompt, "negative_prompt": info.negative_prompt}
    for name, (place, kind, least) in NUMBERS.items():
        if name not in rest:
            continue
        value = number(rest[name], kind)
        if value is None or value < least:
            notes.append(f"{name} {rest[name]!r} is left out: it is to be {least} or more")
        else:
            values[place] = value
            del rest[name]
    if size := SIZE.fullmatch(rest.get("Size", "")):
        values["width"], values["height"] = int(size[1]), int(size[2])
        del rest["Size"]
    values |= read_sampler(rest, notes)
    model = {"base": rest.pop("Model")} if rest.get("Model") in SHIPPED else {}
    skipped = number(rest.get("Clip skip", ""), int)
    if skipped is not None and skipped >= 1:
        del rest["Clip skip"]
        model |= {"clip_skip": skipped - 1}
    if "Model" in rest:
        notes.append(f"Model {rest['Model']!r}: which base that is, is not known here; name one")
    if values["negative_prompt"] and values.get("guidance_scale") == 1:
        notes.append("the negative prompt is left out: at CFG scale 1 there is no guidance to lead away from it")
        values["negative_prompt"] = ""
    for name, strength in info.adapters.items():
        notes.append(f"adapter {name!r} of strength {strength:g} is left out: where its file is, the text does not say")
    return build_settings(values | {"model": model}, "the picture's text"), rest, notes


NUMBERS = {
    "Steps": ("num_inference_steps", int, 1),
    "CFG scale": ("guidance_scale", float, 1),
    "Seed": ("seed", int, 0),
}
"""Field -> field of DrawSettings, its kind, and the least that it can be."""


def read_sampler(rest: dict[str, str], notes: list[str]) -> dict[str, str]:
    """The sampler that the fields name, {} where none here is it; takes from `rest` what was understood."""
    told, schedule = rest.get("Sampler"), rest.get("Schedule type", "Automatic")
    if told is None:
        return {}
    both = told + (KARRAS if schedule.lower() == KARRAS.strip().lower() and not told.endswith(KARRAS) else "")
    known = known_sampler(both)
    if known is None:
        notes.append(f"sampler {both!r} is not known here: the base's own is taken")
        return {}
    del rest["Sampler"]
    if schedule.lower() in ("automatic", "uniform", "normal", KARRAS.strip().lower()):
        rest.pop("Schedule type", None)
    else:
        notes.append(f"schedule type {schedule!r} is not known here: the sampler's own is taken")
    return {"sampler": known}


def number(text: str, kind: type) -> int | float | None:
    """A finite number of a kind; None where the text is none."""
    try:
        value = kind(text.strip())
    except ValueError:
        return None
    return value if kind is int or abs(value) < float("inf") else None
