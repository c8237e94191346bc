"""Denoising steps that are clipped and weighted differently, reward scaling, schedules and averaged weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from test_auxiliary import algorithm, build, flat, make_rollout

from asyncflow.config.presets import load_config
from asyncflow.config.sections import AlgorithmConfig
from asyncflow.errors import ConfigError
from asyncflow.ppo.average import WeightAverage
from asyncflow.ppo.denoising import step_clips, step_discounts, treat_steps_differently
from asyncflow.ppo.losses import add_gains, surrogate_loss
from asyncflow.ppo.ppo import PPO
from asyncflow.ppo.reward_scale import EPSILON, RewardScale
from asyncflow.ppo.schedules import learning_rate_factor


def test_clips_grow_exponentially_from_the_first_step_to_the_last_by_hand() -> None:
    config = AlgorithmConfig(clip_coef=0.01, clip_coef_base=0.001, clip_coef_rate=3.0)
    middle = 0.001 + 0.009 * (math.exp(1.5) - 1) / (math.exp(3) - 1)
    assert step_clips(config, 3).tolist() == pytest.approx([0.001, middle, 0.01])
    assert step_clips(config, 1).tolist() == pytest.approx([0.01])
    assert step_clips(AlgorithmConfig(clip_coef=0.2), 2).tolist() == pytest.approx([0.2, 0.2])


def test_early_steps_are_discounted_by_those_that_follow() -> None:
    assert step_discounts(AlgorithmConfig(denoising_discount=0.9), 3).tolist() == pytest.approx([0.81, 0.9, 1.0])


def test_the_surrogate_of_steps_that_are_treated_differently_by_hand() -> None:
    config = AlgorithmConfig(clip_coef=0.2, clip_coef_base=0.1, denoising_discount=0.5)
    ratios = torch.tensor([[1.5, 1.5], [0.5, 0.5]])
    batch = TensorDict({"log_probs": ratios.log(), "proximal": torch.zeros(2, 2)}, [2])
    batch.update({"advantages": torch.tensor([2.0, -4.0]), "weights": torch.ones(2), "valid": torch.tensor([True] * 2)})
    treat_steps_differently(batch, config, 2)
    add_gains(batch, None)
    loss = float(surrogate_loss(ratios.log(), batch, batch["clip_coef"]))
    assert loss == pytest.approx(-(1.1 * 2 * 0.5 + 1.2 * 2 - 0.9 * 4 * 0.5 - 0.8 * 4) / 4)


@pytest.mark.parametrize("log_prob", ["per_step", "single_step"])
def test_an_update_clips_every_log_prob_by_its_step(log_prob: str) -> None:
    policy = build(log_prob=log_prob, num_inference_steps=3)
    config = algorithm(clip_coef=0.01, clip_coef_base=0.001, denoising_discount=0.9, normalize_advantages=False)
    batch = PPO(policy, config)._prepare(make_rollout(policy), 0)
    plain = PPO(policy, algorithm(normalize_advantages=False))._prepare(make_rollout(policy), 0)
    clips, discounts = step_clips(config, 3), step_discounts(config, 3)
    steps = batch["denoise_inds"] if log_prob == "single_step" else torch.arange(3).expand(12, 3)
    assert torch.equal(batch["clip_coef"], clips[steps])
    advantages = plain["advantages"] if log_prob == "single_step" else plain["advantages"][:, None]
    assert torch.equal(batch["advantages"], advantages * discounts[steps])
    metrics = PPO(policy, config).update(make_rollout(policy), 0, lambda: None)
    assert math.isfinite(metrics["train/clip_fraction"])


def test_a_schedule_of_one_kind_for_all_steps_changes_nothing() -> None:
    outcomes = []
    for changes in ({}, {"clip_coef_base": 0.01}):
        policy = build(log_prob="per_step")
        metrics = PPO(policy, algorithm(clip_coef=0.01, **changes)).update(make_rollout(policy), 0, lambda: None)
        outcomes.append((metrics, flat(policy.parameters())))
    assert outcomes[0][0] == pytest.approx(outcomes[1][0])
    assert torch.equal(outcomes[0][1], outcomes[1][1])


def test_a_log_prob_of_all_steps_together_is_refused() -> None:
    policy = build()
    with pytest.raises(ConfigError, match="need the log-prob of every denoising step"):
        PPO(policy, algorithm(denoising_discount=0.9)).update(make_rollout(policy), 0, lambda: None)
    with pytest.raises(ConfigError, match=r"need policy\.log_prob = per_step or single_step, not joint_sum"):
        load_config("toy", {"algorithm.denoising_discount": 0.9, "policy.log_prob": "joint_sum"})


# Step sizes.


def test_the_step_size_rises_then_falls_by_hand() -> None:
    linear = [learning_rate_factor("linear", update, 6, 2) for update in range(6)]
    assert linear == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])
    cosine = [learning_rate_factor("cosine", update, 4, 0) for update in range(5)]
    assert cosine == pytest.approx([0.5 * (1 + math.cos(math.pi * update / 4)) for update in range(5)])
    assert [learning_rate_factor("constant", update, None, 4) for update in (0, 3, 9)] == [0.25, 1.0, 1.0]


def test_a_falling_step_size_needs_a_length() -> None:
    with pytest.raises(ConfigError, match=r"algorithm\.lr_schedule = cosine needs the number of updates"):
        PPO(build(), lr_schedule="cosine").learning_rates(0)
    with pytest.raises(ConfigError, match=r"algorithm\.lr_warmup_updates = 9 must be below trainer.total_updates = 9"):
        load_config(
            "toy", {"algorithm.lr_schedule": "cosine", "algorithm.lr_warmup_updates": 9, "trainer.total_updates": 9}
        )


# Rewards.


def test_rewards_are_divided_by_the_spread_of_their_discounted_sums_by_hand() -> None:
    rewards = torch.tensor([[1.0, 2.0], [3.0, 5.0], [4.0, 6.0]])
    discounts = torch.full((3, 2), 0.5)
    boundary = torch.tensor([[False, False], [True, False], [False, False]])
    valid = torch.tensor([[True, True], [True, True], [True, False]])
    scale, sums = RewardScale(), [1.0, 2.0, 3.5, 6.0, 4.0]
    found = scale.scale(rewards, discounts, boundary, valid)
    mean = sum(sums) / 5
    std = math.sqrt(sum((x - mean) ** 2 for x in sums) / 5 + EPSILON)
    torch.testing.assert_close(found, rewards / std)
    later = scale.scale(torch.tensor([[1.0, 1.0]]), discounts[:1], ~boundary[:1], ~boundary[:1])
    sums += [1.0 + 0.5 * 4.0, 1.0]  # what was earned before goes on in the next rollout, but behind an invalid decision
    mean = sum(sums) / 7
    std = math.sqrt(sum((x - mean) ** 2 for x in sums) / 7 + EPSILON)
    torch.testing.assert_close(later, torch.ones(1, 2) / std)


def test_a_reward_that_is_not_finite_does_not_reach_the_scale() -> None:
    policy = build()
    ppo = PPO(policy, algorithm(reward_scaling=True))
    rollout = make_rollout(policy)
    rollout.data["rewards"][2, 1] = math.nan
    metrics = ppo.update(rollout, 0, lambda: None)
    assert metrics["train/nonfinite_decisions"] >= 1
    assert all(bool(x.isfinite().all()) for x in ppo.state_tensors().values())
    assert int(ppo.state_tensors()["reward_scale|count"]) == rollout.data.numel() - 1


def test_the_scale_of_rewards_does_not_matter_with_reward_scaling() -> None:
    outcomes = []
    for factor in (1.0, 64.0):
        policy = build()
        rollout = make_rollout(policy)
        rollout.data["rewards"] *= factor
        PPO(policy, algorithm(reward_scaling=True)).update(rollout, 0, lambda: None)
        outcomes.append(flat(policy.parameters()))
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=1e-4, atol=1e-5)


def test_an_abandoned_update_leaves_the_scale_of_rewards() -> None:
    policy = build()
    ppo = PPO(policy, algorithm(reward_scaling=True))
    ppo.update(make_rollout(policy), 0, lambda: None)
    before = {name: x.clone() for name, x in ppo.state_tensors().items()}

    def fail() -> None:
        raise RuntimeError("collector failed")

    with pytest.raises(RuntimeError, match="collector failed"):
        ppo.update(make_rollout(policy), 1, fail)
    after = ppo.state_tensors()
    assert after.keys() == before.keys()
    assert all(torch.equal(x, before[name]) for name, x in after.items())


# Averaged weights.


def test_the_average_follows_the_weights_by_hand() -> None:
    policy = torch.nn.Linear(1, 1, bias=False)
    numbers: Any = policy.weight.data
    numbers.fill_(1.0)
    average = WeightAverage(policy, decay=0.75)
    for value in (2.0, 4.0):
        numbers.fill_(value)
        average.follow()
    with average.in_place():
        assert float(numbers) == pytest.approx(0.75 * (0.75 * 1 + 0.25 * 2) + 0.25 * 4)
    assert float(numbers) == 4.0


def test_a_policy_has_its_own_weights_back_whatever_is_raised() -> None:
    policy = build()
    ppo = PPO(policy, algorithm(ema_decay=0.5, learning_rate=1e-2))
    first = flat(policy.parameters())
    ppo.update(make_rollout(policy), 0, lambda: None)
    own = flat(policy.parameters())

    def evaluate() -> None:
        with ppo.averaged_weights():
            torch.testing.assert_close(flat(policy.parameters()), (first + own) / 2)
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        evaluate()
    assert torch.equal(flat(policy.parameters()), own)


def test_without_an_average_evaluations_act_with_the_weights_as_they_are() -> None:
    policy = build()
    before = flat(policy.parameters())
    with PPO(policy).averaged_weights():
        assert torch.equal(flat(policy.parameters()), before)
