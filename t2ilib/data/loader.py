"""Which samples a step sees. The order of an epoch is a function of the seed and the epoch's number alone.

So a resumed run continues in the middle of its epoch. Data here is small and encoded, so there are no workers: what would need
them is streaming.
"""

import functools

import numpy as np

from t2ilib.config import ConfigError
from t2ilib.seeds import numpy_generator_for


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    return numpy_generator_for(seed, "order", epoch).permutation(num_samples)


def sample_ids(seed: int, step: int, batch_size: int, num_samples: int) -> list[int]:
    """The `batch_size` distinct sample ids of `step` (from 0); each epoch drops the remainder of its shuffled order."""
    if batch_size > num_samples:
        raise ConfigError(
            f"training.batch_size {batch_size} is more than the {num_samples} training pictures: lower it"
        )
    epoch, position = divmod(step, num_samples // batch_size)
    return epoch_order(seed, epoch, num_samples)[position * batch_size : (position + 1) * batch_size].tolist()
