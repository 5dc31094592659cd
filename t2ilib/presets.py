"""Settings that suit the GPUs people are lent: a run config for each card and model, which `t2ilib plan` says fits, to be taken as they are.

They are YAML files, in experiments/cards of a checkout and in an installed package: run files for `t2ilib train` and `plan`, and for notebooks
sections that `preset` gives. What they leave out is RunConfig's default.
"""

from pathlib import Path
from typing import Any

from t2ilib.config import check_choice
from t2ilib.runfile import load_yaml

PRESETS = ("t4-sdxl", "t4-sd15", "p100-sdxl", "p100-sd15", "l4-sdxl", "l4-sd15")
CARDS_GIB = {"t4": 14.7, "p100": 15.9, "l4": 22.0}
"""What CUDA gives of each card's memory."""
PACKAGE = Path(__file__).parent


def preset_file(name: str) -> Path:
    """The run file of a preset; raises ConfigError for a name that is none."""
    check_choice(name, PRESETS, "preset")
    folders = (PACKAGE / "cards", PACKAGE.parent / "experiments" / "cards")
    return next(file for folder in folders if (file := folder / f"{name}.yaml").is_file())


def preset(name: str | None) -> dict[str, Any]:
    """Sections to lay over those of a run (`merge`): all of a preset but where it writes and whose pictures it takes; {} for None.

    Raises ConfigError for a name that is none.
    """
    if name is None:
        return {}
    values = load_yaml(preset_file(name))
    del values["output"], values["data"]["path"]
    return values
