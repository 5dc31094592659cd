"""Results from elsewhere put among those that are here: packed files (`parcel`) or folders, run by run, and their MLflow stores into the one in use.

A run is a whole: one that is not here is taken, one that is the same is left, one that went on since it was last taken is brought up to date,
and one of the same name that is another run is a conflict, which is named and left as it is. Nothing here is deleted, and merging twice
adds nothing. An archive is judged before anything of it is written (`data.download.archives`).
"""

import contextlib
import filecmp
import json
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from t2ilib.config import ConfigError
from t2ilib.data.download.archives import extract
from t2ilib.studies.parcel import CHECKPOINTS, INDEX, PART, STORE, VERSION, files_of, name_of, ours
from t2ilib.text import shown, write_whole
from t2ilib.tracking.joined import Merged
from t2ilib.tracking.merge import merge_store
from t2ilib.tracking.mlflow_run import NOTE
from t2ilib.tracking.store import tracking_uri

METRICS = "metrics.jsonl"
RESULT, RUN_ID = "result.json", "mlflow_run_id"
"""What a study keeps of a finished run, and its field that names the run in MLflow."""
MOST_BYTES = 2**40
OF_PLACE = (NOTE, "run.log", "process.json")
"""Files that say where a run is logged or was run, not what it is."""


@dataclass
class Arrived:
    """What came of one source. `new`, `updated`, `known`: names of runs; `num_files`: copied beside runs; `logged`: of its MLflow store;
    `conflicts`: a sentence each."""

    source: Path
    new: list[str] = field(default_factory=list)
    updated: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)
    num_files: int = 0
    logged: Merged | None = None
    conflicts: list[str] = field(default_factory=list)


def merge_results(sources: Sequence[Path], into: Path, uri: str | None = None) -> list[Arrived]:
    """Merges packed files and folders into the results folder `into`, in order. `uri`: the MLflow store; see `store.tracking_uri`.

    Raises ConfigError for a source that is not there, no pack, or the target itself; ArchiveError for a zip that is not to be trusted.
    """
    into = Path(into)
    for source in map(Path, sources):
        if not source.exists():
            raise ConfigError(
                f"{shown(source)} does not exist: name a file of `t2ilib results pack`, or a results folder"
            )
        if into.exists() and source.samefile(into):
            raise ConfigError(f"{shown(source)} is the folder that it is to be merged into")
    into.mkdir(parents=True, exist_ok=True)
    return [merge_source(Path(source), into, uri) for source in sources]


def merge_source(source: Path, into: Path, uri: str | None) -> Arrived:
    arrived = Arrived(source)
    with unpacked(source, into) as folder:
        paths = list(files_of(folder, True, defaultdict(int)))
        root = (
            folder
            if not paths or name_of(paths[0], folder) == paths[0].relative_to(folder).as_posix()
            else folder.parent
        )
        names = [path.relative_to(root).as_posix() for path in paths]
        runs = [str(Path(name).parent) for name in names if Path(name).name == "run.yaml" and ours(name)]
        outer = [run for run in runs if not any(inside(run, other) for other in runs if other != run)]
        for run in outer:
            own = [Path(name).relative_to(run).as_posix() for name in names if inside(name, run)]
            merge_run(root / run, into / run, run, own, arrived)
        for name in names:
            if ours(name) and name != INDEX and not any(inside(name, run) for run in outer):
                merge_file(root / name, into / name, name, arrived)
        store = folder / STORE
        if store.exists():
            target = tracking_uri(uri, into)
            arrived.logged = merge_store(store, target, into)
            arrived.conflicts += arrived.logged.conflicts
            for run in {*arrived.new, *arrived.updated}:
                readdress(into / run, target, arrived.logged)
    return arrived


def inside(name: str, folder: str) -> bool:
    return name.startswith(f"{folder}/")


@contextlib.contextmanager
def unpacked(source: Path, into: Path) -> Iterator[Path]:
    """The folder that a source is, for as long as the scope lasts: itself, or, of a packed file, a new one in `into`."""
    if source.is_dir():
        yield source.absolute()
        return
    with tempfile.TemporaryDirectory(prefix=".merging-", dir=into) as scratch:
        folder = Path(scratch) / "unpacked"
        folder.mkdir()
        extract(source, folder, None, MOST_BYTES, lambda what, done, total: None)
        add_copies(source, folder)
        yield folder


def add_copies(source: Path, folder: Path) -> None:
    """Puts files that were packed once in their other places; raises ConfigError for what `pack_results` did not write."""
    try:
        about = json.loads((folder / INDEX).read_text())
        copies, version = about["copies"], about["version"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{shown(source)} was not made by `t2ilib results pack`: it has no {INDEX} that can be read"
        ) from None
    if version != VERSION:
        raise ConfigError(f"{shown(source)} is of version {version!r}, which a later t2ilib wrote: update it")
    root = folder.resolve()
    for name, first in copies.items():
        target, origin = (root / name).resolve(), (root / first).resolve()
        if not (target.is_relative_to(root) and origin.is_relative_to(root) and origin.is_file()):
            raise ConfigError(
                f"{shown(source)} says that {shown(name)} is a copy of {shown(first)}, which leads out of it or is not there"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            shutil.copyfile(origin, target)


def merge_run(source: Path, target: Path, name: str, files: Sequence[str], arrived: Arrived) -> None:
    """Takes a run that is not here, or what has come of one that is."""
    if not target.exists():
        draft = target.with_name(f".{target.name}{PART}")
        shutil.rmtree(draft, ignore_errors=True)
        for file in files:
            copy(source / file, draft / file)
        os.replace(draft, target)
        arrived.new.append(name)
        return
    telling = [file for file in files if Path(file).name not in OF_PLACE and not file.startswith(f"{CHECKPOINTS}/")]
    there = {file: (target / file).is_file() for file in telling}
    differ = [file for file in telling if there[file] and not same(source / file, target / file)]
    if not differ and all(there.values()):
        arrived.known.append(name)
        return
    ours_now, theirs = lines_of(target / METRICS), lines_of(source / METRICS)
    if ours_now and theirs and ours_now != theirs and ours_now[: len(theirs)] == theirs:
        arrived.known.append(name)
    elif theirs[: len(ours_now)] == ours_now and (not differ or len(theirs) > len(ours_now) > 0):
        for file in files:
            copy(source / file, target / file)
        arrived.updated.append(name)
    else:
        told = ", ".join(map(shown, differ[:3]))
        arrived.conflicts.append(
            f"{shown(name)} is another run than the one that is here ({told} differ): rename one of the folders"
        )


def same(one: Path, other: Path) -> bool:
    """Whether two files say the same of a run: all but the id that it has in MLflow."""
    if filecmp.cmp(one, other, shallow=False):
        return True
    if one.name != RESULT:
        return False
    told = [
        {name: value for name, value in json.loads(file.read_text()).items() if name != RUN_ID} for file in (one, other)
    ]
    return told[0] == told[1]


def lines_of(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.is_file() else []


def copy(source: Path, target: Path) -> None:
    """A file that is whole or not there, with its time, by which adapters are listed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}{PART}")
    shutil.copy2(source, draft)
    os.replace(draft, target)


def merge_file(source: Path, target: Path, name: str, arrived: Arrived) -> None:
    """A file beside runs, such as a study's report."""
    if not target.exists():
        copy(source, target)
        arrived.num_files += 1
    elif not filecmp.cmp(source, target, shallow=False):
        arrived.conflicts.append(
            f"{shown(name)} is otherwise here, and stays: of a study, run it again, and its report is of all runs"
        )


def readdress(run: Path, uri: str, logged: Merged) -> None:
    """Has a run's notes name the store that it is in now, and its id there, so that it goes on in it."""
    note, result = run / NOTE, run / RESULT
    for file, key, more in ((note, "run_id", {"uri": uri}), (result, RUN_ID, {})):
        told = json.loads(file.read_text()) if file.is_file() else {}
        if told.get(key) in logged.runs:
            changed = told | {key: logged.runs[told[key]]} | more
            if changed != told:
                write_whole(file, json.dumps(changed, indent=1 if file == result else None))
