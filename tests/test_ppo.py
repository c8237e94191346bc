"""Losses against hand-computed numbers, and what an update trains on."""

import math

import pytest
import torch
from tensordict import TensorDict

from asyncflow.buffer import EpisodeStats, Rollout
from asyncflow.collector import outcome_fields
from asyncflow.config import AlgorithmConfig, PolicyConfig
from asyncflow.envs.base import ChunkResult
from asyncflow.policies import make_policy
from asyncflow.ppo import PPO, behavior_weights, kl_estimate, masked_mean, normalize, policy_loss, value_loss

NUM_STEPS, NUM_ENVS = 6, 4


def loss_batch(proximal, advantages, weights=None, valid=None, behavior=None):
    size = len(advantages)
    return TensorDict(
        {
            "proximal": torch.tensor(proximal),
            "behavior": torch.tensor(behavior if behavior is not None else proximal),
            "advantages": torch.tensor(advantages),
            "weights": torch.tensor(weights) if weights else torch.ones(size),
            "valid": torch.tensor(valid) if valid else torch.ones(size, dtype=torch.bool),
        },
        [size],
    )


def test_clipped_objective_by_hand():
    batch = loss_batch([0.0, 0.0, 0.0, 0.0], [1.0, 1.0, -1.0, -1.0])
    log_probs = torch.tensor([1.5, 0.5, 1.5, 0.5]).log()
    # objectives: min(1.5, 1.2), min(.5, .8), min(-1.5, -1.2), min(-.5, -.8)
    out = policy_loss(log_probs, batch, 0.2, None)
    assert float(out.loss) == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8) / 4)
    assert float(out.clip_fraction) == 1.0


def test_dual_clip_bounds_what_a_negative_advantage_costs():
    batch = loss_batch([0.0, 0.0], [-1.0, -1.0])
    out = policy_loss(torch.tensor([10.0, 2.0]).log(), batch, 0.2, 3.0)
    assert float(out.loss) == pytest.approx((3.0 + 2.0) / 2)
    assert float(out.dual_clip_fraction) == 0.5


def test_invalid_decisions_are_in_neither_numerator_nor_denominator():
    batch = loss_batch([0.0, 0.0], [2.0, 100.0], valid=[True, False])
    assert float(policy_loss(torch.zeros(2), batch, 0.2, None).loss) == -2.0


def test_weights_multiply_and_carry_no_gradient_of_their_own():
    log_probs = torch.zeros(2, requires_grad=True)
    batch = loss_batch([0.0, 0.0], [1.0, 1.0], weights=[2.0, 0.0])
    policy_loss(log_probs, batch, 0.2, None).loss.backward()
    assert log_probs.grad.tolist() == [-1.0, 0.0]


def test_per_step_ratios_share_their_decision_s_advantage():
    batch = loss_batch([[0.0, 0.0], [0.0, 0.0]], [1.0, -2.0])
    log_probs = torch.tensor([[1.1, 1.0], [1.0, 1.0]]).log()
    assert float(policy_loss(log_probs, batch, 0.2, None).loss) == pytest.approx(-(1.1 + 1.0 - 2.0 - 2.0) / 4)


def test_kl_estimate_is_zero_at_no_change_and_positive_elsewhere():
    assert float(kl_estimate(torch.tensor(0.0))) == 0.0
    assert float(kl_estimate(torch.tensor(0.5))) == pytest.approx(math.exp(0.5) - 1 - 0.5)
    assert (kl_estimate(torch.tensor([-1.0, 1.0])) > 0).all()


def test_behavior_weights_are_truncated_or_masked_and_counted():
    log_weight = torch.tensor([0.0, math.log(1.5), math.log(8.0), 50.0])
    weights, is_over = behavior_weights(log_weight, "truncate", 2.0)
    torch.testing.assert_close(weights, torch.tensor([1.0, 1.5, 2.0, 2.0]))
    assert is_over.tolist() == [False, False, True, True]
    masked, _ = behavior_weights(log_weight, "mask", 2.0)
    torch.testing.assert_close(masked, torch.tensor([1.0, 1.5, 0.0, 0.0]))


def test_value_loss_by_hand_with_and_without_clipping():
    batch = TensorDict(
        {"values": torch.tensor([0.0]), "returns": torch.tensor([1.0]), "valid": torch.tensor([True])}, [1]
    )
    assert float(value_loss(torch.tensor([0.5]), batch, None)) == 0.125
    assert float(value_loss(torch.tensor([0.5]), batch, 0.1)) == pytest.approx(0.5 * 0.81)


def test_normalisation_uses_valid_decisions_alone():
    out = normalize(torch.tensor([1.0, 3.0, 99.0]), torch.tensor([True, True, False]))
    torch.testing.assert_close(out, torch.tensor([-1.0, 1.0, 0.0]))
    assert float(masked_mean(torch.tensor([5.0]), torch.tensor([False]))) == 0.0


def reference_loss(log_probs, batch, clip, dual):
    """The decoupled objective, decision by decision, in Python floats (AReaL, eq. 5; dual clip, eq. 5)."""
    total, count = 0.0, 0
    for b in range(len(log_probs)):
        if not batch["valid"][b]:
            continue
        new, proximal = (x[b].reshape(-1).tolist() for x in (log_probs, batch["proximal"]))
        advantage, weight = float(batch["advantages"][b]), float(batch["weights"][b])
        for now, before in zip(new, proximal, strict=True):
            ratio = math.exp(now - before)
            objective = min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)
            if advantage < 0:
                objective = max(objective, dual * advantage)
            total, count = total - weight * objective, count + 1
    return total / count


@pytest.mark.parametrize("shape", [(50,), (50, 4)])
def test_the_decoupled_loss_equals_a_float64_reference_on_stale_data(shape):
    rng = torch.Generator().manual_seed(7)
    proximal, behavior, log_probs = (torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(3))
    batch = TensorDict(
        {
            "proximal": proximal,
            "behavior": behavior,
            "advantages": torch.randn(50, generator=rng, dtype=torch.float64),
            "weights": torch.rand(50, generator=rng, dtype=torch.float64) * 2,
            "valid": torch.rand(50, generator=rng) < 0.8,
        },
        [50],
    )
    out = policy_loss(log_probs, batch, 0.2, 3.0)
    assert float(out.loss) == pytest.approx(reference_loss(log_probs, batch, 0.2, 3.0), rel=1e-12)
    assert float(out.approx_kl) == pytest.approx(float(masked_mean(kl_estimate(log_probs - behavior), batch["valid"])))
    assert float(out.prox_kl) == pytest.approx(float(masked_mean(kl_estimate(log_probs - proximal), batch["valid"])))


def make_policy_and_rollout(log_prob="joint_sum", kind="flow", policy_version=0):
    config = PolicyConfig(
        kind=kind, hidden_sizes=[16], critic_hidden_sizes=[16], horizon=2, n_action_steps=2, log_prob=log_prob
    )
    policy = make_policy(config, {"state": (3,)}, 2, seed=0)
    rng = torch.Generator().manual_seed(1)
    obs = TensorDict({"state": torch.randn(NUM_STEPS + 1, NUM_ENVS, 3, generator=rng)}, [NUM_STEPS + 1, NUM_ENVS])
    rows = []
    with torch.no_grad():
        for t in range(NUM_STEPS):
            noise = torch.randn(NUM_ENVS, policy.noise_size, generator=rng)
            decision = policy.sample_actions(obs[t], "train", noise)
            rows.append(decision.update(outcome_fields(random_result(obs[t], rng), 0.99, torch.zeros(4).long())))
    data = torch.stack(rows)
    return policy, Rollout(0, 0, policy_version, data, obs, obs[:1], EpisodeStats(), {})


def random_result(obs, rng):
    rewards = torch.rand(NUM_ENVS, 2, generator=rng)
    terminated = torch.rand(NUM_ENVS, generator=rng) < 0.2
    false, counts = torch.zeros_like(terminated), torch.full((NUM_ENVS,), 2)
    return ChunkResult(obs, obs, rewards, counts, terminated, false, torch.zeros(NUM_ENVS), counts)


class RecordingPPO(PPO):
    """Keeps every minibatch and the ratio it started from."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.minibatches, self.deviations = [], []

    def _step(self, batch, is_warmup):
        self.minibatches.append(batch.clone())
        with torch.no_grad():
            now = self.policy.default_forward(batch)["log_probs"]
        self.deviations.append(float((now - batch["proximal"]).exp().sub(1).abs().max()))
        return super()._step(batch, is_warmup)


def algorithm(**changes):
    return AlgorithmConfig(**({"update_epochs": 3, "num_minibatches": 4, "critic_warmup_updates": 0} | changes))


@pytest.mark.parametrize("log_prob", ["joint_sum", "joint_mean", "per_step", "single_step"])
def test_the_first_minibatch_s_ratio_is_one(log_prob):
    policy, rollout = make_policy_and_rollout(log_prob)
    ppo = RecordingPPO(policy, algorithm(), seed=0)
    ppo.update(rollout, 0, lambda: None)
    assert ppo.deviations[0] < 1e-5


def test_every_decision_is_trained_once_an_epoch_in_another_order():
    policy, rollout = make_policy_and_rollout()
    ppo = RecordingPPO(policy, algorithm(), seed=0)
    ppo.update(rollout, 0, lambda: None)
    assert [len(batch) for batch in ppo.minibatches] == [6] * 12
    epochs = [torch.cat([b["rewards"] for b in ppo.minibatches[i : i + 4]]) for i in (0, 4, 8)]
    for epoch in epochs:
        torch.testing.assert_close(epoch.sort().values, rollout.data["rewards"].flatten().sort().values)
    assert not torch.equal(epochs[0], epochs[1])


def test_fresh_data_is_plain_ppo_exactly():
    """At lag 0 the decoupled objective and the plain one take the same step, bit for bit."""
    parameters = []
    for decoupled in (True, False):
        policy, rollout = make_policy_and_rollout(policy_version=3)
        PPO(policy, algorithm(decoupled=decoupled), seed=0).update(rollout, 3, lambda: None)
        parameters.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    assert torch.equal(*parameters)


def test_stale_data_is_weighted_and_its_ratio_starts_at_one_all_the_same():
    policy, rollout = make_policy_and_rollout(policy_version=0)
    with torch.no_grad():
        for parameter in policy.actor_parameters():
            parameter.add_(0.02)
    ppo = RecordingPPO(policy, algorithm(), seed=0)
    metrics = ppo.update(rollout, 1, lambda: None)
    assert ppo.deviations[0] < 1e-5
    assert metrics["train/behavior_kl"] > 0
    assert metrics["train/is_weight_max"] <= 2.0
    assert metrics["train/is_weight_mean"] != 1.0


@pytest.mark.parametrize("log_prob", ["joint_sum", "joint_mean", "per_step"])
def test_behavior_weights_are_the_joint_likelihood_ratio_of_a_decision(log_prob):
    """Whatever the log-prob's unit, the weight is that of the summed log-probs, proximal over behavior."""
    policy, rollout = make_policy_and_rollout(log_prob, policy_version=0)
    with torch.no_grad():
        for parameter in policy.actor_parameters():
            parameter.add_(0.003)
        flat = rollout.data.clone()
        flat["obs"] = rollout.obs[:-1]
        now = policy.default_forward(flat.flatten(0, 1))["log_probs"]
    scale = 4 * 2 * 2 if log_prob == "joint_mean" else 1  # K * H * A
    change = (now - rollout.data["log_probs"].flatten(0, 1)).reshape(len(now), -1).sum(-1) * scale
    batch = PPO(policy, algorithm(behavior_weight_max=1e9), seed=0)._prepare(rollout, 1)
    torch.testing.assert_close(batch["weights"], change.clamp(-5, 5).exp(), rtol=1e-3, atol=1e-4)
    assert batch["weights"].std() > 0.001


@pytest.mark.parametrize("advantage", ["gae", "monte_carlo", "n_step"])
def test_the_estimator_that_was_asked_for_is_used(advantage):
    policy, rollout = make_policy_and_rollout()
    rollout.data["terminated"][:] = False
    config = algorithm(advantage=advantage, n_step=2, gae_lambda=0.5, normalize_advantages=False)
    batch = PPO(policy, config, seed=0)._prepare(rollout, 0).view(NUM_STEPS, NUM_ENVS)
    with torch.no_grad():
        values = policy.get_value(rollout.obs.flatten(0, 1)).view(NUM_STEPS + 1, NUM_ENVS)
    last = NUM_STEPS - 2  # the last decision but one: two rewards, then the bootstrap
    rewards, discounts = rollout.data["rewards"], rollout.data["discounts"]
    deltas = rewards + discounts * values[1:] - values[:-1]
    weight = {"gae": 0.5, "monte_carlo": 1.0, "n_step": 1.0}[advantage]
    wanted = deltas[last] + weight * discounts[last] * deltas[last + 1]
    torch.testing.assert_close(batch["advantages"][last], wanted, rtol=1e-4, atol=1e-5)
    two_steps = deltas[0] + discounts[0] * deltas[1]
    is_two_steps = bool((batch["advantages"][0] - two_steps).abs().max() < 1e-5)
    assert is_two_steps == (advantage == "n_step")


def test_warm_up_trains_the_critic_alone():
    policy, rollout = make_policy_and_rollout()
    before = [p.detach().clone() for p in policy.actor_parameters()]
    critic_before = [p.detach().clone() for p in policy.critic_parameters()]
    PPO(policy, algorithm(critic_warmup_updates=1), seed=0).update(rollout, 0, lambda: None)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.actor_parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(critic_before, policy.critic_parameters(), strict=True))


def test_target_kl_ends_the_update_after_an_epoch():
    policy, rollout = make_policy_and_rollout()
    ppo = RecordingPPO(policy, algorithm(target_kl=1e-9, learning_rate=1e-2), seed=0)
    assert ppo.update(rollout, 0, lambda: None)["train/num_epochs"] == 1
    assert len(ppo.minibatches) == 4


def test_invalid_decisions_change_nothing():
    """Poisoned rows that are marked invalid leave the update as it would be with any other content."""
    parameters = []
    for poison in (7.0, -900.0):
        policy, rollout = make_policy_and_rollout()
        rollout.data["valid"][-1, 2] = False
        rollout.data["rewards"][-1, 2] = poison
        PPO(policy, algorithm(), seed=0).update(rollout, 0, lambda: None)
        parameters.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    assert torch.equal(*parameters)


def test_the_rollout_is_only_read():
    policy, rollout = make_policy_and_rollout()
    before = rollout.data.clone()
    PPO(policy, algorithm(), seed=0).update(rollout, 0, lambda: None)
    assert (rollout.data == before).all()


def test_truncation_bootstraps_from_the_side_table():
    policy, rollout = make_policy_and_rollout()
    rollout.data["terminated"][:] = False
    rollout.data["truncated"][2, 1] = True
    ppo = RecordingPPO(policy, algorithm(gae_lambda=0.0, normalize_advantages=False), seed=0)
    batch = ppo._prepare(rollout, 0).view(NUM_STEPS, NUM_ENVS)
    with torch.no_grad():
        final = policy.get_value(rollout.final_obs[0])[1]
        value = policy.get_value(rollout.obs[2])[1]
    wanted = rollout.data["rewards"][2, 1] + rollout.data["discounts"][2, 1] * final - value
    torch.testing.assert_close(batch["advantages"][2, 1], wanted)


def test_lr_zero_keeps_the_stored_log_probs_right():
    """At a learning rate of nearly nothing, a recomputed log-prob equals the stored one."""
    policy, rollout = make_policy_and_rollout()
    metrics = PPO(policy, algorithm(learning_rate=1e-12), seed=0).update(rollout, 0, lambda: None)
    assert metrics["train/clip_fraction"] == 0.0
    assert metrics["train/approx_kl"] < 1e-9


def test_the_callback_can_abandon_an_update():
    policy, rollout = make_policy_and_rollout()

    def stop():
        raise RuntimeError("collector failed")

    with pytest.raises(RuntimeError, match="collector failed"):
        PPO(policy, algorithm(), seed=0).update(rollout, 0, stop)
