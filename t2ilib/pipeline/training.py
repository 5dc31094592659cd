"""The step `train`: a run as `t2ilib train` takes it, with what it will need told first; it goes on from its last checkpoint.

Where the file, or the pictures, now say another run than the one whose checkpoints lie there, it begins anew, and those are set aside. What it
will need is traced (`planning`). In a dry run the Hub is not asked: a published base is traced by its layout.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from t2ilib.config import RunConfig
from t2ilib.memory import GIB
from t2ilib.models.files.layouts import PUBLISHED
from t2ilib.models.load import choose_device
from t2ilib.pipeline.job import Job, size_told, time_told
from t2ilib.pipeline.trained import trained_file
from t2ilib.planning.bound import memory_bound, surely_fits
from t2ilib.planning.fit import CARDS_GB, available_bytes, check_fit, count_samples, needed_bytes
from t2ilib.planning.trace import MemoryPlan, plan_memory
from t2ilib.runfile import save_run
from t2ilib.tracking.tracker import open_tracker
from t2ilib.training.checkpoint import file_digest, list_checkpoints, newest, read_meta, step_of
from t2ilib.training.loop import train
from t2ilib.training.resume import LATEST, NEVER, digest_of, with_meta

log = logging.getLogger(__name__)

RATES = (10e12, 100e12)
"""Operations a second for which the time is told."""
planned: dict[str, MemoryPlan] = {}
"""Runs that need the same were traced once."""


def depends(job: Job) -> Any:
    return [digest_of(job.run), job.run.training.steps]


def made(job: Job) -> bool:
    run = job.run
    done = [step_of(path) for path in list_checkpoints(run.output / "checkpoints")]
    return run.trains == "nothing" or (trained_file(run) is not None and (not done or max(done) >= run.training.steps))


def needs(job: Job) -> Iterator[str]:
    run = job.run
    trained = f"{run.adapter.kind} of rank {run.adapter.rank}" if run.adapter else run.trains
    yield (
        f"{trained} on {run.model.base}, {run.training.steps} steps of {run.training.batch_size} at {run.data.resolution} pixels, into"
        f" {run.output}"
    )
    done = [step_of(path) for path in list_checkpoints(run.output / "checkpoints")]
    if done and not begins_anew(job):
        yield f"goes on from step {max(done)}{seconds_left(run, max(done))}"
    elif done:
        yield f"what lies in {run.output} is of another run, and is set aside there"
    if run.training.steps:
        yield from needs_of(run, job.options.dry)


def needs_of(run: RunConfig, dry: bool) -> Iterator[str]:
    """Memory, disk and time, as far as they can be known."""
    device, least = choose_device(), f"{run.training.least_free_disk_mib} MiB stay free"
    available = available_bytes(device)
    if surely_fits(run, available):
        yield f"memory: under {memory_bound(run) / GIB:.1f} GiB, of {available / GIB:.1f} that {device.type} has free"
        yield f"disk: whether the checkpoints fit is asked before the first step; {least}. Time: the first steps tell"
        return
    kind = "cuda" if dry else device.type
    try:
        plan = traced(run, kind, dry)
    except Exception as error:  # an estimate, of which no run must die; what is wrong with the run itself, it will say
        yield f"memory: not known here ({type(error).__name__}: {error})"
        return
    needed = needed_bytes(plan)
    cards = [str(size) for size in CARDS_GB if needed <= size * GIB]
    free = f"{available / GIB:.1f} free here" if kind == device.type else "there is no GPU here"
    yield f"memory: {needed / GIB:.1f} GiB on {kind} while {plan.largest} (cards of {', '.join(cards) or 'no'} GB hold it; {free})"
    kept = sum(plan.phases.get("training", {}).get(part, 0) for part in ("optimizer", "adapters"))
    checkpoint = kept if run.trains == "adapter" else 1.5 * kept  # two moments, and the weights
    told = f"checkpoints of {size_told(checkpoint)}, {run.training.keep_checkpoints + 1} at a time"
    yield f"disk: {told}{encoded_told(run, plan)}; {least}"
    if work := plan.flops.get("sample", 0) * run.training.steps * run.training.batch_size:
        rates = ", ".join(f"{time_told(work / rate)} at {rate / 1e12:.0f} TFLOP/s" for rate in RATES)
        besides = "" if any(plan.kept.values()) else ", besides encoding pictures and captions in each"
        yield f"time: {work / 1e15:,.1f} PFLOP in the steps{besides}: {rates}; what the machine gives, the first steps tell"


def traced(run: RunConfig, kind: str, dry: bool = False) -> MemoryPlan:
    """The plan of a run, traced once for all that need the same; in a dry run without asking the Hub for a base whose layout is known."""
    if dry and run.model.base in PUBLISHED:
        run = run.model_copy(update={"model": run.model.model_copy(update={"base": PUBLISHED[run.model.base]})})
    if (key := needed_by(run, kind)) not in planned:
        planned[key] = plan_memory(run, kind)
    return planned[key]


def needed_by(run: RunConfig, kind: str) -> str:
    """What decides what a run needs."""
    leave_out = {"name": True, "output": True, "seed": True, "tracking": True, "data": {"captions"}}
    return f"{kind} {run.model_dump_json(exclude=leave_out)}"


def encoded_told(run: RunConfig, plan: MemoryPlan) -> str:
    """What `data.cache` will keep, where the pictures are there to be counted; else of each thousand."""
    kept = {name: size for name, size in plan.kept.items() if size}
    if not kept:
        return ", and nothing encoded is kept"
    counted = count_samples(run)
    numbers = counted or dict.fromkeys(kept, 1000)
    size = sum(numbers[name] * kept[name] for name in kept)
    return f", and {size_told(size)} for what is encoded{'' if counted else f' of each thousand {chr(32).join(kept)}s'}"


def seconds_left(run: RunConfig, step: int) -> str:
    """How long the steps that are left will take, by those that were timed; "" where none was."""
    timing = run.output / "timing.json"
    told = json.loads(timing.read_text()) if timing.exists() else {}
    if not told.get("timed") or step >= run.training.steps:
        return ""
    return f", and takes about {time_told((run.training.steps - step) * told['seconds'] / told['timed'])} more"


def begins_anew(job: Job) -> bool:
    """Whether the newest checkpoint of the run's folder is of another run: of other settings, pictures or captions, or of more steps."""
    run = job.run
    last = newest(run.output / "checkpoints", with_meta)
    if last is None:
        return False
    meta, processed = read_meta(last), job.given.get("process")
    other_data = processed is not None and run.prior is None and meta["data"] != processed["digests"][0]
    return other_data or meta["digest"] != digest_of(run) or meta["step"] > run.training.steps


def do(job: Job) -> Any:
    run = within_budget(job)
    anew = begins_anew(job)
    device = choose_device()
    plan = planned.get(needed_by(job.run, device.type))
    fits = plan is not None and needed_bytes(plan) <= available_bytes(device)
    begun = not anew and list_checkpoints(run.output / "checkpoints")  # which has shown that it fits
    if not (fits or begun):
        check_fit(run, device)
    with open_tracker(run, job.results) as tracker:
        result = train(run, tracker, NEVER if anew else LATEST)
    save_run(job.run, run.output / "run.yaml")  # with the budget that the file says
    return {
        "weights": weights_digest(job.run),
        "steps": run.training.steps,
        "held_out_loss": result.metrics.get("held_out_loss"),
    }


def within_budget(job: Job) -> RunConfig:
    """The run with what is left of its budget, which is one for all that this process does."""
    if job.seconds_left is None:
        return job.run
    left = f"{max(1, int(job.seconds_left))}s"
    return job.run.model_copy(update={"training": job.run.training.model_copy(update={"time_budget": left})})


def weights_digest(run: RunConfig) -> str | None:
    file: Path | None = trained_file(run)
    return None if file is None else file_digest(file)
