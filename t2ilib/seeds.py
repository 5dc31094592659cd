"""Addressed randomness: every random number is a function of (seed, purpose, key), never of what was drawn before.

A generator is made anew for each use from a hash of its address, so the noise of sample 17 at step 240 is the same
whatever the batch, the device and the moment, and whether the run was interrupted or not. Generators live on the
CPU: CPU and CUDA generators give different numbers for one seed, and a result should not depend on the device.

Leaves out: the global generators of torch, numpy and random, which no module of this library draws from. Dropout inside
a model does draw from torch's global generator; the training loop seeds it per step from an address (see `seed_for`).
"""

import hashlib
import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch

Key = int | str


def seed_for(seed: int, purpose: str, *key: Key) -> int:
    """A 63-bit seed for the address `(seed, purpose, *key)`; distinct addresses give independent seeds (BLAKE2b).

    Raises TypeError for a key part that is neither an int nor a str, because its text might not be stable, and ValueError
    for one that holds the separator of parts.
    """
    for part in (seed, *key):
        if not isinstance(part, int | str) or isinstance(part, bool):
            raise TypeError(f"an address is made of int and str, got {part!r} ({type(part).__name__}) for {purpose!r}")
        if "\x1f" in str(part):
            raise ValueError(f"an address part cannot hold the separator \\x1f, got {part!r} for {purpose!r}")
    address = "\x1f".join(f"{type(part).__name__}:{part}" for part in (seed, purpose, *key))
    return int.from_bytes(hashlib.blake2b(address.encode(), digest_size=8).digest(), "big") >> 1


def generator_for(seed: int, purpose: str, *key: Key) -> "torch.Generator":
    """A fresh CPU `torch.Generator` for the address, e.g. `generator_for(0, "noise", step, sample_id)`."""
    import torch

    return torch.Generator("cpu").manual_seed(seed_for(seed, purpose, *key))


def numpy_generator_for(seed: int, purpose: str, *key: Key) -> "np.random.Generator":
    """The same for numpy, for code that draws pictures or shuffles without torch."""
    import numpy as np

    return np.random.default_rng(seed_for(seed, purpose, *key))


def fresh_seed() -> int:
    """A seed that nobody chose, from the system's entropy, below 2^32 as other programs have them: for who asks for any, and is told which."""
    return secrets.randbelow(2**32)
