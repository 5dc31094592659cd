"""What a server says about its files: asked again where the answer may be another one later, and an error in words where not.

Leaves out the files themselves (`remote`).
"""

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import requests
import tenacity
import urllib3

from t2ilib.config import ConfigError
from t2ilib.data.download.localhost import served

log = logging.getLogger(__name__)

RETRIES = 3
"""In a row, without much having arrived."""
FIRST_WAIT, LONGEST_WAIT = 1.0, 120.0
"""Seconds before the first retry, doubled for each further one, and the most that is waited."""
TIMEOUT = (15, 60)
"""Seconds to connect, and without a byte."""
WORTH = 2**20
"""Bytes that have to arrive for retries to count from the start: a long download is broken more often than a short one."""
MOST_SUMS = 2**24
TEMPORARY = (
    requests.ConnectionError,
    requests.Timeout,
    requests.exceptions.ChunkedEncodingError,
    urllib3.exceptions.HTTPError,
)
ANOTHER = "name another by --server"

Result = TypeVar("Result")


class DownloadError(OSError):
    """A file that could not be had, with what to do."""


class Interrupted(OSError):
    """What may have passed at the next try. `after`: seconds that the server asks to wait."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


@dataclass(frozen=True)
class Remote:
    """A file as its server describes it: `size` in bytes, ETag and Last-Modified as they came."""

    size: int
    etag: str | None = None
    modified: str | None = None

    @property
    def validator(self) -> str | None:
        """For If-Range, which takes no weak ETag."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.modified

    @property
    def maybe_md5(self) -> str | None:
        """S3 gives the MD5 of what was uploaded in one piece as the ETag; others may give something that looks like one."""
        found = re.fullmatch(r'"([0-9a-f]{32})"', self.etag or "")
        return found and f"md5:{found[1]}"

    def is_other_than(self, earlier: "Remote") -> bool:
        pairs = ((self.etag, earlier.etag), (self.modified, earlier.modified))
        return self.size != earlier.size or any(a != b for a, b in pairs if a and b)


@contextlib.contextmanager
def reached(server: str) -> Iterator[tuple[str, requests.Session]]:
    """A server's address without the slash at its end, and what to ask it with, for as long as the scope lasts; a folder here is served.
    Raises ConfigError for what is neither."""
    with contextlib.ExitStack() as scope:
        folder = Path(server).expanduser()
        if here := folder.is_dir():
            server = scope.enter_context(served(folder))
        elif not re.match(r"https?://[^/\s]+", server):
            raise ConfigError(
                f"--server {server!r} is no address and no folder: write an address that begins with http:// or https://, or the folder in"
                " which the files lie as a server has them"
            )
        session = scope.enter_context(new_session())
        session.trust_env = not here  # a proxy of the environment knows nothing of what is served here
        yield server.rstrip("/"), session


def new_session() -> requests.Session:
    session = requests.Session()
    session.headers.update({"Accept-Encoding": "identity", "User-Agent": "t2ilib"})
    return session


@contextlib.contextmanager
def answered(session: requests.Session, method: str, url: str, **headers: str) -> Iterator[requests.Response]:
    """The answer, its body not yet read. What breaks, in here too, becomes Interrupted where it may pass, else DownloadError."""
    try:
        with session.request(
            method, url, headers=headers, stream=True, timeout=TIMEOUT, allow_redirects=True
        ) as response:
            yield response
    except requests.exceptions.SSLError as error:
        raise DownloadError(f"{url}: no connection that can be trusted ({error})") from None
    except TEMPORARY as error:
        inner = error.args[0] if error.args else type(error).__name__
        raise Interrupted(str(getattr(inner, "reason", inner))) from error
    except requests.RequestException as error:
        raise DownloadError(f"{url}: {error}") from None


def refuse(response: requests.Response, url: str) -> None:
    """Raises Interrupted for an answer that may be another one later, and DownloadError for one that will not."""
    status = response.status_code
    if status >= 500 or status in (408, 429):
        after = response.headers.get("Retry-After", "")
        raise Interrupted(f"the server answers {status} {response.reason}", float(after) if after.isdigit() else 0.0)
    if status >= 400:
        raise DownloadError(f"{url}: the server answers {status} {response.reason}: {ANOTHER}")


def describe(session: requests.Session, url: str) -> Remote:
    """Asks the server about a file. Raises DownloadError where it has none, does not say its size, or cannot be reached."""

    def ask() -> Remote:
        with answered(session, "HEAD", url) as response:
            if response.status_code not in (405, 501) and (not response.ok or length_of(response)):
                return described(response, url)
        with answered(session, "GET", url) as response:  # the body is not read
            return described(response, url)

    return persistently(ask, url)


def described(response: requests.Response, url: str) -> Remote:
    refuse(response, url)
    if not length_of(response):
        raise DownloadError(f"{url}: the server does not say how large the file is: {ANOTHER}")
    return Remote(length_of(response), response.headers.get("ETag"), response.headers.get("Last-Modified"))


def length_of(response: requests.Response) -> int:
    """Bytes of the file; 0 where the server does not say, or says how many it compressed it to."""
    length, coding = response.headers.get("Content-Length", ""), response.headers.get("Content-Encoding", "identity")
    return int(length) if length.isdigit() and coding == "identity" else 0


def persistently(action: Callable[[], Result], url: str, reached: Callable[[], int] = int) -> Result:
    """What `action` gives, tried again after Interrupted, with growing pauses, at most RETRIES times in a row in which the bytes that
    are there, `reached`, did not get WORTH further than ever. Raises DownloadError then."""
    furthest, idle = reached(), 0

    def once() -> Result:
        nonlocal furthest, idle
        try:
            return action()
        except Interrupted:
            now = reached()
            idle = 1 if now >= furthest + WORTH else idle + 1
            furthest = max(furthest, now)
            raise

    def pause(state: tenacity.RetryCallState) -> float:
        return min(LONGEST_WAIT, max(FIRST_WAIT * 2 ** (idle - 1), state.outcome.exception().after))

    def say(state: tenacity.RetryCallState) -> None:
        seconds = state.next_action.sleep
        log.info("%s: %s; retry %d of %d in %.0f s", url, state.outcome.exception(), idle, RETRIES, seconds)

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(Interrupted),
        stop=lambda state: idle > RETRIES,
        wait=pause,
        before_sleep=say,
        reraise=True,
    )
    try:
        return retrying(once)
    except Interrupted as error:
        kept = f" {reached():,} bytes are kept." if reached() else ""
        raise DownloadError(
            f"{url}: {error}, and {RETRIES} retries did not help.{kept} Run the command again to go on, or {ANOTHER}"
        ) from None


def read_sums(session: requests.Session, server: str) -> dict[str, str]:
    """Checksums (`sha256:...`) by file name, from SHA256SUMS or MD5SUMS at the server's root, as sha256sum and md5sum write them;
    none where there are no such files."""
    sums = {}
    for algorithm, digits in (("md5", 32), ("sha256", 64)):  # the stronger one last, which counts
        url = f"{server}/{algorithm.upper()}SUMS"
        text = persistently(lambda url=url: read_small(session, url), url)
        for digest, name in re.findall(rf"^([0-9a-fA-F]{{{digits}}}) [ *](.+?)\r?$", text, re.MULTILINE):
            sums[name.rpartition("/")[2]] = f"{algorithm}:{digest.lower()}"
    return sums


def read_small(session: requests.Session, url: str) -> str:
    with answered(session, "GET", url) as response:
        if response.status_code in (403, 404, 410):
            return ""
        refuse(response, url)
        return response.raw.read(MOST_SUMS).decode("utf-8", "replace")
