"""Results packed into one small file, to be taken off a machine that is given back: adapters, configs, metrics, reports, pictures, MLflow's store.

Checkpoints are left out unless asked for, as are what was set aside and what is hidden; how much that is, is told. Files of equal bytes, such as an
adapter and MLflow's copies of it, are packed once. The store is copied as a database is, so training may go on meanwhile. What unpacks it is
`homecoming`.
"""

import hashlib
import json
import os
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from t2ilib.config import ConfigError
from t2ilib.data.download.archives import plain
from t2ilib.memory import require_disk
from t2ilib.text import shown
from t2ilib.tracking.merge import backup

INDEX = "t2ilib-pack.json"
"""In the file: its version, and which files are copies of which."""
VERSION = 1
STORE = "mlflow.db"
CHECKPOINTS = "checkpoints"
STORED = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".safetensors", ".zip")
"""What deflating would not make smaller."""
PART = ".part"


@dataclass(frozen=True)
class Packed:
    """`size`: bytes of the file; `num_files`, with copies; `runs`: their folders; `left_out`: what for -> bytes."""

    file: Path
    size: int
    num_files: int
    runs: tuple[str, ...]
    left_out: dict[str, int]


def pack_results(results: Path, file: Path, checkpoints: bool = False) -> Packed:
    """Packs a results folder, or one run's or study's in it, into the zip `file`, which is whole or not there.

    Raises ConfigError for a folder that is none or holds nothing, a file that is there already, and a disk that cannot hold it.
    """
    results, file = Path(results).absolute(), Path(file)
    if not results.is_dir():
        raise ConfigError(f"{shown(results)} is no folder: name the one that results are in")
    if file.exists():
        raise ConfigError(f"{shown(file)} is there already: give another name, or move it away")
    left_out: dict[str, int] = defaultdict(int)
    paths = [path for path in files_of(results, checkpoints, left_out) if path.absolute() != file.absolute()]
    if not paths:
        raise ConfigError(f"{shown(results)} holds nothing to pack")
    names = {path: name_of(path, results) for path in paths}
    names = dict(
        sorted(names.items(), key=lambda item: not ours(item[1]))
    )  # of copies, a run's own is the one that is packed
    for name in names.values():
        plain(file, name)  # what could not be unpacked everywhere is told now
    require_disk(
        file.parent, sum(path.stat().st_size for path in paths), "packed results", "free some, or pack to another disk"
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(file.name + PART)
    try:
        with zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED) as archive:
            copies = write_files(archive, names)
            archive.writestr(INDEX, json.dumps({"version": VERSION, "copies": copies}, indent=1))
        os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)
    runs = tuple(
        sorted(str(Path(name).parent) for name in names.values() if Path(name).name == "run.yaml" and ours(name))
    )
    return Packed(file, file.stat().st_size, len(names), runs, dict(left_out))


def name_of(path: Path, results: Path) -> str:
    """What a file is called among results: of a folder that is one run's or study's, its own name stands first."""
    alone = any((results / file).is_file() for file in ("run.yaml", "study.json"))
    return path.relative_to(results.absolute().parent if alone else results).as_posix()


def ours(name: str) -> bool:
    """Whether a file is a run's or study's own, not MLflow's."""
    return not name.startswith((STORE, "mlflow-artifacts/", "mlruns/"))


def files_of(folder: Path, checkpoints: bool, left_out: dict[str, int]) -> Iterator[Path]:
    """The files to be packed, sorted; what they leave out is counted in bytes. Links are not followed, because they may lead anywhere."""
    for place, folders, names in os.walk(folder):
        here = Path(place)
        for name in sorted(folders):
            reason = why_not(name, checkpoints)
            if (here / name).is_symlink():
                reason = "links"
            if reason:
                left_out[reason] += size_of(here / name)
                folders.remove(name)
        folders.sort()
        for name in sorted(names):
            path = here / name
            hidden = name.startswith(".") or name.endswith((PART, "-wal", "-shm", "-journal"))
            if path.is_symlink() or hidden or name == INDEX:
                left_out["links" if path.is_symlink() else "hidden"] += path.lstat().st_size
            else:
                yield path


def why_not(folder: str, checkpoints: bool) -> str:
    """What a folder of this name is left out as; "" where it is not."""
    if folder == CHECKPOINTS and not checkpoints:
        return CHECKPOINTS
    if folder.startswith("earlier-"):
        return "set aside (earlier-*)"
    return "hidden" if folder.startswith(".") or folder == "__pycache__" else ""


def size_of(folder: Path) -> int:
    if folder.is_symlink():
        return 0
    return sum((Path(place) / name).lstat().st_size for place, _, names in os.walk(folder) for name in names)


def write_files(archive: zipfile.ZipFile, names: dict[Path, str]) -> dict[str, str]:
    """Writes each content once; returns which files are copies: name -> name of the one that is in the archive."""
    sizes = defaultdict(list)
    for path in names:
        sizes[path.stat().st_size].append(path)
    first: dict[bytes, str] = {}
    copies: dict[str, str] = {}
    for path, name in names.items():
        if path.name == STORE:
            write_store(archive, path, name)
            continue
        if len(sizes[path.stat().st_size]) > 1:
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").digest()
            if digest in first:
                copies[name] = first[digest]
                continue
            first[digest] = name
        kind = zipfile.ZIP_STORED if path.suffix.lower() in STORED else zipfile.ZIP_DEFLATED
        archive.write(path, name, kind)
    return copies


def write_store(archive: zipfile.ZipFile, path: Path, name: str) -> None:
    with tempfile.TemporaryDirectory(prefix="t2ilib-") as folder:
        copy = Path(folder) / STORE
        backup(path, copy)
        archive.write(copy, name)
