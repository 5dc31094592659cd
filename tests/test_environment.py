"""What runs were made with is recorded, added to where it changes, and keeps runs apart in a report."""

import json
from importlib import metadata

import pytest
from reporting import write_study

from t2ilib.config import ConfigError
from t2ilib.environment import DECIDING, environment_now, note_environment, read_environments, told_differences
from t2ilib.report import load_report


def test_versions_and_device_are_noted_once_and_added_to(tmp_path, monkeypatch) -> None:
    assert read_environments(tmp_path) == []
    note_environment(tmp_path, "cpu")
    note_environment(tmp_path, "cpu")
    (here,) = read_environments(tmp_path)
    assert here == environment_now("cpu")
    assert here["torch"] == metadata.version("torch")
    assert set(here) == {*DECIDING, "device"}
    note_environment(tmp_path, "NVIDIA T4")
    assert [one["device"] for one in read_environments(tmp_path)] == ["cpu", "NVIDIA T4"]
    note_environment(tmp_path, "cpu", anew=True)
    assert read_environments(tmp_path) == [here]


def test_only_what_differs_is_told() -> None:
    old, new = (
        {"torch": "2.12.0", "peft": "0.18", "device": "cpu"},
        {"torch": "2.13.0", "peft": "0.18", "device": "cpu"},
    )
    assert told_differences([[old], [new]]) == ["torch 2.12.0", "torch 2.13.0"]
    assert told_differences([[old], [old, new]]) == ["torch 2.12.0", "torch 2.12.0 and then torch 2.13.0"]


def made_with(folder, name: str, seed: int, **versions) -> None:
    path = folder / name / f"seed{seed}" / "result.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps(result | {"environment": [{"torch": "2.13.0", "device": "cpu"} | versions]}))


def test_runs_of_different_versions_or_devices_share_no_table(tmp_path) -> None:
    folder = write_study(tmp_path / "study", range(2))
    load_report(folder)  # nobody knows what these were made with
    for name in ("base", "lora", "dora", "qlora"):
        for seed in range(2):
            made_with(folder, name, seed)
    assert load_report(folder).runs["lora", 0].environment[0]["torch"] == "2.13.0"
    made_with(folder, "dora", 1, torch="2.14.0")
    with pytest.raises(ConfigError) as told:
        load_report(folder)
    assert "torch 2.14.0: dora (seed 1)" in str(told.value)
    assert "torch 2.13.0: base (seeds 0, 1), lora (seeds 0, 1), dora (seed 0), qlora (seeds 0, 1)" in str(told.value)
    assert "t2ilib study run <study file> --preset quick --only lora --only dora --results" in str(told.value)
    made_with(folder, "dora", 1, device="NVIDIA T4")
    with pytest.raises(ConfigError, match="device NVIDIA T4: dora"):
        load_report(folder)
