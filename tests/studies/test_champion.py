"""Adapters in MLflow's registry: loaded back by URI in another process, and the champion of a study."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from t2ilib.models.pipeline import build_pipeline
from t2ilib.runfile import build_run
from t2ilib.shapes import checker
from t2ilib.studies.champion import ALIAS, choose_winner, register_champion
from t2ilib.studies.runs import StudyRun
from t2ilib.tracking.models import MODEL_TAG
from t2ilib.tracking.store import open_client, tracking_uri
from t2ilib.tracking.tracker import open_tracker
from t2ilib.training.loop import train
from t2ilib.training.validation import HELD_OUT

PROMPT = "a large upright red heart at the center on a white background"

MEASURES = {
    name: asdict(metric)
    for name, metric in {**HELD_OUT, **checker.METRICS}.items()
    if name in ("concept/learned", "base_kept/all", "held_out_loss")
}

LOAD = """
import sys
import mlflow, numpy as np, torch

mlflow.set_tracking_uri(sys.argv[1])
for name, target in zip(sys.argv[2::2], sys.argv[3::2]):
    pipeline = mlflow.diffusers.load_model(name).load_pipeline(device="cpu", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(PROMPT, generator=torch.Generator().manual_seed(3), num_inference_steps=3, guidance_scale=2.0, output_type="np")
    np.save(target, picture.images[0])
    print(mlflow.models.get_model_info(name).signature.params)
"""


def study_run(variant: str, seed: int, folder: Path) -> StudyRun:
    return StudyRun(
        variant, seed, {}, folder, Path("train.ipynb"), {"study": "toy", "preset": "quick", "variant": variant}
    )


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_logged_adapter_comes_back_by_its_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = build_run(
        {
            "output": str(tmp_path / "results" / kind),
            "adapter": {"kind": kind, "rank": 4},
            "optimizer": {"learning_rate": 1e-2},
            "data": {"source": "shapes", "validation_share": 0.25},
            "shapes": {"scenes": ["heart"], "num_pictures": 4, "checked_prompts": 0},
            "training": {"steps": 3, "batch_size": 2},
            "evaluation": {
                "prompts": [PROMPT],
                "num_inference_steps": 2,
                "validation_timesteps": 1,
            },
            "tracking": {"experiment": "registry"},
        }
    )
    with open_tracker(run) as tracker:
        result = train(run, tracker)
    uri = tracking_uri(None, run.output.parent)
    client = MlflowClient(uri)
    (run.output / "result.json").write_text(
        json.dumps({"mlflow_run_id": tracker.run_id, "metrics": {"held_out_loss": 0.5}, "measures": MEASURES})
    )
    model = client.get_run(tracker.run_id).data.tags[MODEL_TAG]
    logged = client.get_logged_model(model.removeprefix("models:/"))
    assert logged.experiment_id == client.get_run(tracker.run_id).info.experiment_id
    assert Path(logged.artifact_location.removeprefix("file://")).is_relative_to(run.output.parent)
    winner, champion = register_champion(client, "registry", [study_run(kind, 0, run.output)])
    register_champion(client, "registry", [study_run(kind, 0, run.output)])
    assert winner.variant == kind
    assert champion == f"models:/registry@{ALIAS}"
    assert len(client.search_model_versions("name = 'registry'")) == 1
    assert "MLFLOW_TRACKING_URI" not in os.environ
    targets = {name: str(tmp_path / f"{number}.npy") for number, name in enumerate((model, champion))}
    words = [word for pair in targets.items() for word in pair]
    code = LOAD.replace("PROMPT", repr(PROMPT))
    done = subprocess.run([sys.executable, "-c", code, uri, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("'height': integer (default: 64)") == 2

    pipeline = build_pipeline(result.components)
    for module in result.components.modules().values():
        module.eval()
    ours = pipeline(
        PROMPT, generator=torch.Generator().manual_seed(3), num_inference_steps=3, guidance_scale=2.0, output_type="np"
    )
    for target in targets.values():
        assert np.abs(np.load(target) - ours.images[0]).max() < 2e-3


def finished(folder: Path, variant: str, seed: int, **metrics: float) -> StudyRun:
    run = study_run(variant, seed, folder / variant / str(seed))
    run.folder.mkdir(parents=True)
    names = {"learned": "concept/learned", "kept": "base_kept/all", "loss": "held_out_loss"}
    values = {names[name]: value for name, value in metrics.items()}
    (run.folder / "result.json").write_text(json.dumps({"mlflow_run_id": "x", "metrics": values, "measures": MEASURES}))
    return run


def test_the_winner_is_the_best_variant_by_its_mean_then_its_best_seed(tmp_path: Path) -> None:
    runs = [
        finished(tmp_path, "lucky", 0, learned=0.9, kept=0.5, loss=0.1),
        finished(tmp_path, "lucky", 1, learned=0.1, kept=0.5, loss=0.1),
        finished(tmp_path, "steady", 0, learned=0.6, kept=0.5, loss=0.2),
        finished(tmp_path, "steady", 1, learned=0.7, kept=0.5, loss=0.3),
    ]
    assert choose_winner(runs).label == "steady seed 1"
    assert choose_winner([]) is None


def test_without_known_concepts_the_held_out_loss_decides(tmp_path: Path) -> None:
    runs = [finished(tmp_path, "a", 0, loss=0.3), finished(tmp_path, "b", 0, loss=0.2)]
    assert choose_winner(runs).variant == "b"


def test_runs_of_another_store_name_no_champion(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    client, _ = open_client(tracking_uri(None, tmp_path), "other", tmp_path)
    assert register_champion(client, "other-quick", [finished(tmp_path, "a", 0, loss=0.3)]) is None
    assert "logged to another store" in caplog.text
