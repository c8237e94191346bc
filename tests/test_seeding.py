"""Random numbers depend on their key alone."""

import torch

from asyncflow.seeding import derive_seed, permutation, policy_noise


def test_noise_does_not_depend_on_who_else_draws():
    together = policy_noise(1, range(4), 9, 5)
    alone = torch.cat([policy_noise(1, [env], 9, 5) for env in range(4)])
    assert torch.equal(together, alone)


def test_every_part_of_the_key_matters():
    base = policy_noise(1, [2], 3, 8)
    others = [policy_noise(0, [2], 3, 8), policy_noise(1, [3], 3, 8), policy_noise(1, [2], 4, 8)]
    assert all((base - other).abs().min() > 0 for other in others)
    assert len({derive_seed(0, "episode", 1, 2), derive_seed(0, "episode", 12), derive_seed(0, "x", 1, 2)}) == 3


def test_noise_is_standard_normal():
    noise = policy_noise(0, range(200), 0, 200)
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02


def test_noise_of_different_keys_is_uncorrelated():
    noise = torch.stack([policy_noise(0, [env], decision, 64)[0] for env in range(16) for decision in range(16)])
    off_diagonal = torch.corrcoef(noise).fill_diagonal_(0)
    assert off_diagonal.abs().max() < 0.75  # 64 samples each: five standard deviations are 0.62


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    policy_noise(0, range(3), 1, 4)
    permutation(0, 1, 2, 10)
    assert torch.equal(before, torch.get_rng_state())


def test_epochs_are_shuffled_differently_and_hold_every_index():
    first, second = permutation(0, 3, 0, 50), permutation(0, 3, 1, 50)
    assert not torch.equal(first, second)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(50))
