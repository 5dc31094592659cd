"""What merging MLflow stores shares between runs (`merge`) and models (`merge_models`): both ends, what came of it, and where files are now."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlparse

MERGED = "t2ilib.merged_from"
"""Tag of a run or model that got another id: the one that it had."""
ARTIFACTS = "mlflow-artifacts"
"""The folder beside a SQLite store that artifacts lie in (`store.open_client`), wherever both have been moved."""


@dataclass
class Merged:
    """What came of it. `runs`, `models`: id in the source -> id now. `added`: how many runs are new; `points`: of metrics; `conflicts`: what is
    different in both and was left as it is in the target, a sentence each."""

    runs: dict[str, str] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    added: int = 0
    points: int = 0
    conflicts: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Ends:
    """Both clients, the URI of the target, and where the source's artifacts are now. `results`: where the target's lie."""

    source: object
    target: object
    uri: str
    artifacts: Path
    results: Path


def local(uri: str) -> Path | None:
    """The folder on this machine that a URI of artifacts names; None where it names none."""
    parts = urlparse(uri)
    return Path(unquote(parts.path)) if parts.scheme in ("", "file") else None


def now_at(uri: str, artifacts: Path) -> Path | None:
    """The folder of artifacts that lay at `uri`: below where the store's are now, else where they were; None where there is none."""
    old = local(uri)
    if old is None:
        return None
    places = [artifacts.joinpath(*old.parts[old.parts.index(ARTIFACTS) + 1 :])] if ARTIFACTS in old.parts else []
    return next((place for place in (*places, old) if place.is_dir()), None)


def all_pages(ask: Callable[[str | None], object]) -> list:
    """All that a client finds, of an answer that comes in pages: `ask` takes the token of the next."""
    found, token = [], None
    while True:
        page = ask(token)
        found, token = found + list(page), page.token
        if not token:
            return found
