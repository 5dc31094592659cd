"""A Python file of the user's own as a module: where measures and sources of pictures that t2ilib does not have are written."""

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from t2ilib.config import ConfigError


def module_at(file: Path, field: str) -> ModuleType:
    """The module in `file`, which `field` names. Raises ConfigError where there is no such file; what is wrong in it is raised as it
    is, since the traceback is its author's to read."""
    file = file.expanduser()
    if not file.is_file():
        raise ConfigError(f"{field}: there is no Python file {file}")
    place = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]
    spec = importlib.util.spec_from_file_location(f"t2ilib_own_{file.stem}_{place}", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
