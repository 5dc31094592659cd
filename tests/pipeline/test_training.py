"""The step `train`: what is told of a run before it starts, where it begins, and what is left of its time."""

from pathlib import Path

import pytest
import torch

from t2ilib.config import ConfigError, RunConfig
from t2ilib.pipeline import training
from t2ilib.pipeline.file import PipelineConfig
from t2ilib.pipeline.job import Job, Options, size_told, time_told
from t2ilib.planning.trace import MemoryPlan
from t2ilib.runfile import build_run
from t2ilib.training.checkpoint import Checkpoint, save_checkpoint
from t2ilib.training.resume import digest_of

GIB = 2**30


def make_run(output: Path, **changes) -> RunConfig:
    section = {"steps": 100, "batch_size": 2} | changes.pop("training", {})
    return build_run(
        {"output": str(output), "adapter": {}, "model": {"base": "tiny-sd15"}, "training": section} | changes
    )


def job_of(run: RunConfig, given: dict | None = None, left: float | None = None, **options) -> Job:
    config = PipelineConfig(output=run.output.parent, steps=("train",), run={})
    return Job(config, Options(**options), {"run": run}, "run", given or {}, left)


@pytest.fixture
def large(monkeypatch) -> list[str]:
    """No run is tiny, each needs 9 GiB, and this machine has 20; what was traced, by its base and for which device."""
    traced = []

    def plan(run: RunConfig, kind: str) -> MemoryPlan:
        traced.append(f"{run.model.base} {kind}")
        phases = {
            "training": {"adapters": 10**7, "optimizer": 2 * 10**7, "activations": 9 * GIB},
            "drawing": {"weights": 4 * GIB},
        }
        return MemoryPlan(phases, kind, 1.0, {"picture": 32_000, "caption": 0}, {"sample": 2e12})

    monkeypatch.setattr(training, "surely_fits", lambda run, available: False)
    monkeypatch.setattr(training, "available_bytes", lambda device: 20 * GIB)
    monkeypatch.setattr(training, "plan_memory", plan)
    monkeypatch.setattr(training, "planned", {})
    return traced


def test_what_a_run_needs_is_told(large, tmp_path: Path) -> None:
    lines = list(training.needs(job_of(make_run(tmp_path / "run"))))
    assert lines == [
        f"lora of rank 8 on tiny-sd15, 100 steps of 2 at 64 pixels, into {tmp_path / 'run'}",
        "memory: 9.5 GiB on cpu while training (cards of 11, 12, 15, 16, 24, 40, 80, 141 GB hold it; 20.0 free here)",
        "disk: checkpoints of 30.0 MB, 3 at a time, and 32.0 MB for what is encoded of each thousand pictures; 256 MiB stay free",
        "time: 0.4 PFLOP in the steps: 40 s at 10 TFLOP/s, 4 s at 100 TFLOP/s; what the machine gives, the first steps tell",
    ]


def test_it_is_traced_once_for_all_that_need_the_same(large, tmp_path: Path) -> None:
    for name, captions, seed in (("a", [], 0), ("b", ["lower"], 1)):
        list(training.needs(job_of(make_run(tmp_path / name, data={"captions": captions}, seed=seed))))
    assert large == ["tiny-sd15 cpu"]
    list(training.needs(job_of(make_run(tmp_path / "c", adapter={"rank": 9}))))
    assert len(large) == 2


def test_a_dry_run_traces_a_published_base_by_its_layout_for_a_gpu(large, tmp_path: Path) -> None:
    for base in ("stabilityai/stable-diffusion-xl-base-1.0", "someone/else"):
        list(training.needs(job_of(make_run(tmp_path / "run", model={"base": base}), dry=True)))
    assert large == ["sdxl cuda", "someone/else cuda"]


def test_what_cannot_be_foreseen_is_no_reason_to_stop(large, tmp_path: Path, monkeypatch) -> None:
    def fail(run: RunConfig, kind: str) -> MemoryPlan:
        raise ConfigError("the Hub cannot be reached")

    monkeypatch.setattr(training, "plan_memory", fail)
    lines = list(training.needs(job_of(make_run(tmp_path / "run"), dry=True)))
    assert lines[-1] == "memory: not known here (ConfigError: the Hub cannot be reached)"


def test_of_a_tiny_run_nothing_is_traced(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(training, "plan_memory", lambda *told: pytest.fail("it was traced"))
    assert "memory: under 0." in " ".join(training.needs(job_of(make_run(tmp_path / "run"))))


def kept(run: RunConfig, step: int, data: str = "d", other: RunConfig | None = None) -> None:
    tensors = {"weights": {"a": torch.zeros(3)}, "optimizer": {}}
    meta = {"digest": digest_of(other or run), "data": data}
    save_checkpoint(run.output / "checkpoints", Checkpoint(step, tensors, meta), 9)


def test_it_goes_on_from_its_checkpoint_and_says_for_how_long(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    kept(run, 40)
    (run.output / "timing.json").write_text('{"seconds": 80.0, "timed": 40}')
    lines = list(training.needs(job_of(run, {"process": {"digests": ["d", "h"]}})))
    assert lines[1] == "goes on from step 40, and takes about 2 min 00 s more"


def test_it_begins_anew_where_the_checkpoint_is_of_another_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert not training.begins_anew(job_of(run))
    kept(run, 40)
    assert not training.begins_anew(job_of(run))
    assert not training.begins_anew(job_of(make_run(tmp_path / "run", training={"steps": 200, "time_budget": "1h"})))
    assert training.begins_anew(job_of(run, {"process": {"digests": ["other pictures", "h"]}}))
    assert training.begins_anew(job_of(make_run(tmp_path / "run", training={"steps": 30})))
    other = make_run(tmp_path / "run", optimizer={"learning_rate": 0.5})
    assert training.begins_anew(job_of(other))
    assert "is of another run, and is set aside there" in list(training.needs(job_of(other)))[1]


def test_the_budget_of_a_run_is_what_the_command_has_left(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", training={"time_budget": "1h"})
    assert training.within_budget(job_of(run, left=95.7)).training.time_budget == "95s"
    assert training.within_budget(job_of(run, left=0.2)).training.time_budget == "1s"
    assert training.within_budget(job_of(make_run(tmp_path / "run"))).training.time_budget is None


@pytest.mark.parametrize(
    ("seconds", "told"), [(5, "5 s"), (65, "1 min 05 s"), (3599.6, "1 h 00 min"), (45296, "12 h 34 min")]
)
def test_times_in_words(seconds: float, told: str) -> None:
    assert time_told(seconds) == told


@pytest.mark.parametrize(("size", "told"), [(19_336_861_798, "19.3 GB"), (815_585_330, "815.6 MB"), (4_200, "4 kB")])
def test_sizes_in_words(size: int, told: str) -> None:
    assert size_told(size) == told
