"""Where memory and disk stand: readings at key points, peaks by phase, and a check before anything is written.

Process memory is the resident set; its peak over a stretch is the kernel's high-water mark, reset at the start (Linux), so
that drawing, which is the real peak, does not hide what training takes. Elsewhere the peak of the whole process stands in for each.
"""

import contextlib
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from t2ilib.config import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)

MIB, GIB = 2**20, 2**30
SECONDS_BETWEEN_READINGS = 10.0
"""While a run takes its steps."""


def read_memory(folder: Path) -> dict[str, float]:
    """Process, system, device memory and free disk under `folder`, in MiB. Device keys only where there is a CUDA device and torch is
    loaded: without it nothing here is on one."""
    import psutil

    readings = {
        "process_mib": psutil.Process().memory_info().rss / MIB,
        "system_available_mib": available_memory() / MIB,
        "disk_free_mib": shutil.disk_usage(existing(folder)).free / MIB,
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        readings |= {
            "device_allocated_mib": torch.cuda.memory_allocated() / MIB,
            "device_used_mib": (total - free) / MIB,
        }
    return readings


def readings_told(values: Mapping[str, float]) -> str:
    """Readings in words."""
    return ", ".join(f"{k.removesuffix('_mib').replace('_', ' ')} {v:,.0f} MiB" for k, v in values.items())


class MemoryLog:
    """Readings at named moments, each a line in the log and `memory/<moment>/<reading>` metrics; and between them at an interval."""

    def __init__(self, folder: Path):
        self.folder, self.readings = folder, {}
        self.read = time.monotonic()

    def note(self, moment: str) -> None:
        self.readings[moment] = values = read_memory(self.folder)
        self.read = time.monotonic()
        log.info("memory at %s: %s", moment, readings_told(values))

    def now(self, step: int, tell: Callable[[str], None] = log.debug) -> dict[str, float]:
        """`memory/<reading>` where SECONDS_BETWEEN_READINGS have passed since the last reading, told as a line of `step`; else {}."""
        if time.monotonic() - self.read < SECONDS_BETWEEN_READINGS:
            return {}
        values, self.read = read_memory(self.folder), time.monotonic()
        tell(f"memory at step {step}: {readings_told(values)}")
        return {f"memory/{name}": value for name, value in values.items()}

    def metrics(self) -> dict[str, float]:
        return {
            f"memory/{moment}/{name}": value
            for moment, values in self.readings.items()
            for name, value in values.items()
        }


class Peaks:
    """The largest use of memory in each phase of a run, in MiB, over all stretches that belong to it.

    `found`: phase -> `peak_process_mib` and, where there is a CUDA device, `peak_device_mib` (what tensors took of it).
    """

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}
        self.phase: str | None = None

    def enter(self, phase: str) -> None:
        """Begins a stretch of `phase`, and ends one of another; does nothing inside one, so a loop may call it every step."""
        if self.phase == phase:
            return
        import torch

        self.leave()
        self.phase = phase
        reset_process_peak()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def leave(self) -> None:
        """Ends the stretch; does nothing outside one."""
        if self.phase is None:
            return
        import torch

        values = {"peak_process_mib": process_peak_mib()}
        if torch.cuda.is_available():
            values["peak_device_mib"] = torch.cuda.max_memory_allocated() / MIB
        self.include({self.phase: values})
        self.phase = None

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """What this scope does is a stretch of `phase`; one that it interrupts is ended."""
        self.enter(phase)
        try:
            yield
        finally:
            self.leave()

    def include(self, found: Mapping[str, Mapping[str, float]]) -> None:
        """What was found in an earlier attempt counts too."""
        for phase, values in found.items():
            own = self.found.setdefault(phase, {})
            own |= {name: max(value, own.get(name, 0.0)) for name, value in values.items()}

    def metrics(self) -> dict[str, float]:
        """`memory/<phase>/<name>`, and under the name alone the largest of all phases."""
        by_phase = {
            f"memory/{phase}/{name}": value for phase, values in self.found.items() for name, value in values.items()
        }
        names = {name for values in self.found.values() for name in values}
        return by_phase | {
            name: max(values[name] for values in self.found.values() if name in values) for name in sorted(names)
        }


ALIGNMENT = 64
"""Bytes; what torch's own allocator gives on a CPU."""


def aligned(tensor: "Tensor") -> "Tensor":
    """`tensor`, or on a CPU its copy where it does not begin at a multiple of 64 bytes, as what was memory-mapped need not.

    On some CPUs (AMD EPYC, AVX-512) matrix kernels give other last bits at other alignments, so equal weights would not give
    equal results (1e-6 in a UNet's output at batch 1).
    """
    return tensor.clone() if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT else tensor


def align(model: "nn.Module") -> None:
    """Moves parameters and buffers of `model` that lie askew into aligned memory, one at a time."""
    for tensor in (*model.parameters(), *model.buffers()):
        data = tensor.data
        copy = aligned(data)
        if copy is not data:
            tensor.data = copy


def pictures_at_once(resolution: int, most: int, pixels: int = 2**20) -> int:
    """How many pictures inference takes at once: as many as make one megapixel, or `pixels`, at least 1, at most `most`."""
    return max(1, min(most, pixels // resolution**2))


def reset_process_peak() -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a hardened container forbids it; the mark then covers the whole process
            Path("/proc/self/clear_refs").write_text("5")


def process_peak_mib() -> float:
    """The kernel's high-water mark of the resident set: since it was last reset on Linux, of the whole process elsewhere."""
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / MIB
    import resource  # which Windows has not

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (MIB if sys.platform == "darwin" else 1024)


def release() -> None:
    """Gives back what nothing refers to any more, of a GPU too."""
    import gc

    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def require_disk(
    folder: Path,
    bytes_needed: int,
    what: str,
    remedy: str = "free some, set output to another disk, or lower training.keep_checkpoints",
) -> None:
    """Raises ConfigError where the disk under `folder` cannot hold `bytes_needed` more with a tenth to spare."""
    free = shutil.disk_usage(existing(folder)).free
    if free < bytes_needed * 1.1:
        raise ConfigError(
            f"{what} need {bytes_needed / MIB:,.0f} MiB under {folder}, and {free / MIB:,.0f} MiB are free: {remedy}"
        )


def require_memory(bytes_needed: int, what: str, remedy: str) -> None:
    """Raises ConfigError where the host's memory cannot hold `bytes_needed` more."""
    available = available_memory()
    if available < bytes_needed:
        raise ConfigError(
            f"{what} needs {bytes_needed / MIB:,.0f} MiB of memory, and {available / MIB:,.0f} MiB are available: {remedy}"
        )


def available_memory(control_group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of host memory that can still be taken: the system's, or less in a container with a limit (cgroup v2).

    Cached files do not count as taken: the kernel drops them when memory is asked for.
    """
    import psutil

    available = psutil.virtual_memory().available
    try:
        limit = int((control_group / "memory.max").read_text())
        used = int((control_group / "memory.current").read_text())
        stat = dict(line.split() for line in (control_group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no control group, an older kind, or "max": no limit
        return available
    return min(available, limit - used + int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0)))


def usable_cores() -> int:
    """Cores this process may use: in a container fewer than the machine has, and its share of those where a launcher has started several."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def existing(folder: Path) -> Path:
    """The nearest folder that exists, for asking about the disk below it."""
    folder = Path(folder).absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())
