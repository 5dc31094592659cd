"""Several processes that train as one, as `accelerate launch` or `torchrun` starts them: a GPU each, or on a CPU a few cores.

A step's samples are cut into equal parts, `training.accumulation` for each process, and process p takes every part whose number is p, modulo
their number. Noise and timesteps are addressed by sample and dropout by the number of the part, so P processes give what one process gives
that accumulates P times as often, to rounding. Gradients are averaged (DistributedDataParallel, arXiv 2006.15704) in the backward pass of a
process's last part, once a step; what else they must agree on, losses and signals, goes into one small exchange.

The main process alone writes, measures and draws; the others wait for it in the next exchange. All read what it writes: on several
machines, `output` and `data.cache_path` must be on a disk that they share. Who fails says why; the others end with it, quietly.
"""

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from t2ilib.config import ConfigError, RunConfig
from t2ilib.data.store import Share

log = logging.getLogger(__name__)

LONGEST_WAIT = timedelta(days=1)
"""For what the main process does alone, such as drawing pictures of the class. Processes that died are noticed by the launcher at once."""
SUITABLE = 4
"""Batch sizes that an error offers."""


class EndedElsewhere(SystemExit):
    """Another process of this training has failed, and said why."""


def handlers() -> list[Any]:
    """How accelerate is to set up several processes."""
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    warnings.filterwarnings(
        "ignore", "`broadcast_buffers` is deprecated", FutureWarning
    )  # accelerate knows no newer name
    return [
        # No part of what is trained here has buffers that change, and gradients need not be held twice.
        DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        InitProcessGroupKwargs(timeout=LONGEST_WAIT),
    ]


def tell_once(accelerator: Accelerator) -> None:
    """From here on, processes but the main one log errors alone: what they do is the same."""
    if accelerator.num_processes > 1 and accelerator.is_main_process:
        log.info("%d processes train as one", accelerator.num_processes)
    if not accelerator.is_main_process:
        logging.getLogger("t2ilib").setLevel(logging.ERROR)


def require_parts(run: RunConfig, accelerator: Accelerator) -> None:
    """Raises ConfigError for a batch that is not the same number of whole pictures for each process, and for losses of a whole batch."""
    num, batch, times = accelerator.num_processes, run.training.batch_size, run.training.accumulation
    if num == 1:
        return
    if run.trains == "clip":
        raise ConfigError(
            f"{num} processes were launched, and what trains clip contrasts all pictures of a batch: start it without a launcher"
        )
    if batch % (num * times):
        least = batch // (num * times)
        suitable = [n * num * times for n in range(max(1, least), max(1, least) + SUITABLE)]
        raise ConfigError(
            f"training.batch_size {batch} is the pictures of a step over all processes, and does not divide by {num} processes with"
            f" training.accumulation {times}: take {', '.join(map(str, suitable))} or another multiple of {num * times}"
        )


def share_of(run: RunConfig, processes: int) -> RunConfig:
    """The run as one of so many processes computes it: what memory it needs is that of its share of a batch."""
    times = run.training.accumulation
    share = -(-run.training.batch_size // (processes * times)) * times
    return run.model_copy(update={"training": run.training.model_copy(update={"batch_size": share})})


def own_parts(ids: Sequence[int], accumulation: int, accelerator: Any) -> list[tuple[int, list[int]]]:
    """The parts of a step's samples that are this process's: the number of each, and its samples."""
    parts = micro_batches(ids, accumulation * accelerator.num_processes)
    return list(enumerate(parts))[accelerator.process_index :: accelerator.num_processes]


def micro_batches(ids: Sequence[int], parts: int) -> list[list[int]]:
    """A batch in so many equal parts; `require_parts` and the config have made sure that it divides."""
    size = len(ids) // parts
    return [list(ids[i : i + size]) for i in range(0, len(ids), size)]


def exchange(
    run: RunConfig, accelerator: Accelerator, losses: Tensor, signals: list[int], waited: float
) -> tuple[Tensor, list[int], float]:
    """The losses of all samples of a step (B,), in their order, of which this process has its own parts'; the signals that any process
    has received; and the seconds that the one which waited longest for data did."""
    if accelerator.num_processes == 1:
        return losses, signals, waited
    told = losses.new_tensor([float(signals[0] if signals else 0), waited], dtype=torch.float32)
    rows = accelerator.gather(torch.cat([losses.float(), told])[None])  # (P, accumulation * size + 2)
    parts = rows[:, :-2].reshape(accelerator.num_processes, run.training.accumulation, -1)
    received, waits = rows[:, -2:].amax(0).tolist()
    return parts.transpose(0, 1).reshape(-1), [int(received)] if received else [], waits


@contextlib.contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """All processes do this, and leave it when all have done it. Where some fail, the first of them raises why, and the others end. What is
    in here may `meet`, and exchange nothing else."""
    try:
        yield
    except Exception:
        if met(accelerator, well=False) != accelerator.process_index:
            raise EndedElsewhere(1) from None
        raise
    meet(accelerator)


@contextlib.contextmanager
def main_first(accelerator: Accelerator) -> Iterator[None]:
    """As `together`, and the main process before the others, who find what it has kept."""
    with together(accelerator):
        if not accelerator.is_main_process:
            meet(accelerator)
        yield
        if accelerator.is_main_process:
            meet(accelerator)


def meet(accelerator: Accelerator) -> None:
    """Waits for every process. Raises EndedElsewhere where one has failed."""
    if met(accelerator, well=True) is not None:
        raise EndedElsewhere(1)


def met(accelerator: Accelerator, well: bool) -> int | None:
    """Waits for every process; the number of the first to which something has happened, None where all are well."""
    if accelerator.num_processes == 1:
        return None if well else 0
    told = accelerator.gather(torch.tensor([well], device=accelerator.device)).tolist()
    return told.index(False) if False in told else None


@contextlib.contextmanager
def alike(accelerator: Accelerator) -> Iterator[None]:
    """What fails here fails in every process, for the same reason, since it is about what they have exchanged: the main one says it."""
    try:
        yield
    except Exception:
        if accelerator.is_main_process:
            raise
        raise EndedElsewhere(1) from None


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """A process that another one leaves alone in an exchange ends too."""
    try:
        yield
    except RuntimeError as error:
        if not lost_another(error):
            raise
        log.error("another process of this training has ended, so this one does: %s", str(error).splitlines()[0])
        raise EndedElsewhere(1) from None


def lost_another(error: RuntimeError) -> bool:
    """Whether an error says that another process cannot be reached: torch has a class for NCCL's, and gloo's has a plain one."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def share_of_work(accelerator: Accelerator) -> Share:
    """What this process does of a work that is done `together`."""
    return Share(accelerator.process_index, accelerator.num_processes, functools.partial(meet, accelerator))


def require_one_step(accelerator: Accelerator, step: int, run: RunConfig) -> None:
    """Raises ConfigError where processes found checkpoints of different steps to go on from."""
    if accelerator.num_processes > 1:
        found = accelerator.gather(torch.tensor([step], device=accelerator.device)).tolist()
        if len(set(found)) > 1:
            steps = ", ".join(map(str, found))
            raise ConfigError(
                f"output {run.output}: the processes found checkpoints of different steps ({steps}): put it on a disk that all of them share"
            )
