"""Does everything hold on a GPU, how fast is it there, and does it take the memory that was planned? One command, some minutes.

    python experiments/benchmarks/gpu.py
    python experiments/benchmarks/gpu.py --rows speed --only "sdxl 1024 qlora" --seconds 240

Needs a checkout, no network, no downloads, and neither MLflow, papermill, matplotlib nor typer: weights are random in the real
layouts, or the tiny model's own, and pictures are drawn. Every row is in the file as soon as it is known (`gpu_record`). What the
CPU gives for the same runs, and the plans of memory, come from the other cores meanwhile (`gpu_background`). Without a GPU the
same rows are taken on the CPU at a size that only shows that they can be.
"""

import argparse
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GROUPS = ("correctness", "study", "scratch", "speed")
"""In this order: what fails is known first, and speed takes what time is left."""
PACKAGES = (
    *("torch", "diffusers", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors", "prodigyopt"),
    *("pydantic", "numpy", "scipy"),
)
SECONDS = 480.0


def main(words: Sequence[str] | None = None) -> int:
    """Takes the rows; returns 1 if any failed, else 0."""
    begun = time.monotonic()
    options = parse(words)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for folder in (str(ROOT), str(Path(__file__).parent)):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    from gpu_background import Background
    from gpu_record import Record, table, take_rows

    from t2ilib.memory import usable_cores

    about = describe_machine()
    path = options.out or ROOT / "results" / "gpu" / f"{slug(about['card'])}.json"
    workers = max(0, usable_cores() - 2) if options.workers is None else options.workers
    print(f"{about['card']}; rows go to {path}", flush=True)
    with tempfile.TemporaryDirectory(prefix="t2ilib-gpu-") as scratch:
        os.environ.setdefault("T2ILIB_CACHE", str(Path(scratch) / "cache"))
        backgrounds = [Background(-(-workers // 3)), Background(workers - workers // 3)]
        try:
            rows = [row for row in rows_of(options.rows, Path(scratch), *backgrounds) if options.only in row.name]
            record = Record(path, about | {"command": " ".join(["gpu.py", *(words or sys.argv[1:])])})
            record.write()
            take_rows(rows, record, options.seconds, begun)
        finally:
            for background in backgrounds:
                background.close()
    print(f"\n{table(rows, record)}")
    return summary(record.rows, time.monotonic() - begun)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="the file; without it results/gpu/<card>.json")
    parser.add_argument("--rows", type=groups, default=GROUPS, help=f"of {','.join(GROUPS)}; all without it")
    parser.add_argument("--only", default="", help="only rows with this in their name")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="what no longer fits into them is left out")
    parser.add_argument("--workers", type=int, help="processes beside this one; without it the cores but two")
    return parser.parse_args(words)


def groups(text: str) -> tuple[str, ...]:
    unknown = [name for name in text.split(",") if name not in GROUPS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no such rows: {', '.join(unknown)}; choose from {', '.join(GROUPS)}")
    return tuple(name for name in GROUPS if name in text.split(","))


def rows_of(wanted: Sequence[str], scratch: Path, comparing: Any, planning: Any) -> list:
    """All rows of these groups, in the order in which they are to be taken. `comparing`, `planning`: a `Background` for each, so that
    no comparison waits for a plan that is needed later."""
    import torch

    rows = []
    if "correctness" in wanted:
        from gpu_correctness import Correctness

        rows += Correctness(scratch, comparing).rows()
    if "study" in wanted:
        from gpu_study import Study

        rows += Study(scratch).rows()
    if "scratch" in wanted:
        from gpu_scratch import scratch_rows

        rows += scratch_rows(planning)
    if "speed" in wanted:
        from gpu_speed import REAL, TINY, Speed

        rows += Speed(planning, REAL if torch.cuda.is_available() else TINY).rows()
    return rows


def describe_machine() -> dict[str, Any]:
    """The card, what drives it, and the versions that worked on it; what cannot be told is not there."""
    import torch

    from t2ilib.memory import GIB, available_memory, usable_cores

    about: dict[str, Any] = {
        "card": "cpu",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cores": usable_cores(),
        "host_memory_gib": round(available_memory() / GIB, 1),
        "python": platform.python_version(),
        "system": platform.system(),
        "packages": dict(filter(None, map(installed, PACKAGES))),
    }
    if commit := said(["git", "-C", str(ROOT), "describe", "--always", "--dirty"]):
        about["commit"] = commit
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        about |= {
            "card": torch.cuda.get_device_name(0),
            "memory_gib": round(properties.total_memory / GIB, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
        if driver := said(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]):
            about["driver"] = driver
    return about


def installed(name: str) -> tuple[str, str] | None:
    try:
        return name, importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def said(command: list[str]) -> str:
    """What a program printed; nothing where it is not there, or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def summary(rows: Sequence[dict[str, Any]], seconds: float) -> int:
    """Says how many rows of each kind there are; returns the exit code."""
    counts = {status: sum(row["status"] == status for row in rows) for status in ("ok", "failed", "left out")}
    print(f"{', '.join(f'{count} {status}' for status, count in counts.items())}, in {seconds:.0f} s")
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
