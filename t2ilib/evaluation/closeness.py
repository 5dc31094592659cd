"""What vectors of pictures say, in closed form: how near two sets are, how diverse one is, whether training pictures were copied.

All take rows of length 1 (`embeddings`), so a product is a cosine, and give plain numbers; nothing here draws, loads or decides.
Leaves out FID and KID: they are defined on Inception's features, need thousands of pictures, and the packages that have these weights
need torchvision.
"""

from collections.abc import Callable
from math import comb

import numpy as np

RELABELLINGS = 1000
SIGMA, SCALE = 10.0, 1000.0
"""Of CMMD's kernel, and what its values are multiplied with (arXiv 2401.09603, section 5)."""


def mean_similarities(drawn: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Of each drawn picture (N,) the mean cosine to the real ones, as DreamBooth's DINO and CLIP-I scores are (arXiv 2208.12242, section
    4.1)."""
    return drawn @ real.mean(0)


def centroid_distance(drawn: np.ndarray, real: np.ndarray) -> float:
    """Squared distance of the means of two sets, from 0, for sets of one mean, to 4."""
    return float(np.square(drawn.mean(0) - real.mean(0)).sum())


def vendi_score(vectors: np.ndarray) -> float:
    """How many different pictures there are, in effect (arXiv 2210.02410, definition 3.1): exp of the entropy of the eigenvalues of K / n,
    K the cosines. 1 where all are the same, n where all are orthogonal."""
    eigenvalues = np.linalg.eigvalsh(vectors @ vectors.T / len(vectors))
    positive = eigenvalues[eigenvalues > 1e-12]
    return float(np.exp(-(positive * np.log(positive)).sum()))


def squared_mmd(one: np.ndarray, other: np.ndarray, sigma: float = SIGMA, scale: float = SCALE) -> float:
    """The maximum mean discrepancy of two sets under a Gaussian kernel, without bias, so that it may be a little below 0; on CLIP's
    vectors CMMD (arXiv 2401.09603, equation 4)."""

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        squared = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * a @ b.T
        return np.exp(-squared / (2 * sigma**2))

    def within(a: np.ndarray) -> float:
        among = kernel(a, a)
        return (among.sum() - np.trace(among)) / (len(a) * (len(a) - 1))

    return float(scale * (within(one) + within(other) - 2 * kernel(one, other).mean()))


def nearer_than_real(drawn: np.ndarray, training: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Of each drawn picture (N,) the share of held-out ones that lie farther from their nearest training picture than it does; ties
    count half. Its mean is Mann and Whitney's U as a share: one half for pictures that are new as the held-out ones are, 1 for copies
    (arXiv 2004.05675, section 3.1). How many of either there are moves its spread and not its mean, for both are held against the same
    training pictures."""
    own, others = (drawn @ training.T).max(1), (held_out @ training.T).max(1)
    return (own[:, None] > others).mean(1) + (own[:, None] == others).mean(1) / 2


def nearest_is_training(to_training: np.ndarray, to_held_out: np.ndarray) -> np.ndarray:
    """Of each drawn picture (N,) the probability that the nearest real picture is a training one, when of the larger set as many are
    taken as the smaller has, over all such subsets, in closed form: one half where drawn pictures do not favour either.

    `to_training`, `to_held_out`: cosines (N, T) and (N, H). A picture that is bad or typical is far from both, or near to both.
    """
    if to_held_out.shape[1] > to_training.shape[1]:
        return 1 - nearest_is_training(to_held_out, to_training)
    number, taken = to_training.shape[1], to_held_out.shape[1]
    among = np.array([1 - comb(number - nearer, taken) / comb(number, taken) for nearer in range(number + 1)])
    return among[(to_training > to_held_out.max(1, keepdims=True)).sum(1)]


def most_by_chance(
    statistic: Callable[[np.ndarray, np.ndarray], float], num_training: int, num_held_out: int, rng: np.random.Generator
) -> float:
    """What a statistic of which things are training and which held out passes once in a hundred times where that made no difference: its
    quantile over random labels. It takes the numbers of both, of `num_training + num_held_out` things."""
    orders = [rng.permutation(num_training + num_held_out) for _ in range(RELABELLINGS)]
    values = [statistic(order[:num_training], order[num_training:]) for order in orders]
    return float(np.quantile(values, 0.99, method="higher"))
