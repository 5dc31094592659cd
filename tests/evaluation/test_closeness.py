"""Closed forms against what they are defined by: enumeration, loops, scipy."""

from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from t2ilib.evaluation.closeness import (
    centroid_distance,
    mean_similarities,
    most_by_chance,
    nearer_than_real,
    nearest_is_training,
    squared_mmd,
    vendi_score,
)

rng = np.random.default_rng(0)


def unit(count: int, size: int = 6, towards: float = 0.0, seed: int = 0) -> np.ndarray:
    found = np.random.default_rng(seed).normal(size=(count, size))
    found[:, 0] += towards
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def test_vendi_is_one_of_copies_and_n_of_what_has_nothing_in_common() -> None:
    assert vendi_score(np.tile(unit(1), (7, 1))) == pytest.approx(1)
    assert vendi_score(np.eye(5)) == pytest.approx(5)
    assert vendi_score(np.repeat(np.eye(3), 4, axis=0)) == pytest.approx(3), "copies of each add nothing"
    vectors = unit(9, 40)
    definition = np.exp(stats.entropy(np.linalg.eigvalsh(vectors @ vectors.T / 9).clip(min=0)))
    assert vendi_score(vectors) == pytest.approx(definition)
    uneven = np.repeat(np.eye(2), (9, 1), axis=0)  # nine of one kind, one of another
    assert vendi_score(uneven) == pytest.approx(np.exp(stats.entropy([0.9, 0.1])))


def test_similarity_and_distance_are_what_all_pairs_say() -> None:
    drawn, real = unit(4, seed=1), unit(3, seed=2)
    pairs = [[float(a @ b) for b in real] for a in drawn]
    assert mean_similarities(drawn, real) == pytest.approx(np.mean(pairs, axis=1))
    among = [np.mean([a @ b for a in x for b in y]) for x, y in ((drawn, drawn), (real, real), (drawn, real))]
    assert centroid_distance(drawn, real) == pytest.approx(among[0] + among[1] - 2 * among[2])
    assert centroid_distance(drawn, drawn) == pytest.approx(0)
    assert centroid_distance(np.array([[1.0, 0.0]]), np.array([[-1.0, 0.0]])) == pytest.approx(4)


def test_mmd_is_its_double_sum_and_has_no_bias() -> None:
    one, other = unit(5, seed=3), unit(4, towards=1, seed=4)

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.exp(-np.square(a - b).sum() / (2 * 0.7**2)))

    within = [np.mean([kernel(a, b) for a, b in combinations(x, 2)]) for x in (one, other)]
    between = np.mean([kernel(a, b) for a in one for b in other])
    assert squared_mmd(one, other, sigma=0.7, scale=10) == pytest.approx(10 * (sum(within) - 2 * between))
    alike = [squared_mmd(unit(20, seed=2 * i), unit(20, seed=2 * i + 1)) for i in range(200)]
    assert abs(np.mean(alike)) < 3 * np.std(alike) / np.sqrt(200)
    assert min(alike) < 0
    assert squared_mmd(unit(100), unit(100, towards=2, seed=1)) > max(alike)


def test_nearer_than_real_is_mann_and_whitneys_u() -> None:
    training, drawn, held_out = unit(30, seed=5), unit(12, seed=6), unit(7, seed=7)
    drawn[0], drawn[1], held_out[2] = training[3], held_out[1], training[3]  # a copy, and ties
    nearest = [(vectors @ training.T).max(1) for vectors in (drawn, held_out)]
    u = stats.mannwhitneyu(*nearest, method="asymptotic").statistic
    assert nearer_than_real(drawn, training, held_out).mean() == pytest.approx(u / (12 * 7))
    assert nearer_than_real(training[:4], training, held_out).mean() == pytest.approx((4 * 6 + 4 * 0.5) / 28)


def test_the_bound_of_chance_is_passed_once_in_a_hundred() -> None:
    """Of 30 things 20 get a label at random; and where all are alike no statistic is passed."""
    values = np.random.default_rng(0).normal(size=30)

    def difference(one: np.ndarray, other: np.ndarray) -> float:
        return float(values[one].mean() - values[other].mean())

    bound = most_by_chance(difference, 20, 10, np.random.default_rng(1))
    orders = [np.random.default_rng(2 + i).permutation(30) for i in range(4000)]
    assert 0.005 < np.mean([difference(order[:20], order[20:]) > bound for order in orders]) < 0.016
    few = [most_by_chance(lambda one, other: float(one[0] == 0), 1, 5, np.random.default_rng(i)) for i in range(9)]
    assert few == [1] * 9, "of six things one is by chance the first too often"


@pytest.mark.parametrize(("num_training", "num_held_out"), [(7, 3), (3, 7), (5, 5), (9, 1)])
def test_nearest_is_training_is_the_mean_over_all_subsets_of_equal_size(num_training: int, num_held_out: int) -> None:
    training, held_out, drawn = unit(num_training, seed=8), unit(num_held_out, seed=9), unit(6, seed=10)
    size = min(num_training, num_held_out)
    counted = np.zeros(len(drawn))
    subsets = [
        (list(a), list(b))
        for a in combinations(range(num_training), size)
        for b in combinations(range(num_held_out), size)
    ]
    for own, others in subsets:
        counted += (drawn @ training[own].T).max(1) > (drawn @ held_out[others].T).max(1)
    assert nearest_is_training(drawn @ training.T, drawn @ held_out.T) == pytest.approx(counted / len(subsets))


def test_whoever_favours_neither_has_a_half_however_uneven_the_sets_are() -> None:
    shares = []
    for i in range(200):
        drawn, training, held_out = unit(20, seed=3 * i), unit(40, seed=3 * i + 1), unit(4, seed=3 * i + 2)
        shares.append(nearest_is_training(drawn @ training.T, drawn @ held_out.T).mean())
    assert np.mean(shares) == pytest.approx(0.5, abs=4 * np.std(shares) / np.sqrt(200))
    training = unit(40)
    few, many = (nearest_is_training(training @ training.T, training @ unit(n, seed=1).T).mean() for n in (4, 40))
    assert few < 0.6, "a copy of one of forty is rarely among four of them"
    assert many == 1
