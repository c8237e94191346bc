"""Advantages against hand-computed numbers and an independent float64 reference."""

import math

import pytest
import torch

from asyncflow.ppo.gae import Transitions, compute_gae, compute_n_step


def make(*columns):
    """Return transitions of one environment; the last two columns are flags."""
    dtypes = [torch.float64] * 4 + [torch.bool] * 2
    return Transitions(*(torch.tensor(x, dtype=dtype)[:, None] for x, dtype in zip(columns, dtypes, strict=True)))


def random_transitions(seed, num_steps=40, num_envs=7):
    rng = torch.Generator().manual_seed(seed)
    shape = (num_steps, num_envs)
    rewards, values, next_values = (torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(3))
    discounts = 0.9 + 0.1 * torch.rand(shape, generator=rng, dtype=torch.float64)
    terminated = torch.rand(shape, generator=rng) < 0.1
    truncated = (torch.rand(shape, generator=rng) < 0.1) & ~terminated
    boundary = terminated | truncated
    following = torch.cat([values[1:], next_values[-1:]])
    next_values = torch.where(truncated, next_values, following)
    return Transitions(rewards, values, next_values, discounts, terminated, boundary)


def reference_returns(tr, gae_lambda):
    """Lambda return by its definition: from each decision forward, one environment at a time."""
    num_steps, num_envs = tr.rewards.shape
    advantages = torch.zeros(num_steps, num_envs, dtype=torch.float64)
    for n in range(num_envs):
        for start in range(num_steps):
            weight = 1.0
            for t in range(start, num_steps):
                bootstrap = 0.0 if tr.terminated[t, n] else tr.discounts[t, n] * tr.next_values[t, n]
                advantages[start, n] += weight * (tr.rewards[t, n] + bootstrap - tr.values[t, n])
                if tr.boundary[t, n]:
                    break
                weight = weight * tr.discounts[t, n] * gae_lambda
    return advantages


def test_gae_by_hand():
    tr = make([1, 0, 2], [0.5, 1, 1.5], [1, 1.5, 4], [0.9, 0.8, 0.5], [0, 0, 0], [0, 0, 0])
    advantages, returns = compute_gae(tr, 0.5)
    # deltas 1.4, 0.2, 2.5; a2 = 2.5, a1 = 0.2 + 0.8*0.5*2.5 = 1.2, a0 = 1.4 + 0.9*0.5*1.2 = 1.94
    torch.testing.assert_close(advantages[:, 0], torch.tensor([1.94, 1.2, 2.5], dtype=torch.float64))
    torch.testing.assert_close(returns[:, 0], torch.tensor([2.44, 2.2, 4.0], dtype=torch.float64))


def test_termination_bootstraps_from_nothing_and_truncation_from_the_final_observation():
    terminated = make([0, 1], [0, 0], [9, 9], [0.9, 0.9], [1, 0], [1, 0])
    truncated = make([0, 1], [0, 0], [9, 9], [0.9, 0.9], [0, 0], [1, 0])
    assert compute_gae(terminated, 0.95)[0][0, 0] == 0.0
    assert compute_gae(truncated, 0.95)[0][0, 0] == pytest.approx(8.1)


def test_what_follows_a_termination_is_not_read_whatever_it_is():
    terminated = make([2, 1], [0, 0], [math.nan, 9], [0.9, 0.9], [1, 0], [1, 0])
    assert compute_gae(terminated, 0.95)[0][0, 0] == 2.0
    assert compute_n_step(terminated, 3)[0][0, 0] == 2.0


@pytest.mark.parametrize("estimate", [lambda tr: compute_gae(tr, 0.5), lambda tr: compute_n_step(tr, 3)])
def test_decisions_that_are_left_out_reach_none_before_or_after_them(estimate):
    """By hand: the decision before the left-out one bootstraps from what it observed, 4 + 0.5 * 6 - 1 = 6."""
    tr = make([4, math.nan, 2], [1, math.inf, 1], [6, 3, 8], [0.5, 0.9, 0.5], [0, 0, 0], [0, 0, 0])
    advantages, returns = estimate(tr.without(torch.tensor([[False], [True], [False]])))
    assert advantages[:, 0].tolist() == [6.0, 0.0, 5.0]
    assert returns.isfinite().all()


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.95, 1.0])
def test_gae_equals_the_forward_definition_in_float64(gae_lambda):
    tr = random_transitions(seed=3)
    torch.testing.assert_close(compute_gae(tr, gae_lambda)[0], reference_returns(tr, gae_lambda))


def test_environments_do_not_mix():
    """The predecessors ran the recursion over interleaved environments."""
    tr = random_transitions(seed=4)
    single = Transitions(*(getattr(tr, name)[:, 2:3] for name in tr.__dataclass_fields__))
    torch.testing.assert_close(compute_gae(tr, 0.9)[0][:, 2:3], compute_gae(single, 0.9)[0])


def test_one_step_return_is_td_and_a_long_one_is_monte_carlo():
    tr = random_transitions(seed=5)
    torch.testing.assert_close(compute_n_step(tr, 1)[0], compute_gae(tr, 0.0)[0])
    torch.testing.assert_close(compute_n_step(tr, 40)[0], compute_gae(tr, 1.0)[0])
    assert torch.equal(compute_n_step(tr, 2**62)[0], compute_n_step(tr, 40)[0])  # at once


def test_n_step_by_hand():
    tr = make([1, 2, 4], [0, 0, 0], [8, 16, 32], [0.5, 0.5, 0.5], [0, 0, 0], [0, 0, 0])
    # two steps: 1 + .5*2 + .25*16 = 6; 2 + .5*4 + .25*32 = 12; the rollout's end after one: 4 + .5*32 = 20
    assert compute_n_step(tr, 2)[1][:, 0].tolist() == [6, 12, 20]
