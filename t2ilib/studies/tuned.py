"""The values that variants were tuned to: a YAML file beside the study file, `<study file>.tuned.yaml`, that `study tune` writes.

It gives the study a preset more for each that was tuned, `<preset>-tuned`: the same seeds, each variant at its own best. So what a tuned run
is run with is in its folder, its report and its MLflow run as whatever a study file says is, and the same study at one common rate stays
beside it under its own name. The file is data like the study file: it can be read, changed, committed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from t2ilib.config import ConfigError, check_choice
from t2ilib.runfile import load_yaml
from t2ilib.text import write_whole

TUNED = "-tuned"
"""What the names of presets at tuned values end with."""
TUNING = "-tuning"
"""What the names of the folders in which presets were tuned end with."""
TRIALS = "tuning.json"
"""In such a folder, and beside a report of tuned values: every trial of every variant."""
HEAD = """\
# Written by `t2ilib study tune`: preset -> variant -> the values that were best for it while tuning, which go over all that {study}
# says of it. `t2ilib study run {study} --preset PRESET --tuned` runs them; their trials are in <study>-PRESET-tuning/tuning.json
# among the results.
"""


def tuned_file(study: Path) -> Path:
    """Where the tuned values of a study file lie."""
    return study.with_suffix(".tuned.yaml")


def tuned_preset(study: Path, preset: str) -> str:
    """The name of the preset at tuned values; raises ConfigError where it was not tuned."""
    file = tuned_file(study)
    known = load_yaml(file).get("tuned") or {} if file.exists() else {}
    if preset not in known:
        raise ConfigError(f"{study}: preset {preset} was not tuned: t2ilib study tune {study} --preset {preset}")
    return preset + TUNED


def read_tuned(study: Path, presets: Mapping[str, Any]) -> dict[str, Any]:
    """`<preset>-tuned` -> what the study file says of the preset, and the tuned values; {} where nothing was tuned. Raises ConfigError
    for a file that is not what it should be."""
    file = tuned_file(study)
    if not file.exists():
        return {}
    told = load_yaml(file).get("tuned")
    if not isinstance(told, dict):
        raise ConfigError(f"{file} must hold tuned: {{preset: {{variant: ...}}}}; `t2ilib study tune` writes it anew")
    for preset in told:
        check_choice(preset, presets, f"{file}: preset")
        if preset + TUNED in presets:
            raise ConfigError(
                f"{study}: presets.{preset}{TUNED} is what {file} makes of {preset}: give yours another name"
            )
    return {preset + TUNED: {**presets[preset], "tuned": values} for preset, values in told.items()}


def write_tuned(study: Path, preset: str, values: Mapping[str, Mapping[str, Any]]) -> Path:
    """Puts a preset's tuned values (variant -> sections) into the file, other presets' and variants' staying; returns the file."""
    file = tuned_file(study)
    known = load_yaml(file).get("tuned") or {} if file.exists() else {}
    known = {**known, preset: {**(known.get(preset) or {}), **{name: dict(own) for name, own in values.items()}}}
    text = yaml.safe_dump({"tuned": known}, sort_keys=False, width=110, default_flow_style=None)
    write_whole(file, HEAD.format(study=study.name) + text)
    return file
