"""Which adapters MLflow's loader would draw otherwise than they were trained: told, and not logged as models."""

import re
from pathlib import Path

import pytest
from mlflow import MlflowClient

from t2ilib.models.files.locate import SHIPPED
from t2ilib.runfile import build_run
from t2ilib.tracking.models import MODEL_TAG, NO_MODEL, why_unloadable
from t2ilib.tracking.store import tracking_uri
from t2ilib.tracking.tracker import open_tracker

TINY = str(SHIPPED["tiny-sdxl"])


@pytest.mark.parametrize(
    ("changes", "base", "reason"),
    [
        ({}, TINY, ""),
        ({"adapter": {"kind": "dora"}}, TINY, ""),
        ({"adapter": {"text_encoder_targets": "many"}}, TINY, ""),
        ({"model": {"quantization": "nf4"}}, TINY, ""),
        ({"objective": {"name": "v_prediction", "beta_schedule": "scaled_linear"}}, TINY, ""),
        ({}, "owner/model", ""),
        ({"adapter": {"kind": "dora", "text_encoder_targets": "many"}}, TINY, "what DoRA learned on text encoders"),
        ({"adapter": {"tokens": {"<cat>": "cat"}}}, TINY, "no new words"),
        ({"model": {"base": "tiny-sd15", "clip_skip": 1}}, TINY, "model.clip_skip"),
        ({"model": {"vae": "tiny-sdxl"}}, TINY, "model.vae"),
        ({"objective": {"name": "epsilon"}}, TINY, r"other noise than the run's \(prediction_type epsilon\)"),
        ({"objective": {"beta_schedule": "linear"}}, "owner/model", "beta_schedule linear"),
        ({}, __file__, "no base from a single file"),
    ],
)
def test_what_the_loader_would_draw_otherwise_is_told(changes: dict, base: str, reason: str) -> None:

    found = why_unloadable(build_run({"adapter": {}} | changes), base)
    assert re.search(reason, found) if reason else not found


def test_such_an_adapter_is_no_model_and_its_run_says_why(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    adapter = {"kind": "dora", "text_encoder_targets": "many"}
    run = build_run({"output": str(tmp_path / "run"), "adapter": adapter, "tracking": {"experiment": "tests"}})
    with open_tracker(run) as tracker:
        tracker.log_adapter(tmp_path / "adapter.safetensors", TINY, 64)
    tags = MlflowClient(tracking_uri(None, tmp_path)).get_run(tracker.run_id).data.tags
    assert "what DoRA learned on text encoders" in tags[NO_MODEL]
    assert MODEL_TAG not in tags
    assert "the adapter is not logged as an MLflow model: diffusers' loader leaves out" in caplog.text
