"""Pictures in MLflow: a finished run with the files and the settings."""

import pytest
from mlflow import MlflowClient
from PIL import Image

from t2ilib.config import ConfigError
from t2ilib.tracking.pictures import log_pictures
from t2ilib.tracking.store import tracking_uri


def test_files_and_settings_are_a_runs(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    files = [tmp_path / f"{name}.png" for name in "ab"]
    for file in files:
        Image.new("RGB", (4, 4)).save(file)
    settings = {"prompt": "x" * 10_000, "adapters": [{"path": "cat"}], **{f"f{i}": i for i in range(120)}}
    run_id = log_pictures("looking", files, settings, tmp_path / "results", name="grid-00")
    client = MlflowClient(tracking_uri(None, tmp_path / "results"))
    run = client.get_run(run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "grid-00")
    assert (run.data.params["adapters"], len(run.data.params)) == ("[{'path': 'cat'}]", 122)
    assert [item.path for item in client.list_artifacts(run_id, "drawn")] == ["drawn/a.png", "drawn/b.png"]
    client.delete_experiment(run.info.experiment_id)
    with pytest.raises(ConfigError, match="was deleted"):
        log_pictures("looking", files, {}, tmp_path / "results")
