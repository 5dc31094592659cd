import pytest

from t2ilib.config import ConfigError
from t2ilib.data import loader


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
