"""Where what can be made again is kept: pictures of the drawn world, the indexes of shards."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """T2ILIB_CACHE, else `t2ilib` in the user's cache folder."""
    return Path(
        os.environ.get("T2ILIB_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "t2ilib"
    )
