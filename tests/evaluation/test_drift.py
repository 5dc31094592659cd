"""Drift: none of the base from itself; everything where a picture is no more like its own than others are."""

import numpy as np
import pytest
from own_pictures import context_of, plain, run_on, ten

from t2ilib.evaluation.drift import drift, lacks

__all__ = ["ten"]
BASE = [plain(255, 0, 0), plain(0, 255, 0), plain(0, 0, 255)]
PROMPTS = ("red", "green", "blue")


def measured(pictures, prompts=PROMPTS, base=BASE, group="unrelated"):
    return drift(pictures, prompts, context_of(group, base={tuple(prompts): base}))


def test_the_base_has_kept_everything() -> None:
    found = measured(BASE)
    assert found["kept/colours"] == pytest.approx([1, 1, 1])
    assert found["drift/colours"] == pytest.approx([0, 0, 0])
    assert found["drift/pixels"] == [0, 0, 0]


def test_pictures_of_other_prompts_have_kept_nothing() -> None:
    found = measured([BASE[1], BASE[2], BASE[0]])
    assert np.mean(found["kept/colours"]) == pytest.approx(0)
    assert found["drift/pixels"] == pytest.approx([np.sqrt(2 / 3)] * 3)
    partly = measured([BASE[0], BASE[2], plain(0, 64, 255)])["kept/colours"]
    assert partly[0] == pytest.approx(1)
    assert 0 < partly[2] < 1


def test_of_one_prompt_drift_is_measured_and_nothing_is_said_of_what_is_kept() -> None:
    assert measured(BASE, ("x",) * 3).keys() == {"drift/pixels", "drift/colours"}
    assert measured(BASE, group="captions") == {}


def test_why_a_run_cannot_be_measured(ten) -> None:
    assert lacks(run_on(ten)) is None
    assert lacks(run_on(ten, data={"validation_share": 0.0})) is None, "it needs no real pictures"
    assert (
        lacks(run_on(ten, evaluation={"prompt_groups": {"captions": ["a"]}}))
        == "name evaluation.prompt_groups.unrelated"
    )
