"""What every section of a run config is, and the kinds of values that several of them have."""

import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


Positive = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Place = Annotated[Path, AfterValidator(Path.expanduser)]
"""A file or folder; `~` is the user's own, as in a shell."""


def as_text(value: Any) -> Any:
    return os.path.expanduser(value) if isinstance(value, str | os.PathLike) else value


Location = Annotated[str, BeforeValidator(as_text)]
"""A file, folder, URL or Hub id; a path would lose a slash of `s3://`."""


DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


def seconds_in(text: str) -> int:
    """Seconds in `11h30m`, `90m` or `45s`; raises ValueError for another form, and for none at all."""
    found = DURATION.fullmatch(text.strip())
    seconds = found and sum(int(n or 0) * unit for n, unit in zip(found.groups(), (3600, 60, 1), strict=True))
    if not seconds:
        raise ValueError(f"{text!r} is no length of time: write it as 11h30m, 45m or 90s")
    return seconds


def as_duration(value: Any) -> Any:
    """A number alone would not say of what."""
    seconds_in(str(value))
    return value


Duration = Annotated[str, BeforeValidator(as_duration)]
"""A length of time, as `seconds_in` reads it."""
