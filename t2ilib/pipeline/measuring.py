"""The step `measure`: pictures of test prompts, drawn with what was trained and judged, as `t2ilib train` does it at its end."""

from collections.abc import Iterator
from typing import Any

from t2ilib.evaluation.measures import find_measures, measure, prompt_groups
from t2ilib.pipeline.job import Job
from t2ilib.pipeline.trained import load_trained
from t2ilib.tracking.tracker import open_tracker
from t2ilib.training.evaluation import prompts_of
from t2ilib.training.history import METRICS, read_rows

SHOWN = ("held_out_loss", "steps_per_second", "peak_device_mib", "peak_process_mib")


def depends(job: Job) -> Any:
    return job.run.evaluation.model_dump(mode="json")


def made(job: Job) -> bool:
    return (job.run.output / "metrics.json").is_file()


def needs(job: Job) -> Iterator[str]:
    run, measures = job.run, find_measures(job.run)
    drawn = sum(len(asked) for asked, _ in prompt_groups(run, prompts_of(run)).values())
    told = f"{drawn} pictures" if drawn else "pictures of the prompts that training takes from captions"
    yield f"{told}, {run.evaluation.num_inference_steps} sampling steps each, judged by {', '.join(measures) or 'nothing'}"
    yield "memory: as of the step train while drawing"


def do(job: Job) -> Any:
    run = job.run
    components = load_trained(run)
    trained: dict[str, float] = {}
    for row in read_rows(run.output / METRICS):
        trained |= {name: value for name, value in row.items() if name != "step"}
    with open_tracker(run, job.results) as tracker:
        metrics = measure(run, components, tracker, trained, prompts_of(run))
    return {name: value for name, value in metrics.items() if name in SHOWN or name.endswith(("/all", "/prompts"))}
