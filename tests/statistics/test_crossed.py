"""Seeds crossed with prompts: intervals that hold the truth for new seeds and new prompts, against simulated worlds."""

import numpy as np
import pytest
from scipy import stats

from t2ilib.statistics.crossed import Pairing, cross, pairing, pairing_by_seed
from t2ilib.statistics.pooled import differences

PROMPTS = [("concept", number) for number in range(40)]


def pictures(values: np.ndarray) -> dict[int, dict[tuple[str, int], float]]:
    return {seed: dict(zip(PROMPTS, row, strict=True)) for seed, row in enumerate(values)}


def world(rng, seeds: int, of_seed: float, of_prompt: float, of_both: float, rest: float) -> list[np.ndarray]:
    """Two variants that are the same in truth, (seeds, prompts) each."""
    prompt = of_prompt * rng.normal(size=40)
    return [
        prompt
        + of_seed * rng.normal(size=(seeds, 1))
        + of_both * rng.normal(size=40)
        + rest * rng.normal(size=(seeds, 40))
        for _ in range(2)
    ]


def compared(one: np.ndarray, other: np.ndarray):
    values = {name: dict(enumerate(side.mean(1))) for name, side in (("one", one), ("other", other))}
    (difference,) = differences(values, [("one", "other")])
    return cross(pictures(one), pictures(other), difference)


@pytest.mark.parametrize(
    ("of_seed", "of_prompt", "of_both", "rest"),
    [(1, 5, 0.1, 1), (0.1, 5, 4, 1), (0.5, 5, 3, 3), (0.0, 1, 0.0, 3)],
)
def test_the_interval_holds_the_truth_for_other_seeds_and_prompts(of_seed, of_prompt, of_both, rest) -> None:
    rng = np.random.default_rng(1)
    found = [compared(*world(rng, 4, of_seed, of_prompt, of_both, rest)) for _ in range(400)]
    covered = np.mean([one.low <= 0 <= one.high for one in found])
    assert covered >= 0.95 - 2.5 * np.sqrt(0.05 * 0.95 / 400)
    true = 2 * (of_seed**2 / 4 + of_both**2 / 40 + rest**2 / 160)
    assert np.mean([one.error**2 for one in found]) / true == pytest.approx(1, abs=0.25 if of_both else 0.6)


def test_prompts_alone_are_a_paired_test_over_prompts() -> None:
    """Of variants whose seeds say the same, it is the interval of the mean of differences by prompt."""
    rng = np.random.default_rng(2)
    one, other = (np.repeat(rng.normal(size=(1, 40)), 3, 0) for _ in range(2))
    found = compared(one, other)
    expected = stats.ttest_rel(one[0], other[0]).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.seeds == 0
    assert found.num_prompts == 40


def test_pairing_says_what_it_saves() -> None:
    rng = np.random.default_rng(3)
    one = rng.normal(size=2000)
    near, apart, opposite = one + 0.1 * rng.normal(size=2000), rng.normal(size=2000), -one
    assert pairing(one, near).correlation == pytest.approx(0.995, abs=0.002)
    assert pairing(one, near).saved == pytest.approx(200, rel=0.1)
    assert pairing(one, apart).saved == pytest.approx(1, abs=0.1)
    assert pairing(one, opposite).saved == pytest.approx(0.5)
    assert pairing(np.ones(3), np.ones(3)) == Pairing(None, None)
    by_seed = {name: dict(enumerate(side)) for name, side in (("one", one), ("near", near), ("apart", apart))}
    assert pairing_by_seed(by_seed, [("near", "one")]).saved == pytest.approx(200, rel=0.1)
    assert pairing_by_seed(by_seed, [("apart", "one")]).correlation == pytest.approx(0, abs=0.05)
    assert pairing_by_seed({"one": {0: 1.0}, "other": {1: 1.0}}, [("one", "other")]) == Pairing(None, None)


def test_what_one_side_did_not_answer_is_left_out() -> None:
    rng = np.random.default_rng(4)
    one, other = world(rng, 3, 1, 1, 1, 1)
    values = {name: dict(enumerate(side.mean(1))) for name, side in (("one", one), ("other", other))}
    (difference,) = differences(values, [("one", "other")])
    fewer = {
        seed: {prompt: value for prompt, value in own.items() if prompt[1] < 30} for seed, own in pictures(one).items()
    }
    assert cross(fewer, pictures(other), difference).num_prompts == 30
    alone = {seed: {PROMPTS[0]: 1.0} for seed in range(3)}
    assert cross(alone, pictures(other), difference) is None
