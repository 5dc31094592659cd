"""A run's numbers as a person reads them."""

import json
from pathlib import Path

import pytest

from t2ilib.config import ConfigError
from t2ilib.evaluation.metrics import PEAKS, Metric, declare
from t2ilib.report.summary import summarize
from t2ilib.shapes.checker import METRICS
from t2ilib.training.history import COSTS
from t2ilib.training.validation import HELD_OUT


def test_what_matters_comes_first_by_its_title_and_the_rest_is_counted(tmp_path: Path) -> None:
    declare(tmp_path, COSTS)
    declare(tmp_path, HELD_OUT)
    declare(tmp_path, {name: METRICS[name] for name in ("concept/all", "base_kept/all", "concept/shape")})
    declare(tmp_path, {"sharpness": Metric("sharpness")})
    values = {
        "sharpness": 3.0, "loss": 0.2, "grad_norm": 1.0, "memory/start/process_mib": 5.0, next(iter(PEAKS)): 7.0, "steps_per_second": 4.026,
        "held_out_loss": 0.12345, "base_kept/all": 0.75, "concept/all": 0.125, "concept/shape": 0.5, "trainable_parameters": 1628160,
    }  # fmt: skip
    (tmp_path / "metrics.json").write_text(json.dumps(values))
    lines = summarize(tmp_path).splitlines()
    assert [line.rsplit("  ", 1)[0].strip() for line in lines[:-1]] == [
        "concept learned", "base kept", "held-out loss", "steps per second", "trainable parameters", "sharpness",
    ]  # fmt: skip
    assert [line.split()[-1] if "%" not in line else line.split()[-2] for line in lines[:-1]] == [
        "12.5", "75.0", "0.1235", "4.03", "1,628,160", "3.00",
    ]  # fmt: skip
    assert lines[-1] == f"5 more in {tmp_path / 'metrics.json'}"


def test_a_run_that_was_not_measured_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no metrics\.json"):
        summarize(tmp_path)
    (tmp_path / "metrics.json").write_text('{"loss": 1.0}')
    assert summarize(tmp_path) == f"1 more in {tmp_path / 'metrics.json'}", (
        "of a run from before, which declared nothing"
    )
