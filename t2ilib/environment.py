"""What a run was made with: versions of the libraries that decide its numbers, and the device.

The same seed under another version of a library is another experiment: of 51 of PEFT's own MetaMathQA runs that were run
again under newer libraries, a third of the pairs that had lain within two points changed their order. So a run's folder says
what it was made with, all of it where a run was resumed or measured elsewhere, and a report takes no runs of different ones
together. Imports no torch.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from t2ilib.text import write_whole

ENVIRONMENT = "environment.json"
DECIDING = ("torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "prodigyopt", "t2ilib")
Environment = Mapping[str, str]
"""Library -> version, and `device` -> "cpu" or the name of the card."""


def environment_now(device: str | None = None) -> dict[str, str]:
    """The versions in this process; `device`: what its runs are computed on."""
    found = {}
    for name in DECIDING:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # a copy of the sources on a path has no version
            continue
    return found | ({} if device is None else {"device": device})


def note_environment(folder: Path, device: str, anew: bool = False) -> None:
    """Adds what is here to what a run's folder says that the run was made with, unless it is there; `anew`: the run begins now,
    so that nothing else counts."""
    known, now = [] if anew else read_environments(folder), environment_now(device)
    if now not in known:
        write_whole(folder / ENVIRONMENT, json.dumps([*known, now], indent=1))


def read_environments(folder: Path) -> list[dict[str, str]]:
    """What a run was made with, one or more; [] for a run of before this was recorded."""
    path = folder / ENVIRONMENT
    return json.loads(path.read_text()) if path.exists() else []


def told_differences(environments: Iterable[Sequence[Environment]]) -> list[str]:
    """For each of these what it has that is not everywhere the same: "torch 2.13.0, device cpu"."""
    made_with = list(environments)
    single = [one for several in made_with for one in several]
    names = [*DECIDING, "device"]
    differing = [name for name in names if len({one.get(name) for one in single}) > 1]
    return [
        " and then ".join(", ".join(f"{name} {one.get(name, 'unknown')}" for name in differing) for one in several)
        for several in made_with
    ]
