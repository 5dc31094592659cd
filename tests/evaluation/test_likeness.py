"""Likeness: 0 for the base, 1 for the real pictures themselves, flagged above what real pictures have; and diversity of equal numbers."""

import numpy as np
import pytest
from own_pictures import context_of, plain, run_on, shades, ten

from t2ilib.evaluation.closeness import vendi_score
from t2ilib.evaluation.likeness import DIVERSITY_OF_GROUPS, LIKENESS, diversity, lacks, likeness, over_subsets
from t2ilib.evaluation.metrics import flagged
from t2ilib.evaluation.references import Real

__all__ = ["ten"]
HELD_OUT = Real([plain(255, 0, 0), plain(0, 255, 0)], [("red", "crimson"), ("green",)])
TRAINING = Real(shades(12, 0), [("a shade",)] * 12)
PROMPTS = ("red", "a shade", "green")
BASE = [plain(0, 0, 255)] * 3


def measured(pictures, group="captions", prompts=PROMPTS, base=BASE, training=TRAINING, held_out=HELD_OUT):
    return likeness(pictures, prompts, context_of(group, real=(training, held_out), base={tuple(prompts): base}))


def test_learned_is_the_way_from_the_bases_picture_to_the_real_one() -> None:
    assert measured(BASE)["learned/colours"] == [pytest.approx(0), None, pytest.approx(0)]
    real = [plain(255, 0, 0), plain(9, 9, 9), plain(0, 255, 0)]
    assert measured(real)["learned/colours"] == [pytest.approx(1), None, pytest.approx(1)]
    swapped = [plain(0, 255, 0), plain(9, 9, 9), plain(255, 0, 0)]
    assert measured(swapped)["learned/colours"][0] == pytest.approx(0, abs=0.01), (
        "the right pictures for the wrong prompts"
    )
    between = measured([plain(255, 0, 255), *real[1:]])["learned/colours"][0]
    assert 0 < between < 1


def test_other_captions_of_a_picture_ask_for_it_too_and_of_one_caption_all_count() -> None:
    assert measured([plain(255, 0, 0)], prompts=("crimson",), base=BASE[:1])["learned/colours"] == [pytest.approx(1)]
    assert measured([plain(255, 0, 0)], prompts=("crimson\n ",), base=BASE[:1])["learned/colours"] == [pytest.approx(1)]
    alike = Real(HELD_OUT.pictures, [("it",), ("it",)])
    (share,) = measured([plain(255, 0, 0)], prompts=("it",), base=BASE[:1], held_out=alike)["learned/colours"]
    cosine = float(np.array([127, -128, -128]) @ [-128, 127, -128] / (127**2 + 2 * 128**2))
    assert share == pytest.approx(((1 + cosine) / 2 - cosine) / (1 - cosine))


def test_the_base_is_the_floor_and_the_training_pictures_are_the_ceiling() -> None:
    real = Real(shades(40, 1), [("a shade",)] * 40)
    found = measured(list(TRAINING.pictures), prompts=["x"] * 12, base=[plain(0, 0, 255)] * 12, held_out=real)
    assert np.mean(found["likeness/captions/colours"]) == pytest.approx(found["likeness/captions/colours/real"])
    assert found["centroid_distance/captions/colours"] == pytest.approx(
        found["centroid_distance/captions/colours/real"]
    )
    assert "learned/colours" not in found, "no prompt is a held-out caption"
    of_base = measured([plain(0, 0, 255)] * 12, prompts=["x"] * 12, base=[plain(0, 0, 255)] * 12, held_out=real)
    assert np.mean(of_base["likeness/captions/colours"]) == pytest.approx(of_base["likeness/captions/colours/base"])
    assert of_base["centroid_distance/captions/colours"] > found["centroid_distance/captions/colours"]


def test_what_is_more_typical_than_real_pictures_is_flagged() -> None:
    real = Real(shades(40, 1), [("a shade",)] * 40)
    declared = LIKENESS.declared("contexts", run_on_colours())
    for pictures, expected in ((shades(16, 2), False), ([plain(200, 60, 60)] * 16, True)):
        found = measured(pictures, "contexts", ["x"] * 16, [plain(0, 0, 255)] * 16, held_out=real)
        values = {name: float(np.mean(value)) for name, value in found.items()}
        assert bool(flagged(values, declared)) == expected


def run_on_colours():
    from t2ilib.runfile import build_run

    return build_run({"adapter": {}, "evaluation": {"embedding_models": ["owner/colours"]}})


def test_of_other_groups_nothing_is_said() -> None:
    assert measured(BASE, group="unrelated") == {}


def test_distributions_are_compared_only_where_there_are_enough() -> None:
    many = Real(shades(100, 3), [("a shade",)] * 100)
    enough = measured(shades(100, 4), "contexts", ["x"] * 100, [plain(0, 0, 255)] * 100, held_out=many)
    assert "mmd/contexts/colours" in enough
    assert "mmd/contexts/colours" not in measured(
        shades(99, 4), "contexts", ["x"] * 99, [plain(0, 0, 255)] * 99, held_out=many
    )


def test_diversity_is_of_as_many_pictures_of_each_kind() -> None:
    pictures, base = shades(16, 5), [plain(0, 0, 255)] * 16
    found = diversity(pictures, ["x"] * 16, context_of("trigger", real=(TRAINING, HELD_OUT), base={("x",) * 16: base}))
    name = "diversity/trigger/colours"
    assert found[f"{name}/base"] == pytest.approx(1)
    assert found[f"{name}/real"] == pytest.approx(vendi_score(context_of("").shared["embedders"][0](TRAINING.pictures)))
    assert 1 < found[name] < 12
    assert over_subsets(len, np.zeros((16, 2)), 12) == 12
    one = Real(TRAINING.pictures[:1], TRAINING.captions[:1])
    assert diversity(pictures, ["x"] * 16, context_of("trigger", real=(one, HELD_OUT), base={("x",) * 16: base})) == {}


def test_why_a_run_cannot_be_measured(ten) -> None:
    assert lacks(run_on(ten)) is None
    assert lacks(run_on(ten, evaluation={"prompt_groups": None})) == "name evaluation.prompt_groups"
    only_unrelated = {"prompt_groups": {"unrelated": ["a"]}}
    assert lacks(run_on(ten, evaluation=only_unrelated)) == "name evaluation.prompt_groups"
    assert "set evaluation.embedding_models" in lacks(run_on(ten, model={"base": "owner/name"}))
    assert "no pictures are held out" in lacks(run_on(ten, data={"validation_share": 0.0}))


def test_declarations_name_the_models_of_the_run_the_first_first(ten) -> None:
    run = run_on(ten, evaluation={"embedding_models": ["owner/dino", "owner/clip"]})
    declared = LIKENESS.declared("captions", run)
    assert [name for name, metric in declared.items() if metric.role] == ["learned/dino", "learned/clip"]
    assert declared["likeness/captions/dino"].ceiling == "likeness/captions/dino/most"
    assert declared["likeness/captions/dino"].title == "likeness in captions, by dino"
    assert not [name for name in DIVERSITY_OF_GROUPS.declared("styles", run) if "{" in name]
