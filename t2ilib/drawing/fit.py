"""Does drawing fit into memory, and what is told where it does not, in the words of `t2ilib plan`.

On a GPU a lack of memory is an error that can be caught: it is tried, and explained where it fails. On a CPU the system ends the process
without a word, so there it is foreseen, by the trace that plans runs (`planning`), and refused. What surely fits is not traced.
"""

import contextlib
import gc
import logging
import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from t2ilib.config import ConfigError, RunConfig
from t2ilib.drawing.settings import DrawSettings
from t2ilib.memory import GIB
from t2ilib.planning.bound import surely_fits
from t2ilib.planning.fit import advise, available_bytes, needed_bytes, remedy
from t2ilib.planning.trace import MemoryPlan, plan_memory
from t2ilib.runfile import build_run

log = logging.getLogger(__name__)

PHASE = "drawing"
REFUSALS = ("can't allocate memory", "not enough memory", "out of memory")
"""What errors of torch's allocators say that have no class of their own."""


def drawing_run(settings: DrawSettings, size: tuple[int, int], at_once: int = 1) -> RunConfig:
    """A run that trains nothing and draws so many pictures of this size at once, (width, height), for `t2ilib plan` to trace."""
    side = 8 * math.ceil(math.sqrt(math.prod(size)) / 8)
    return build_run(
        {
            "model": settings.model.model_dump(),
            "training": {"trains": "nothing", "steps": 0},
            "data": {"resolution": side},
            "evaluation": {"prompts": ["a picture"] * at_once, "vae_tiling": settings.vae_tiling},
        },
        "the settings",
    )


def shortage(
    settings: DrawSettings, size: tuple[int, int], at_once: int, device: torch.device, available: float
) -> str | None:
    """Why drawing so many pictures of a size at once will not fit into `available` bytes of the device, what would, and what is needed; None
    where it fits, or where that could not be foreseen, which is logged."""
    run = drawing_run(settings, size, at_once)
    if surely_fits(run, available):
        return None
    try:
        plan = of_drawing(plan_memory(run, device.type))
        if needed_bytes(plan) <= available:
            return None
        advice = remedy(advise(run, plan, available, most=1)).replace("data.resolution", "width and height")
    except ConfigError:
        raise
    except Exception as error:  # an estimate, that no picture must die of
        log.warning("how much memory drawing needs could not be foreseen (%s: %s)", type(error).__name__, error)
        return None
    return (
        f"drawing {at_once} picture{'s' * (at_once > 1)} of {size[0]}x{size[1]} at once with {settings.model.base} needs"
        f" {needed_bytes(plan) / GIB:.1f} GiB of {device.type} memory, and {available / GIB:.1f} GiB are available: {advice}"
    )


def of_drawing(plan: MemoryPlan) -> MemoryPlan:
    """The plan without what only training does."""
    return replace(plan, phases={PHASE: plan.phases[PHASE]})


@contextlib.contextmanager
def memory_told(
    settings: DrawSettings, size: tuple[int, int] | None, at_once: int, device: torch.device
) -> Iterator[None]:
    """A lack of memory within the scope as a ConfigError that says what is needed and what would fit. `size`: None where it is the base's
    own and the base is not there yet."""
    try:
        yield
        return
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        said = " ".join(str(error).split())[:200]
    free_memory(device)
    told = None if size is None else shortage(settings, size, at_once, device, available_bytes(device))
    raise ConfigError(
        told
        or f"drawing with {settings.model.base} ran out of {device.type} memory ({said}): draw smaller pictures, set model.quantization to nf4,"
        " close what else is using the memory, or take a smaller base"
    )


def lacks_memory(error: BaseException) -> bool:
    """Whether an error is about memory, on whatever device."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and any(word in str(error).lower() for word in REFUSALS))


def free_memory(device: torch.device) -> None:
    """Gives back what nobody holds any more: parts of models refer to each other in circles, and the GPU's allocator keeps what it had."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def bytes_held(modules) -> int:
    """What the weights of modules take."""
    return sum(
        tensor.numel() * tensor.element_size()
        for module in modules
        for tensor in (*module.parameters(), *module.buffers())
    )
