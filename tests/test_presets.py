"""Settings for the GPUs that people are lent: each is a whole run, and its trace fits its card."""

from functools import cache

import pytest
import yaml

from t2ilib.config import ConfigError
from t2ilib.config.section import seconds_in
from t2ilib.memory import GIB
from t2ilib.planning.fit import needed_bytes
from t2ilib.planning.trace import plan_memory
from t2ilib.presets import CARDS_GIB, PRESETS, preset, preset_file
from t2ilib.runfile import build_run, load_run, merge, save_run

HOURS = {"t4": 12, "p100": 12, "l4": 24}
"""The longest session that is to be had, of Kaggle's and Colab's cards."""


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_run_and_leaves_pictures_and_place_to_a_notebook(name: str) -> None:
    run = load_run(preset_file(name))
    card, model = name.split("-")
    half = {"t4": "float16", "p100": "float16", "l4": "bfloat16"}[card]
    assert run.model.dtype == half, "a T4 and a P100 have no bf16"
    assert run.training.mixed_precision == {"float16": "fp16", "bfloat16": "bf16"}[half]
    assert run.data.resolution == {"sdxl": 1024, "sd15": 512}[model]
    assert 0 < seconds_in(run.training.time_budget) < 3600 * HOURS[card]
    own = {"output": "mine", "data": {"source": "folder", "path": "pictures"}, "adapter": {"rank": 4}, "seed": 7}
    laid = build_run(merge(own, preset(name)))
    assert (str(laid.output), laid.data.path, laid.seed) == ("mine", "pictures", 7)
    assert laid.model_copy(update={"output": run.output, "name": run.name, "seed": 0, "data": run.data}) == run


def test_no_preset_changes_nothing_and_a_wrong_name_is_told() -> None:
    assert preset(None) == {}
    with pytest.raises(ConfigError, match="t4-sdxl"):
        preset("t4")


@cache
def traced(settings: str) -> int:
    return needed_bytes(plan_memory(build_run(yaml.safe_load(settings)), "cuda"))


@pytest.mark.parametrize("name", PRESETS)
def test_the_trace_of_a_preset_fits_its_card(name: str, tmp_path) -> None:
    """Traced once where two presets differ by nothing that takes memory: both halves of a float have two bytes."""
    run = load_run(preset_file(name), [f"model.base={name.split('-')[1]}"])
    alike = {"output": "x", "name": "x", "compute": {"tf32": False}}
    alike |= {"model": run.model.model_dump() | {"dtype": "float16"}}
    timeless = {"mixed_precision": "fp16", "time_budget": None, "checkpoint_every": 1, "steps": 10}
    values = run.model_dump(mode="json") | alike
    values["training"] |= timeless
    save_run(build_run(values), tmp_path / "run.yaml")
    assert traced((tmp_path / "run.yaml").read_text()) < CARDS_GIB[name.split("-")[0]] * GIB
