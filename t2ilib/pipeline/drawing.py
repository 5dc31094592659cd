"""The step `draw`: the same prompts, from the same noise, by the base and by every variant; as files, and side by side in one grid."""

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

from t2ilib.config import ConfigError
from t2ilib.evaluation.sampling import draw, make_grid, save_pictures, shown_side
from t2ilib.memory import release
from t2ilib.models.load import load_base
from t2ilib.pipeline.job import Job
from t2ilib.pipeline.trained import load_trained
from t2ilib.tracking.tracker import open_tracker
from t2ilib.training.evaluation import prompts_of

log = logging.getLogger(__name__)

FOLDER, GRID, BASE = "pictures", "grid.png", "base"
COLUMNS, LEAST_SIDE, MOST_SIDE = 4, 128, 256


def asked(job: Job) -> Sequence[str]:
    """Of the command, of the file, of the run."""
    return job.options.prompts or job.pipeline.draw.prompts or prompts_of(job.run)


def checkpoint(job: Job) -> int | None:
    return job.options.checkpoint or job.pipeline.draw.checkpoint


def depends(job: Job) -> Any:
    told = job.pipeline.draw
    settings = job.run.evaluation.model_dump(
        mode="json", include={"guidance_scale", "num_inference_steps", "negative_prompt"}
    )
    return [list(asked(job)), checkpoint(job), told.seed, told.base, settings]


def made(job: Job) -> bool:
    return (job.pipeline.output / FOLDER / GRID).is_file()


def by_whom(job: Job) -> list[str]:
    adapters = any(run.trains == "adapter" for run in job.runs.values())
    return [*([BASE] if job.pipeline.draw.base and adapters else []), *job.runs]


def needs(job: Job) -> Iterator[str]:
    step = checkpoint(job)
    number = len(asked(job)) or "as many as training takes from captions"
    when = "" if step is None else f" as they were at step {step}"
    yield f"{number} prompts by {', '.join(by_whom(job))}{when}, into {job.pipeline.output / FOLDER}"
    yield "memory: as of the step train while drawing"


def do(job: Job) -> Any:
    output, prompts, told = job.pipeline.output, list(asked(job)), job.pipeline.draw
    if not prompts:
        raise ConfigError("there is nothing to draw: give --prompt, draw.prompts or run.evaluation.prompts")
    rows: dict[str, list[Image.Image]] = {}
    for name in by_whom(job):
        run = job.runs.get(name, job.run)
        components = load_base(run.model) if name == BASE else load_trained(run, checkpoint(job))
        settings = run.evaluation_of_base if name == BASE else run.evaluation
        rows[name] = draw(components, prompts, settings, told.seed, resolution=run.data.resolution)
        del components
        release()
    draft = output / f".{FOLDER}.part"
    shutil.rmtree(draft, ignore_errors=True)
    for name, pictures in rows.items():
        save_pictures(pictures, draft / name)
    (draft / "prompts.json").write_text(json.dumps(prompts, indent=1, ensure_ascii=False), encoding="utf-8")
    side = shown_side(max(rows[name][0].width for name in rows), LEAST_SIDE, MOST_SIDE)
    make_grid(list(rows.values()), list(rows), prompts, side, COLUMNS).save(draft / GRID)
    shutil.rmtree(output / FOLDER, ignore_errors=True)
    draft.rename(output / FOLDER)
    for run in job.runs.values():
        with open_tracker(run, job.results) as tracker:
            tracker.log_artifact(output / FOLDER / GRID, "drawn")
    log.info("  %s", output / FOLDER / GRID)
    return {"pictures": sum(map(len, rows.values()))}
