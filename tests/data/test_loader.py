import numpy as np
import pytest

from t2ilib.config import ConfigError
from t2ilib.data import loader
from t2ilib.data.loader import Order


@pytest.mark.parametrize(("num_samples", "batch_size"), [(12, 4), (13, 4), (5, 5), (7, 1)])
def test_every_epoch_is_a_permutation_without_its_remainder(num_samples, batch_size):
    per_epoch = num_samples // batch_size
    epochs = []
    for epoch in range(4):
        ids = [
            i
            for step in range(per_epoch)
            for i in loader.sample_ids(0, epoch * per_epoch + step, batch_size, num_samples)
        ]
        assert len(ids) == len(set(ids)) == per_epoch * batch_size
        assert set(ids) <= set(range(num_samples))
        epochs.append(tuple(ids))
    assert len(set(epochs)) > 1
    if num_samples % batch_size:  # what one epoch drops another uses
        used = set().union(*(loader.sample_ids(0, step, batch_size, num_samples) for step in range(40)))
        assert used == set(range(num_samples))


def test_a_step_addresses_its_samples_alone():
    forwards = [loader.sample_ids(3, step, 4, 13) for step in range(20)]
    loader.epoch_order.cache_clear()
    assert [loader.sample_ids(3, step, 4, 13) for step in reversed(range(20))] == forwards[::-1]
    assert [loader.sample_ids(4, step, 4, 13) for step in range(20)] != forwards
    assert all(isinstance(i, int) for i in forwards[0])


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ConfigError, match=r"training.batch_size 5 is more than the 4 training pictures"):
        loader.sample_ids(0, 0, 5, 4)


SIZES = (0, 1, 2)


def bucketed():
    """Buckets of 13, 4 and 7 samples, mixed."""
    buckets = np.repeat(SIZES, (13, 4, 7))
    return np.random.default_rng(0).permutation(buckets)


def test_without_buckets_an_order_is_that_of_the_samples():
    order = Order(3, 4, 13)
    assert [order(step) for step in range(20)] == [loader.sample_ids(3, step, 4, 13) for step in range(20)]


def test_batches_of_one_bucket_lose_nothing():
    buckets = bucketed()
    order = Order(0, 4, len(buckets), buckets)
    epochs = [[order(5 * epoch + place) for place in range(5)] for epoch in range(120)]  # 3 + 1 + 1 batches
    for batches in epochs:
        ids = [i for batch in batches for i in batch]
        assert len(ids) == len(set(ids)) == 20
        assert all(len({buckets[i] for i in batch}) == 1 for batch in batches)
        assert sorted(buckets[batch[0]] for batch in batches) == [0, 0, 0, 1, 2]
    assert {i for batches in epochs for batch in batches for i in batch} == set(range(24))
    seen = np.bincount([i for batches in epochs for batch in batches for i in batch], minlength=24)
    share = np.array([12 / 13, 1, 4 / 7])[buckets]  # what is left over in one epoch is another's
    assert (np.abs(seen - 120 * share) <= 4 * np.sqrt(120 * share * (1 - share))).all()
    firsts = {tuple(buckets[batch[0]] for batch in batches) for batches in epochs}
    assert len(firsts) > 3  # buckets come in no fixed order
    assert len({tuple(map(tuple, batches)) for batches in epochs}) == 120


def test_batches_of_one_bucket_are_a_function_of_the_step():
    buckets = bucketed()
    forwards = [Order(1, 4, 24, buckets)(step) for step in range(23)]
    order = Order(1, 4, 24, buckets)
    steps = [22, 3, 4, 5, 4, 0, 17, 9]  # a resumed run begins anywhere, and the next batch is looked at ahead
    assert [order(step) for step in steps] == [forwards[step] for step in steps]
    assert [Order(2, 4, 24, buckets)(step) for step in range(23)] != forwards
    assert all(type(i) is int for batch in forwards for i in batch)


@pytest.mark.parametrize(
    "order",
    [Order(0, 4, 13), Order(0, 4, 24, bucketed()), Order(0, 4, 17, None, 4, 0.25), Order(0, 1, 17, None, 4, 0.3)],
    ids=["plain", "buckets", "a share of each batch", "a share of the batches"],
)
def test_an_epoch_is_a_pass_over_ones_own_pictures(order):
    num_own = order.own.num_samples
    epochs = [order.epoch(step) for step in range(80)]
    assert epochs == sorted(epochs)
    assert epochs[0] == 0
    ends = [step for step in range(1, 80) if epochs[step] > epochs[step - 1]]
    for first, end in zip([0, *ends], ends, strict=False):
        seen = [i for step in range(first, end) for i in order(step) if i < num_own]
        assert abs(len(seen) - order.own.per_epoch * order.own.size) <= 1
        assert len(set(seen)) >= len(seen) - 1


def test_a_batch_that_no_bucket_fills_is_refused():
    with pytest.raises(ConfigError, match=r"training.batch_size 5 is more than the 4 training pictures of any one"):
        Order(0, 5, 7, np.array([0, 0, 0, 0, 1, 1, 1]))
