"""The whole way, for real and small: a data set from a server here, captions, an adapter of each variant on the tiny SD1.5, measures, pictures;
killed in each step, changed, drawn again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from coco_shaped import write_coco
from PIL import Image
from typer.testing import CliRunner

from t2ilib.cli import app
from t2ilib.config import RunConfig
from t2ilib.pipeline import training
from t2ilib.planning.trace import MemoryPlan
from t2ilib.runfile import load_run
from t2ilib.training.checkpoint import list_checkpoints
from t2ilib.training.history import read_rows

STEPS = ["download", "process", "train", "measure", "draw"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_in_each_step_it_ends_as_one_that_was_not(tmp_path: Path) -> None:
    """A kill in a step leaves the marks of those before it; what was begun is gone on with; and no byte of the end is another."""
    done = subprocess.run(
        [sys.executable, Path(__file__).parents[1] / "pipeline_killing.py", tmp_path],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    said = (tmp_path / "killed" / "output.txt").read_text() if (tmp_path / "killed" / "output.txt").exists() else ""
    what = f"{done.stdout}{done.stderr[-3000:]}{said[-3000:]}"
    assert done.returncode == 0, what
    found = [json.loads(line) for line in done.stdout.splitlines()]
    expected = [[step, -9, sorted(STEPS[:number])] for number, step in enumerate(STEPS)]
    assert found == [
        ["straight", 0, sorted(STEPS)],
        *expected,
        ["mark", -9, sorted(STEPS[:4])],
        ["end", 0, sorted(STEPS)],
    ], what
    straight, killed = tmp_path / "straight" / "out", tmp_path / "killed" / "out"
    assert "resumed from step 2" in (killed / "run" / "run.log").read_text()
    files = [
        *(
            "run/captions.csv",
            "pictures/base/00.png",
            "pictures/run/01.png",
        ),
        *(f"run/checkpoints/step-000004/{name}.safetensors" for name in ("weights", "optimizer")),
    ]
    for file in files:
        assert (killed / file).read_bytes() == (straight / file).read_bytes(), file
    assert not [path for path in killed.rglob("*") if ".part" in path.name or ".saving" in path.name]
    assert not list((tmp_path / "killed" / "coco").rglob("*.part*"))


@pytest.fixture(scope="module")
def gone_through(tmp_path_factory) -> Path:
    """A pipeline file that was gone through once, with two variants, logged to MLflow."""
    folder = tmp_path_factory.mktemp("pipeline")
    write_coco(folder / "served")
    values = {
        "output": str(folder / "results" / "out"),
        "download": {"folder": str(folder / "coco"), "server": str(folder / "served"), "keep_zips": False},
        "run": {
            "model": {"base": "tiny-sd15"},
            "adapter": {"rank": 2},
            "data": {"validation_split": "val", "max_rejected": 0.5},
            "training": {"steps": 4, "batch_size": 2, "checkpoint_every": 2, "keep_checkpoints": 2},
            "evaluation": {"validate_every": 0, "validation_timesteps": 1, "sample_every": 0, "num_inference_steps": 1}
            | {"prompts": ["a dog", "a cat"], "animation": "none"},
            "tracking": {"experiment": "pipeline"},
        },
        "variants": {"with": {}, "without": {"data": {"captions": ["drop_adverbs"]}}},
    }
    file = folder / "pipeline.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        told = invoke(file)
    (folder / "told.txt").write_text(told)
    return file


def invoke(file: Path, *words: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["pipeline", str(file), *words])
    assert done.exit_code == code, (done.output, done.exception)
    return done.output


def output_of(file: Path) -> Path:
    return Path(yaml.safe_load(file.read_text())["output"])


def test_what_is_there_in_the_end(gone_through: Path) -> None:
    output = output_of(gone_through)
    assert (output / "with" / "captions.csv").read_text() != (output / "without" / "captions.csv").read_text()
    for name, changed in (("with", 0), ("without", 5 * 15)):
        assert json.loads((output / name / "captions.json").read_text())["changed"] == changed
        metrics = json.loads((output / name / "metrics.json").read_text())
        assert {"held_out_loss", "clip_score/prompts", "loss"} <= metrics.keys()
        assert load_run(output / name / "run.yaml").data.captions == (("drop_adverbs",) if name == "without" else ())
    drawn = [
        [(output / "pictures" / by / f"{n:02d}.png").read_bytes() for n in (0, 1)] for by in ("base", "with", "without")
    ]
    assert len({picture for row in drawn for picture in row}) == 6
    assert Image.open(output / "pictures" / "grid.png").width > 256
    told = (gone_through.parent / "told.txt").read_text()
    assert "clip_score/prompts" in told
    assert not list((gone_through.parent / "coco").glob("*.zip"))
    log = (output / "pipeline.log").read_text()
    assert "to fetch" not in log, "only the server of one's own knows"
    assert "memory at after_download: process" in log


def test_mlflow_has_the_readings_of_every_step_and_the_grid(gone_through: Path) -> None:
    from mlflow import MlflowClient

    note = json.loads((output_of(gone_through) / "without" / "tracking.json").read_text())
    assert note["uri"].endswith("results/mlflow.db")
    client = MlflowClient(note["uri"])
    run = client.get_run(note["run_id"])
    moments = {name.split("/")[1] for name in run.data.metrics if name.startswith("memory/") and name.count("/") == 2}
    assert {f"{when}_{step}" for when in ("before", "after") for step in STEPS} <= moments
    assert run.info.status == "FINISHED"
    assert [artifact.path for artifact in client.list_artifacts(note["run_id"], "drawn")] == ["drawn/grid.png"]


def test_what_is_drawn_is_what_generate_draws_of_the_same_noise(gone_through: Path) -> None:
    """By other code: the adapter's file, loaded by diffusers' own function."""
    import numpy as np
    from diffusers import DiffusionPipeline

    from t2ilib.models.files.locate import SHIPPED
    from t2ilib.seeds import generator_for

    run = load_run(output_of(gone_through) / "without" / "run.yaml")
    pipeline = DiffusionPipeline.from_pretrained(SHIPPED["tiny-sd15"], safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(run.output / "adapter")
    ours = np.asarray(Image.open(output_of(gone_through) / "pictures" / "without" / "01.png"), int)
    settings = {"num_inference_steps": 1, "guidance_scale": run.evaluation.guidance_scale, "height": 64, "width": 64}
    theirs = pipeline(["a cat"], generator=[generator_for(0, "picture", 1)], **settings).images[0]
    assert abs(ours - np.asarray(theirs, int)).max() <= 2


def test_it_draws_again_of_another_checkpoint_and_other_prompts(gone_through: Path) -> None:
    output = output_of(gone_through)
    before = (output / "pictures" / "with" / "00.png").read_bytes()
    invoke(gone_through, "--only", "draw", "--checkpoint", "2", "--prompt", "a dog")
    assert sorted(path.name for path in (output / "pictures" / "with").iterdir()) == ["00.png"]
    assert (output / "pictures" / "with" / "00.png").read_bytes() != before, "half as many steps"
    assert "has no checkpoint of step 3; there are 2, 4" in invoke(
        gone_through, "--only", "draw", "--checkpoint", "3", code=2
    )
    invoke(gone_through, "--from", "draw")
    assert (output / "pictures" / "with" / "00.png").read_bytes() == before


def test_a_variant_that_has_changed_begins_anew_beside_what_was(gone_through: Path) -> None:
    output = output_of(gone_through)
    other = (output / "with" / "adapter" / "pytorch_lora_weights.safetensors").stat().st_mtime_ns
    invoke(gone_through, "--set", "variants.without.optimizer.learning_rate=5e-4")
    assert (output / "without" / "earlier-1" / "checkpoints").is_dir()
    rows = [row for row in read_rows(output / "without" / "metrics.jsonl") if "learning_rate/unet" in row]
    assert {row["learning_rate/unet"] for row in rows} == {5e-4}
    assert (output / "with" / "adapter" / "pytorch_lora_weights.safetensors").stat().st_mtime_ns == other


def test_more_steps_go_on_from_those_that_were(gone_through: Path) -> None:
    output = output_of(gone_through)
    invoke(gone_through, "--set", "run.training.steps=6", "--only", "train")
    assert "resumed from step 4" in (output / "with" / "run.log").read_text()
    assert [path.name for path in list_checkpoints(output / "with" / "checkpoints")][-1] == "step-000006"
    assert not (output / "with" / "earlier-1").exists()


def test_without_anything_trained_there_is_nothing_to_measure(gone_through: Path, tmp_path: Path) -> None:
    text = invoke(gone_through, "--only", "measure", "--set", f"output={tmp_path / 'other'}", code=2)
    assert "holds nothing that was trained to its end: run the step train first" in " ".join(text.split())


def test_a_dry_run_says_what_is_needed_and_touches_nothing(tmp_path: Path, monkeypatch) -> None:
    """Of COCO itself, and a run that is not tiny, planned by its layout (what a plan is, is tested elsewhere): nobody is asked."""
    import requests

    def plan(run: RunConfig, kind: str) -> MemoryPlan:
        assert (run.model.base, kind) == ("sd15", "cuda")
        phases = {"training": {"weights": 2**31}, "drawing": {"weights": 2**30}}
        return MemoryPlan(phases, kind, 1.0, {"picture": 0, "caption": 0}, {"sample": 2e12})

    monkeypatch.setattr(training, "plan_memory", plan)
    monkeypatch.setattr(requests.Session, "send", lambda *told, **named: pytest.fail("somebody was asked"))
    file = Path(__file__).parents[2] / "experiments" / "coco-adverbs.yaml"
    monkeypatch.chdir(tmp_path)
    text = invoke(file, "--dry-run")
    assert "to fetch: 20.4 GB" in text
    assert "memory: 2.6 GiB on cuda while training" in text
    assert "80.0 PFLOP in the steps, besides encoding" in text
    assert "[8/8] draw:" in text
    assert list(tmp_path.iterdir()) == []
