"""What of a run's files is nobody else's business: where things lie on this machine, who works on it, and tokens.

`public` takes it out of values: of a local path its last name stays, of an address what stands before its query. `require_public` looks at what
is about to be uploaded, whoever wrote it, and refuses the rest.
"""

import getpass
import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import urlsplit

from t2ilib.config import ConfigError, RunConfig

TOKENS = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|AKIA[A-Z0-9]{16}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+)"
)
"""Access tokens of the Hub, GitHub and OpenAI, keys of AWS, and JSON web tokens."""
HOMES = re.compile(r"(?<![\w.:/])(/home/|/Users/|/root\b|/mnt/|/media/|/tmp/|~/|[A-Za-z]:\\\\?Users\\)")
"""Beginnings of paths that lie on somebody's machine."""
WEB = ("http", "https", "s3", "gs", "hf", "ftp")


def public_run(run: RunConfig) -> dict[str, Any]:
    """A run's config without where it was written, cached and logged, and with its other paths as `public` leaves them."""
    values = public(run.model_dump(mode="json"))
    values["data"]["cache_path"] = None
    return {key: value for key, value in values.items() if key not in ("output", "tracking")}


def public(value: Any) -> Any:
    """A value out of JSON or YAML, every text in it as it may be seen."""
    if isinstance(value, Mapping):
        return {key: public(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [public(part) for part in value]
    return public_text(value) if isinstance(value, str) else value


def public_text(text: str) -> str:
    """An address without user, query and fragment; the last name of an absolute path; any other text as it is."""
    address = urlsplit(text) if "://" in text and " " not in text else None
    if address is not None and address.scheme in WEB:
        return f"{address.scheme}://{address.netloc.rpartition('@')[2]}{address.path}"
    if re.match(r"[A-Za-z]:[\\/]", text):
        return PureWindowsPath(text).name
    return PurePosixPath(text).name if text.startswith(("/", "~/", "../")) else text


def public_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Of a safetensors file: values that are JSON keep being it."""
    return {key: value if value[:1] in "{[" else public_text(value) for key, value in metadata.items()}


def require_public(texts: Mapping[str, str]) -> None:
    """Raises ConfigError naming what in `texts`, file -> its text, holds a token, a path into a home folder, or this user's name in one."""
    home = re.escape(str(Path.home()))
    user = getpass_user()
    names = re.compile(rf"{home}|[/\\]{re.escape(user)}[/\\]") if user else re.compile(home)
    found = []
    for name, text in texts.items():
        for pattern, what in ((TOKENS, "an access token"), (HOMES, "a path"), (names, "a path")):
            if match := pattern.search(text):
                told = match[0] if what == "a path" else f"{match[0][:6]}..."
                line = text.count("\n", 0, match.start()) + 1
                found.append(f"{name}, line {line}: {what} ({told})")
                break
    if found:
        raise ConfigError(
            "what would be uploaded holds what nobody else should see:\n  "
            + "\n  ".join(found)
            + "\nTake it out of the run's prompts, captions or settings, and try again"
        )


def getpass_user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a machine that does not know who works on it
        return ""


def public_json(path: Path) -> str:
    """A JSON file's text as it may be seen, laid out as diffusers and transformers write it."""
    return json.dumps(public(json.loads(path.read_text(encoding="utf-8"))), indent=2, ensure_ascii=False) + "\n"
