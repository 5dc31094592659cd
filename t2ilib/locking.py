"""Who holds a folder: one process at a time, told in a sentence to the others.

The lock is the operating system's own, so it dies with its process, however that ends; the file that carries it stays.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from t2ilib.config import ConfigError


@contextmanager
def held(lock: Path, refusal: str) -> Iterator[None]:
    """Holds the file `lock`, in a folder that is made if need be, for as long as the scope lasts; raises ConfigError(`refusal`) where another
    process holds it. Within a process scopes may lie in one another: a notebook's cell that is run again meets its own lock."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    file = FileLock(lock, is_singleton=True)
    try:
        file.acquire(timeout=0)
    except Timeout:
        raise ConfigError(refusal) from None
    try:
        yield
    finally:
        file.release()
