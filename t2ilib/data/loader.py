"""Which samples a step sees: a function of the seed and the step's number alone, so that a resumed run continues in the middle of its
epoch, whatever reads and decodes the pictures.

Samples of a step have one size: with aspect-ratio buckets an epoch is made of batches of one bucket each, in shuffled order. Pictures of
the class (prior preservation) have their share of what steps see, and epochs of their own.
"""

import functools
from fractions import Fraction
from math import ceil

import numpy as np

from t2ilib.config import ConfigError
from t2ilib.seeds import numpy_generator_for


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, num_samples: int, purpose: str = "order") -> np.ndarray:
    return numpy_generator_for(seed, purpose, epoch).permutation(num_samples)


def sample_ids(seed: int, step: int, batch_size: int, num_samples: int, purpose: str = "order") -> list[int]:
    """The `batch_size` distinct sample ids of `step` (from 0); each epoch drops the remainder of its shuffled order."""
    if batch_size > num_samples:
        raise ConfigError(
            f"training.batch_size {batch_size} is more than the {num_samples} training pictures: lower it"
        )
    epoch, position = divmod(step, num_samples // batch_size)
    return epoch_order(seed, epoch, num_samples, purpose)[position * batch_size : (position + 1) * batch_size].tolist()


class Batches:
    """`batches(number)`: the ids of a batch of one set of samples, numbered without end, epoch after shuffled epoch.

    `buckets`: (N,) the bucket of every sample; a batch is of one of them. `first`: the id of the first sample.
    """

    def __init__(
        self,
        seed: int,
        size: int,
        num_samples: int,
        buckets: np.ndarray | None = None,
        first: int = 0,
        purpose: str = "order",
    ):
        self.seed, self.size, self.num_samples, self.first, self.purpose = seed, size, num_samples, first, purpose
        self.buckets, self.epoch, self.of_epoch = buckets, -1, np.empty((0, size), int)
        self.per_epoch = num_samples // max(size, 1)
        if buckets is not None:
            counts = np.bincount(buckets)
            self.largest, self.per_epoch = int(counts.max(initial=0)), int((counts // max(size, 1)).sum())

    def __call__(self, number: int) -> list[int]:
        if self.buckets is None:
            return [self.first + i for i in sample_ids(self.seed, number, self.size, self.num_samples, self.purpose)]
        if not self.per_epoch:
            raise ConfigError(
                f"training.batch_size {self.size} is more than the {self.largest} training pictures of any one size: lower it"
            )
        epoch, position = divmod(number, self.per_epoch)
        if epoch != self.epoch:
            self.epoch = epoch
            self.of_epoch = bucket_batches(self.seed, epoch, self.size, self.buckets, self.purpose)
        return (self.first + self.of_epoch[position]).tolist()


class Order:
    """`order(step)`: the ids of a step's samples.

    `buckets`: (N,) the bucket of every sample; None where all have one size. The last `num_class` of the samples are pictures of the
    class, of which there are `share`: in every batch, where that makes a whole number. Otherwise they are spread evenly over the steps, so
    that after any number of steps their share is right to within one sample: of a batch of 1 and half of the samples, every second
    one. (There a batch on the border of two epochs may have a sample twice.) Where samples have several sizes, a batch is of one's own
    pictures or of the class, and the share is one of batches. Raises ConfigError for a batch that cannot be filled.
    """

    def __init__(
        self,
        seed: int,
        batch_size: int,
        num_samples: int,
        buckets: np.ndarray | None = None,
        num_class: int = 0,
        share: float = 0.0,
    ):
        num_own, self.share = num_samples - num_class, Fraction(str(share)) if num_class else Fraction(0)
        of_class = batch_size * self.share
        if num_class:
            require_filled(batch_size, num_own, num_class, of_class, buckets)
        self.whole, self.each = buckets is None and of_class.denominator == 1, batch_size if buckets is None else 1
        one = batch_size // self.each
        sizes = (batch_size - int(of_class), int(of_class)) if self.whole else (one, one)
        parts = (None, None) if buckets is None else (buckets[:num_own], buckets[num_own:])
        self.own = Batches(seed, sizes[0], num_own, parts[0])
        self.of_class = Batches(seed, sizes[1], num_class, parts[1], num_own, "order of the class")
        self(0)

    def __call__(self, step: int) -> list[int]:
        own, of_class = self.numbers(step)
        return [i for n in own for i in self.own(n)] + [i for n in of_class for i in self.of_class(n)]

    def epoch(self, step: int) -> int:
        """How many passes over one's own pictures the first `step` steps have made."""
        return self.numbers(step)[0].start // self.own.per_epoch

    def numbers(self, step: int) -> tuple[range, range]:
        """Which batches of one's own pictures, and of the class, make a step's batch."""
        if self.whole:
            return range(step, step + 1), range(step, step + 1) if self.share else range(0)
        start, end = step * self.each, (step + 1) * self.each
        before, after = int(start * self.share), int(end * self.share)
        return range(start - before, end - after), range(before, after)


def require_filled(
    batch_size: int, num_own: int, num_class: int, of_class: Fraction, buckets: np.ndarray | None
) -> None:
    """Raises ConfigError where there are fewer pictures of the class, or of one's own beside them, than a batch takes."""
    if buckets is None:
        own, num = ceil(batch_size - of_class), ceil(of_class)
        if own > num_own:
            raise ConfigError(
                f"of a batch of {batch_size}, {own} are one's own pictures (prior.share), and there are {num_own}: lower"
                " training.batch_size, or raise the share"
            )
        if num > num_class:
            raise ConfigError(
                f"prior.share makes {num} of {batch_size} samples pictures of the class, and there are {num_class}: lower the share, or have"
                " more of them (prior.num_pictures, or in prior.path)"
            )
    elif (most := np.bincount(buckets[num_own:]).max()) < batch_size:
        raise ConfigError(
            f"training.batch_size {batch_size} is more than the {most} pictures of the class of any one size: lower it, or have more of"
            " them (prior.num_pictures, or in prior.path)"
        )


def bucket_batches(seed: int, epoch: int, batch_size: int, buckets: np.ndarray, purpose: str = "order") -> np.ndarray:
    """The batches of an epoch (K, batch_size), each of one bucket, in shuffled order; what is left over in a bucket waits for the next
    epoch, whose order is another."""
    order = epoch_order(seed, epoch, len(buckets), purpose)
    by_bucket = order[np.argsort(buckets[order], kind="stable")]
    counts = np.bincount(buckets)
    starts = np.cumsum(counts) - counts
    batches = np.concatenate(
        [
            by_bucket[start : start + count // batch_size * batch_size].reshape(-1, batch_size)
            for start, count in zip(starts, counts, strict=True)
        ]
    )
    return batches[numpy_generator_for(seed, f"{purpose} of batches", epoch).permutation(len(batches))]
