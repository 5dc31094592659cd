"""Where a notebook runs, and where what it leaves lasts: on Colab and Kaggle the machine is given back after hours, with all that is on it.

A notebook's first cell ends with `tell_place`, and its default output is `results_folder`. Both are told from environment variables that these
services set. Importing this imports no torch. Leaves out how t2ilib gets there: that is the first cell's part, which comes before t2ilib.
"""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

log = logging.getLogger(__name__)

RESULTS = "T2ILIB_RESULTS"
"""A folder that this variable names is where results last, wherever a notebook runs."""
DRIVE, SESSION = Path("/content/drive"), Path("/content/t2ilib")
"""On Colab: where Google Drive is mounted, and what is lost with the session."""
WORKING = Path("/kaggle/working")


def in_drive() -> Path:
    """A folder in Google Drive, which is mounted if need be: Colab asks for permission. Where that fails, the session's own disk, with a
    warning."""
    drive = DRIVE / "MyDrive"
    if not drive.is_dir() and not os.environ.get("T2ILIB_BATCH"):  # the kernels of a study have nobody to ask
        try:
            from google.colab import drive as colab

            colab.mount(str(DRIVE))
        except Exception as error:  # Colab's own have no common kind: no permission, no browser, a time that ran out
            log.warning("Google Drive is not mounted (%s: %s)", type(error).__name__, error)
    if drive.is_dir():
        return drive / "t2ilib"
    log.warning(
        "results are in %s and gone with this session: mount Drive and run this again, or take them home with `t2ilib results pack`",
        SESSION,
    )
    return SESSION


def beside_the_notebook() -> Path:
    """The repository's results folder, for a notebook that runs in a folder beside it; else one here."""
    here = Path.cwd()
    return Path("../results") if (here.parent / "pyproject.toml").exists() else Path("results")


PLACES: dict[str, Callable[[], Path]] = {"Colab": in_drive, "Kaggle": lambda: WORKING, "here": beside_the_notebook}
"""Name of a place -> the folder in which results last there."""
SIGNS = {"COLAB_RELEASE_TAG": "Colab", "KAGGLE_KERNEL_RUN_TYPE": "Kaggle"}
"""Environment variable -> the place that sets it."""


def place(environment: Mapping[str, str] = os.environ) -> str:
    """A name in PLACES."""
    return next((name for sign, name in SIGNS.items() if sign in environment), "here")


def results_folder(name: str = "") -> Path:
    """The folder in which results last, or the one called `name` in it: `t2ilib` in Google Drive on Colab, /kaggle/working on Kaggle, the
    repository's `results` elsewhere; T2ILIB_RESULTS names another. Makes nothing but Drive's mount."""
    named = os.environ.get(RESULTS)
    return (Path(named).expanduser() if named else PLACES[place()]()) / name


def tell_place() -> None:
    """Prints where this runs, and where results last; nothing in a study's kernels, which are told where to write."""
    if os.environ.get("T2ILIB_BATCH"):
        return
    where, folder = place(), results_folder()
    print(f"{'' if where == 'here' else f'{where}: '}results last in {folder}")
