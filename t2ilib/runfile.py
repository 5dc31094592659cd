"""From what people write to a RunConfig and back: YAML, `--set`, partial configs laid over one another, and mistakes told by place.

Run files, `--set`, a study's base, presets and variants, and the `parameters` cell of a notebook all speak RunConfig's sections and
fields. `merge` lays such partial configs over one another, `build_run` makes a run of them, `load_run` reads YAML and applies
overrides, `save_run` writes the resolved config that a run keeps.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from t2ilib.config import ConfigError, RunConfig, did_you_mean
from t2ilib.text import read_text, write_whole


def build_run(values: Mapping[str, Any], source: str = "the run config") -> RunConfig:
    """A RunConfig from nested plain values; raises ConfigError listing every mistake."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise describe_errors(error, source) from None


def merge(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Partial configs laid over one another, the last on top: sections field by field, and a field, whatever it holds, as a whole.

    A section that is null takes away what was said before it.
    """
    merged: dict[str, Any] = {}
    for part in parts:
        for name, content in part.items():
            both = isinstance(content, Mapping) and isinstance(merged.get(name), Mapping)
            merged[name] = {**merged[name], **content} if both else content
    return merged


def load_run(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML run config and applies overrides such as `optimizer.learning_rate=3e-4`; raises ConfigError."""
    return build_run(override_values(load_yaml(path), overrides), str(path))


def override_values(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`values` with overrides such as `optimizer.learning_rate=3e-4` put in; raises ConfigError for what is not one."""
    for override in overrides:
        address, equals, text = override.partition("=")
        if not equals or not address:
            raise ConfigError(f"--set {override!r}: write section.field=value, e.g. --set optimizer.learning_rate=3e-4")
        *parents, field = address.split(".")
        place = values
        for parent in parents:
            if place.get(parent) is None:
                place[parent] = {}
            place = place[parent]
            if not isinstance(place, dict):
                raise ConfigError(f"--set {override!r}: {parent} is a value, not a section")
        try:
            place[field] = parse_value(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {override!r} is not valid YAML: {error}") from None
    return values


def parse_value(text: str) -> Any:
    """A YAML scalar or list; `3e-4` counts as the number it looks like, which YAML 1.1 would read as text, and text is taken as
    it stands, `#` included: a command line has no comments."""
    if "e" in text.lower() and text[:1] in "0123456789.-+":
        with contextlib.suppress(ValueError):
            return float(text)
    value = yaml.safe_load(text)
    return text.strip() if isinstance(value, str) and text.strip()[:1] not in "'\"" else value


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises ConfigError for a missing file, broken YAML (with its line) or another shape."""
    try:
        values = yaml.safe_load(read_text(path))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: give the path of a YAML file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of fields, not {type(values).__name__}")
    return values


def save_run(run: RunConfig, path: Path) -> None:
    """Writes the resolved config, with every default filled in, as YAML that `load_run` reads back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, written_run(run))


def written_run(run: RunConfig) -> str:
    """The YAML that `save_run` writes."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False)


def describe_mistakes(
    error: ValidationError, kind: type[BaseModel] = RunConfig
) -> Iterator[tuple[tuple[int | str, ...], str]]:
    """Address and message of every mistake in a config of this kind; the address of a combination that cannot be is ()."""
    for mistake in error.errors():
        place = mistake["loc"]
        if mistake["type"] == "extra_forbidden":
            *section, name = place
            homes = [other for other in kind.model_fields if name in known_fields([other], kind)]
            elsewhere = f" It is a field of {' and of '.join(homes)}." if homes else ""
            yield place, "no such field." + (elsewhere or did_you_mean(name, known_fields(section, kind)))
        elif mistake["type"] == "literal_error":
            allowed = mistake["ctx"]["expected"]
            hint = did_you_mean(mistake["input"], allowed.replace("'", "").replace(" or ", ", ").split(", "))
            yield place, f"{mistake['input']!r} does not exist; choose {allowed}.{hint}"
        else:
            value = "" if mistake["type"] == "value_error" else f" (got {mistake['input']!r})"
            yield place, f"{mistake['msg'].removeprefix('Value error, ')}{value}"


def describe_errors(
    error: ValidationError, source: str, kind: type[BaseModel] = RunConfig, whole: str = "the run"
) -> ConfigError:
    """All mistakes of a config of this kind in one message, one line each. `whole`: what mistakes of no field in particular are about."""
    lines = [f"{'.'.join(map(str, place)) or whole}: {message}" for place, message in describe_mistakes(error, kind)]
    return ConfigError(f"{len(lines)} mistake{'s' * (len(lines) > 1)} in {source}:\n  " + "\n  ".join(lines))


def known_fields(location: Sequence[int | str], kind: type[BaseModel] = RunConfig) -> set[str]:
    section: Any = kind
    for part in location:
        if isinstance(part, int):  # of a list, whose kind of parts is its field's
            continue
        field = section.model_fields.get(part)
        kinds = getattr(field.annotation, "__args__", (field.annotation,)) if field else ()
        section = next((other for other in kinds if isinstance(other, type) and issubclass(other, BaseModel)), None)
        if section is None:
            return set()
    return set(section.model_fields)
