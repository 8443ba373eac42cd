"""Addressed random numbers: the same address gives the same numbers, another address unrelated ones."""

import pytest
import torch

from lightning_ext.functional.counter_rng import fold_in, seeded_draws, seeded_generator


def draw(*address, n=4):
    return torch.rand(n, generator=seeded_generator(*address), dtype=torch.float64)


def test_an_address_gives_the_same_numbers_again():
    assert torch.equal(draw(7, 1, 2, 3), draw(7, 1, 2, 3))


def test_streams_stay_the_same_across_releases():
    # A run that is resumed by a later release must go on with the numbers of the earlier one.
    pinned = [8147104208329303767, 8512870623389622033, 7313940619461363608]
    assert [fold_in(0), fold_in(42, 1, 2), fold_in(42, 2, 1)] == pinned


@pytest.mark.parametrize("other", [(8, 1, 2), (7, 2, 1), (7, 1), (7, 1, 2, 0), (7, 1, 3), (7, 1, -2), (-7, 1, 2)])
def test_another_address_gives_other_numbers(other):
    assert fold_in(*other) != fold_in(7, 1, 2)
    assert not torch.equal(draw(*other), draw(7, 1, 2))


def test_a_seed_fits_a_generator_whatever_the_address():
    for seed in (0, -1, 2**31, 2**64 - 1, -(2**63)):
        for counter in (0, -1, 2**63, 2**64 + 5):
            assert 0 <= fold_in(seed, counter) < 2**63
            seeded_generator(seed, counter)


def test_no_two_addresses_of_a_long_training_meet():
    seeds = {fold_in(0, epoch, stage, batch, rank) for epoch in range(25) for stage in range(2) for batch in range(250)
             for rank in range(4)}  # fmt: skip
    assert len(seeds) == 25 * 2 * 250 * 4


def test_a_step_of_one_counter_flips_half_of_the_bits():
    flips = [(fold_in(0, i, 5) ^ fold_in(0, i + 1, 5)).bit_count() for i in range(2000)]
    assert sum(flips) / len(flips) == pytest.approx(31.5, abs=0.5)  # 63 bits, each flipped with probability 1/2
    assert min(flips) > 10


def test_neighbouring_streams_are_not_correlated():
    rows = torch.stack([draw(3, 0, 0, rank, 0, n=2000) for rank in range(8)])
    correlation = torch.corrcoef(rows) - torch.eye(8)
    assert correlation.abs().max() < 4.5 / 2000**0.5


def test_the_global_generator_is_neither_read_nor_moved():
    state = torch.get_rng_state()
    first = draw(0, 1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    assert torch.equal(draw(0, 1), first)


def test_what_knows_no_generators_draws_from_a_seed_and_leaves_no_trace():
    state = torch.get_rng_state()
    with seeded_draws(7):
        first = torch.distributions.Normal(0.0, 1.0).sample((3,))
    with pytest.raises(KeyError), seeded_draws(7):
        raise KeyError
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, torch.randn(3, generator=torch.Generator().manual_seed(7)))
