"""Which layer of a base each layer of an adapter's file belongs to, where the two have other layers: students, and layers left out.

An adapter of a teacher goes by the teacher's names, and in its student some of these mean another layer, or none. So its tensors are given
the names of the layers whose weights came from the adapted ones (`models.students.origins`). What was trained on the student itself says so
in its file (STUDENT) and is taken as it stands. Layers that the base does not have are left out only where that is asked for.
"""

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from t2ilib.adapters.formats import KOHYA, kohya_names
from t2ilib.config import ConfigError
from t2ilib.models.components import Components
from t2ilib.models.students import RECORD, first_teacher, origins

log = logging.getLogger(__name__)

STUDENT = "t2ilib.student"
"""What an adapter's file says of the student that it was trained on: the record of its config, as JSON."""
CONFIGS = "lora_adapter_metadata"
"""Where diffusers keeps the peft configs of a file's components, in its metadata."""
DIFFUSERS = re.compile(
    r"\.(lora_[AB]|lora\.(down|up)|lora_linear_layer\.(down|up)|processor\.\w+_lora\.(down|up))\.weight$|\.lora_magnitude_vector(\.weight)?$|\.alpha$"
)
"""The tensors of an adapter under diffusers' and peft's names."""
INSIDE = re.compile(r"(\.lora|\.lora_linear_layer|\.processor\.\w+_lora)$")
"""What may stand between a module's name and `.alpha`."""
SHOWN = 3
"""Names of missing layers that are said."""


def about_student(unet: nn.Module) -> dict[str, str]:
    """What the file of an adapter of this UNet says of it."""
    record = unet.config.get(RECORD)
    return {STUDENT: json.dumps(record, sort_keys=True)} if record else {}


def by_teachers_names(components: Components, metadata: Mapping[str, str], file: Path) -> bool:
    """Whether a file's layers have the names of the teacher of this UNet. Raises ConfigError where they are those of another student."""
    here, there = about_student(components.unet).get(STUDENT), metadata.get(STUDENT)
    if there is not None and there != here:
        left_out = ", ".join(json.loads(there)["leave_out"])
        raise ConfigError(
            f"{file} was trained on a student without {left_out}, whose layers mean others in {components.path}: draw it with the model that"
            " it was trained on"
        )
    return here is not None and there is None


def place_diffusers(
    components: Components, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], file: Path, partial: bool
) -> tuple[Mapping[str, Tensor], Mapping[str, str]]:
    """Tensors and metadata of a file in diffusers' layout, by the names that their layers have here. Raises ConfigError for layers that are not
    here, unless they may be left out."""
    moved = by_teachers_names(components, metadata, file)
    if not (moved or partial):
        return tensors, metadata
    names = {own: other for other, own in origins(components.unet).items()} if moved else None
    placed, missing, layers = {}, [], set()
    for key, tensor in tensors.items():
        component, module, rest = parts_of(key)
        layers.add((component, module))
        there = here(components, component, module, names)
        if there is None:
            missing.append(f"{component}.{module}")
        else:
            placed[key if there == module else f"{component}.{there}{rest}"] = tensor
    report(components, file, list(dict.fromkeys(missing)), len(layers), partial)
    told = dict(metadata)
    if CONFIGS in told:
        told[CONFIGS] = json.dumps(renamed(json.loads(told[CONFIGS]), components, names), sort_keys=True)
    return placed, told


def parts_of(key: str) -> tuple[str, str, str]:
    """Component, module and the rest of a tensor's name in diffusers' layout."""
    end = DIFFUSERS.search(key).start()
    name = INSIDE.sub("", key[:end])
    component, _, module = name.partition(".")
    return component, module, key[len(name) :]


def here(components: Components, component: str, module: str, names: Mapping[str, str] | None) -> str | None:
    """What a module of a file is called here, None where it is not here. `names`: of a student, its teacher's name -> its own."""
    if component == "unet" and names is not None:
        if module in names:
            return names[module]
        inner = names.get(f"{module}.to_q")  # files that adapt attention by its processor name the whole of it
        return inner.removesuffix(".to_q") if inner else None
    network = components.modules().get(component)
    spellings = (module, module.removeprefix("text_model."), f"text_model.{module}")
    there = network is not None and any(has(network, name) for name in spellings)
    return module if there else None


def has(network: nn.Module, name: str) -> bool:
    try:
        network.get_submodule(name)
    except AttributeError:
        return False
    return True


def renamed(configs: dict[str, Any], components: Components, names: Mapping[str, str] | None) -> dict[str, Any]:
    """peft's configs with the names that layers have here, without those that are not here. Endings of names, such as `to_q`, stay."""
    found = {}
    for key, value in configs.items():
        component, _, field = key.partition(".")
        if field in ("target_modules", "rank_pattern", "alpha_pattern") and isinstance(value, list | dict):
            places = {
                name: here(components, component, name, names) if "_blocks." in name or "layers." in name else name
                for name in value
            }
            kept = {name: place for name, place in places.items() if place is not None}
            value = (
                {place: value[name] for name, place in kept.items()} if isinstance(value, dict) else list(kept.values())
            )
        found[key] = value
    return found


def place_kohya(
    components: Components, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], file: Path, partial: bool
) -> Mapping[str, Tensor]:
    """`place_diffusers` for a file in kohya's layout. Tensors of other kinds than a LoRA's stay, to be refused where they are read."""
    moved = by_teachers_names(components, metadata, file)
    if not (moved or partial):
        return tensors
    known = spelled_by_kohya(components)
    if moved:
        own, by_theirs = {place: name for name, place in known.items()}, {}
        names = {theirs: mine for mine, theirs in origins(components.unet).items()}
        for name, (component, module) in spelled_by_kohya(
            replace(components, unet=first_teacher(components.unet))
        ).items():
            place = (component, names.get(module) if component == "unet" else module)
            by_theirs[name] = own.get(place)
    else:
        by_theirs = {name: name for name in known}
    placed, missing, layers = {}, [], set()
    for key, tensor in tensors.items():
        match = KOHYA.fullmatch(key)
        if not match:
            placed[key] = tensor
            continue
        layers.add(match[1])
        there = by_theirs.get(match[1])
        if there is None:
            missing.append(match[1])
        else:
            placed[f"{there}.{match[2]}"] = tensor
    report(components, file, list(dict.fromkeys(missing)), len(layers), partial)
    return placed


def spelled_by_kohya(components: Components) -> dict[str, tuple[str, str]]:
    """Name of a layer in kohya's layout -> (component, module); of the UNet also by diffusers' names."""
    prefix = components.family.kohya_prefixes["unet"]
    by_modules = {
        f"{prefix}_{name.replace('.', '_')}": ("unet", name) for name, _ in components.unet.named_modules() if name
    }
    return by_modules | {name: place for place, name in kohya_names(components).items()}


def report(components: Components, file: Path, missing: Sequence[str], count: int, partial: bool) -> None:
    """Says which layers are left out. Raises ConfigError where they may not be, or none is left."""
    if not missing:
        return
    what = f"{len(missing)} of the {count} layers that {file} adapts"
    if partial and len(missing) < count:
        log.warning("%s are not in %s and are left out: %s", what, components.path, few(missing))
        return
    remedy = ". Load it with partial (--partial) to leave these out" if len(missing) < count else ""
    raise ConfigError(f"{what} are not in {components.path}: {few(missing)}: it was trained on another base{remedy}")


def few(names: Iterable[str]) -> str:
    """The first of some names, and how many more there are."""
    listed = list(names)
    rest = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return f"{', '.join(listed[:SHOWN])}{rest}"


def missing_layers(components: Components, keys: Iterable[str]) -> list[str]:
    """The layers of a file in diffusers' layout, whose tensors have these names, that are not here."""
    places = [parts_of(key)[:2] for key in keys if DIFFUSERS.search(key)]
    absent = (
        f"{component}.{module}" for component, module in places if here(components, component, module, None) is None
    )
    return list(dict.fromkeys(absent))
