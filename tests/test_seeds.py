import itertools

import numpy as np
import pytest
import torch

from t2ilib.seeds import generator_for, numpy_generator_for, seed_for


def test_a_number_depends_on_its_address_and_not_on_what_was_drawn_before():
    addresses = [(step, sample) for step in range(3) for sample in range(4)]
    forwards = {a: torch.randn(5, generator=generator_for(0, "noise", *a)) for a in addresses}
    torch.manual_seed(99)
    torch.randn(7)
    backwards = {a: torch.randn(5, generator=generator_for(0, "noise", *a)) for a in reversed(addresses)}
    assert all(torch.equal(forwards[a], backwards[a]) for a in addresses)
    assert all(not torch.equal(forwards[a], forwards[b]) for a, b in itertools.combinations(addresses, 2))


def test_the_global_generators_are_left_alone():
    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.randn(2), np.random.rand()
    torch.manual_seed(3)
    np.random.seed(3)
    torch.randn(4, generator=generator_for(1, "x"))
    numpy_generator_for(1, "x").random()
    assert torch.equal(torch.randn(2), expected[0])
    assert np.random.rand() == expected[1]


def test_distinct_addresses_are_distinct():
    addresses = [
        (0, "p"), (0, "p", 0), (0, "p", "0"), (0, "p", 1), (0, "p", "1"), (0, "p", 1, 2), (0, "p", 12), (0, "p", "1", "2"),
        (0, "p", ""), (0, "p", "", ""), (0, "p1"), (1, "p"), (-1, "p"), (0, "p", -1), (10, "p"), (1, "0p"),
    ]  # fmt: skip
    assert len({seed_for(*address) for address in addresses}) == len(addresses)


def test_keys_with_the_separator_in_them_are_refused():
    with pytest.raises(ValueError, match=r"cannot hold the separator"):
        seed_for(0, "p", "a\x1fstr:b")


def test_seeds_fit_a_generator_and_are_pinned():
    """A changed hash would silently change every result there is."""
    seeds = [seed_for(seed, "noise", step) for seed in (0, 1, 2**40) for step in range(200)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62
    assert len(set(seeds)) == len(seeds)
    assert seed_for(0, "noise", 1, "a") == 7711523990889192527


def test_seed_zero_is_a_seed():
    assert seed_for(0, "noise") not in (0, seed_for(1, "noise"))
    assert not torch.equal(
        torch.randn(3, generator=generator_for(0, "a")), torch.randn(3, generator=generator_for(1, "a"))
    )


@pytest.mark.parametrize("part", [True, 1.0, None, (1,), np.int64(1)])
def test_parts_whose_text_may_not_be_stable_are_refused(part):
    with pytest.raises(TypeError, match="int and str"):
        seed_for(0, "noise", part)
    with pytest.raises(TypeError, match="int and str"):
        seed_for(part, "noise")


def test_generators_repeat_and_live_on_the_cpu():
    assert generator_for(5, "x", 1).device.type == "cpu"
    draws = [torch.randint(10**9, (4,), generator=generator_for(5, "x", 1)).tolist() for _ in range(2)]
    assert draws[0] == draws[1]
    arrays = [numpy_generator_for(5, "x", 1).random(4).tolist() for _ in range(2)]
    assert arrays[0] == arrays[1]
    assert numpy_generator_for(5, "x", 2).random(4).tolist() != arrays[0]


def test_noise_over_many_addresses_looks_standard_normal():
    values = torch.cat(
        [torch.randn(16, generator=generator_for(0, "noise", step, i)) for step in range(40) for i in range(16)]
    )
    assert abs(float(values.mean())) < 4 / len(values) ** 0.5
    assert abs(float(values.std()) - 1) < 4 / (2 * len(values)) ** 0.5
