"""What an update trains on, what it skips, what it leaves behind when it fails, and how it goes on."""

import math
import weakref

import pytest
import torch
from tensordict import TensorDict
from torch.utils._python_dispatch import TorchDispatchMode

from asyncflow.config.sections import AlgorithmConfig, PolicyConfig
from asyncflow.envs.base import ChunkResult
from asyncflow.errors import TrainingError
from asyncflow.policies import make_policy
from asyncflow.ppo.ppo import PPO
from asyncflow.rollout.plan import outcome_fields
from asyncflow.rollout.ring import Rollout, RolloutInfo
from asyncflow.simulators.spec import EnvSpec

NUM_STEPS, NUM_ENVS = 6, 4


def make_policy_and_rollout(log_prob="joint_sum", kind="flow", policy_version=0):
    config = PolicyConfig(
        kind=kind, hidden_sizes=[16], critic_hidden_sizes=[16], horizon=2, n_action_steps=2, log_prob=log_prob
    )
    policy = make_policy(config, EnvSpec({"state": (3,)}, 2, 10), seed=0)
    rng = torch.Generator().manual_seed(1)
    obs = TensorDict({"state": torch.randn(NUM_STEPS + 1, NUM_ENVS, 3, generator=rng)}, [NUM_STEPS + 1, NUM_ENVS])
    rows = []
    with torch.no_grad():
        for t in range(NUM_STEPS):
            noise = torch.randn(NUM_ENVS, policy.noise_size, generator=rng)
            decision = policy.sample_actions(obs[t], "train", noise)
            rows.append(decision.update(outcome_fields(random_result(obs[t], rng), 0.99, torch.zeros(4).long())))
    data = torch.stack(rows)
    return policy, Rollout(0, 0, RolloutInfo(policy_version), data, obs, obs[:1])


def random_result(obs, rng):
    rewards = torch.rand(NUM_ENVS, 2, generator=rng)
    terminated = torch.rand(NUM_ENVS, generator=rng) < 0.2
    false, counts = torch.zeros_like(terminated), torch.full((NUM_ENVS,), 2)
    return ChunkResult(obs, obs, rewards, counts, terminated, false, torch.zeros(NUM_ENVS), counts, false)


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


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
    epochs = [torch.cat([b["behavior"] for b in ppo.minibatches[i : i + 4]]) for i in (0, 4, 8)]
    for epoch in epochs:
        torch.testing.assert_close(epoch.sort().values, rollout.data["log_probs"].flatten().sort().values)
    assert not torch.equal(epochs[0], epochs[1])


def test_an_epochs_copy_of_the_rollout_is_freed_before_the_next_one_is_made(monkeypatch):
    policy, rollout = make_policy_and_rollout()
    ppo, copies, num_alive = PPO(policy, algorithm(), seed=0), [], []
    shuffle = ppo._shuffle

    def count_and_shuffle(batch, order):
        num_alive.append(sum(copy() is not None for copy in copies))
        minibatches = shuffle(batch, order)
        copies.append(weakref.ref(minibatches["chains"]))
        return minibatches

    monkeypatch.setattr(ppo, "_shuffle", count_and_shuffle)
    ppo.update(rollout, 0, lambda: None)
    assert num_alive == [0, 0, 0]


def test_fresh_data_is_plain_ppo_exactly():
    """At lag 0 the decoupled objective and the plain one take the same step, bit for bit."""
    parameters = []
    for decoupled in (True, False):
        policy, rollout = make_policy_and_rollout(policy_version=3)
        PPO(policy, algorithm(decoupled=decoupled), seed=0).update(rollout, 3, lambda: None)
        parameters.append(flat(policy.parameters()))
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


@pytest.mark.parametrize("kind", ["flow", "gaussian"])
def test_a_step_follows_the_gradient_of_the_whole_loss(kind):
    policy, rollout = make_policy_and_rollout(kind=kind)
    rollout.data["valid"][0, 1] = False
    ppo = PPO(policy, algorithm(ent_coef=0.1, vf_coef=0.7, max_grad_norm=1e9, dual_clip=None), seed=0)
    batch = ppo._shuffle(ppo._prepare(rollout, 0), torch.arange(24))[0]
    out, valid, advantages = policy.default_forward(batch), batch["valid"], batch["advantages"]
    ratio = (out["log_probs"] - batch["behavior"]).exp()
    objective = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages) + 0.1 * out["entropy"]
    error = 0.5 * (out["values"] - batch["returns"]).square()
    wanted = torch.autograd.grad((0.7 * error - objective)[valid].mean(), list(policy.parameters()))
    ppo._step(batch, is_warmup=False)
    assert not valid.all()
    torch.testing.assert_close([p.grad for p in policy.parameters()], list(wanted), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ent_coef", [0.0, 0.1])
@pytest.mark.parametrize("part", ["actor", "critic"])
def test_a_frozen_part_stays_as_it_is_and_the_other_is_trained(part, ent_coef):
    policy, rollout = make_policy_and_rollout()
    frozen = list(policy.actor_parameters() if part == "actor" else policy.critic_parameters())
    for parameter in frozen:
        parameter.requires_grad_(False)
    before = flat(policy.parameters())
    ppo = PPO(policy, algorithm(ent_coef=ent_coef), seed=0)
    metrics = ppo.update(rollout, 0, lambda: None)
    is_frozen = torch.cat([torch.full((p.numel(),), not p.requires_grad) for p in policy.parameters()])
    assert torch.equal(flat(policy.parameters())[is_frozen], before[is_frozen])
    assert not torch.equal(flat(policy.parameters()), before)
    assert (metrics["train/grad_norm"] == 0) == (part == "actor")
    assert (metrics["train/critic_grad_norm"] == 0) == (part == "critic")


def test_target_kl_ends_the_update_after_an_epoch():
    policy, rollout = make_policy_and_rollout()
    ppo = RecordingPPO(policy, algorithm(target_kl=1e-9, learning_rate=1e-2), seed=0)
    assert ppo.update(rollout, 0, lambda: None)["train/num_epochs"] == 1
    assert len(ppo.minibatches) == 4


@pytest.mark.parametrize("advantage", ["gae", "n_step"])
def test_invalid_decisions_change_nothing(advantage):
    """Whatever finite numbers rows hold that are marked invalid, parameters and metrics are the same."""
    outcomes = []
    for poison in (0.0, 7.0, -900.0):
        policy, rollout = make_policy_and_rollout("joint_sum")
        rollout.data["valid"][2:4, 2] = False
        for name in ("rewards", "log_probs", "values", "discounts", "actions", "chains"):
            rollout.data[name][2:4, 2] = poison
        metrics = PPO(policy, algorithm(advantage=advantage, n_step=3), seed=0).update(rollout, 1, lambda: None)
        outcomes.append((metrics, flat(policy.parameters())))
    assert all(metrics == outcomes[0][0] for metrics, _ in outcomes)
    assert all(torch.equal(parameters, outcomes[0][1]) for _, parameters in outcomes)


@pytest.mark.parametrize("advantage", ["gae", "monte_carlo", "n_step"])
def test_the_last_valid_decision_before_an_invalid_one_bootstraps_from_its_next_observation(advantage):
    policy, rollout = make_policy_and_rollout()
    rollout.data["terminated"][:] = False
    rollout.data["valid"][3, 1] = False
    config = algorithm(advantage=advantage, normalize_advantages=False)
    batch = PPO(policy, config, seed=0)._prepare(rollout, 0).view(NUM_STEPS, NUM_ENVS)
    with torch.no_grad():
        value, following = policy.get_value(rollout.obs[2])[1], policy.get_value(rollout.obs[3])[1]
    wanted = rollout.data["rewards"][2, 1] + rollout.data["discounts"][2, 1] * following - value
    torch.testing.assert_close(batch["advantages"][2, 1], wanted)


@pytest.mark.parametrize("invalid", [slice(None), slice(1, None)], ids=["no decision", "a minibatch"])
def test_a_minibatch_without_a_valid_decision_takes_no_step(invalid):
    """Adam's momentum would move the weights with zero gradients, too."""
    policy, rollout = make_policy_and_rollout()
    ppo = PPO(policy, algorithm(ent_coef=0.1), seed=0)
    ppo.update(rollout, 0, lambda: None)  # momentum
    before = flat(policy.parameters())
    steps = [int(state["step"]) for state in ppo.optimizer.state.values()]
    for tensor in rollout.data.values():
        tensor.flatten(0, 1)[invalid] = 0  # `valid` too
    metrics = ppo.update(rollout, 1, lambda: None)
    taken = int(ppo.optimizer.state[ppo.optimizer.param_groups[0]["params"][0]]["step"]) - steps[0]
    assert taken == (0 if invalid.start is None else ppo.config.update_epochs)
    assert torch.equal(flat(policy.parameters()), before) == (invalid.start is None)
    assert metrics["train/nonfinite_skipped"] == 0


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


def poisoned(rollout, count=1):
    """Give decisions a log-prob, so a loss, that is not finite."""
    rollout.data["log_probs"].view(-1)[:count] = math.nan
    return rollout


class SteppingPPO(RecordingPPO):
    """Keeps whether every minibatch changed a parameter, and what it returned."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.is_changed, self.steps = [], []

    def _step(self, batch, is_warmup):
        before = flat(self.policy.parameters())
        self.steps.append(super()._step(batch, is_warmup))
        self.is_changed.append(not torch.equal(flat(self.policy.parameters()), before))
        return self.steps[-1]


def test_a_minibatch_that_is_not_finite_is_skipped_and_the_others_are_trained():
    policy, rollout = make_policy_and_rollout()
    ppo = SteppingPPO(policy, algorithm(), seed=0)
    metrics = ppo.update(poisoned(rollout), 0, lambda: None)
    has_poison = [bool(batch["behavior"].isnan().any()) for batch in ppo.minibatches]
    assert ppo.is_changed == [not poison for poison in has_poison]
    assert metrics["train/nonfinite_skipped"] == ppo.num_nonfinite_steps == 3
    assert {float(state["step"]) for state in ppo.optimizer.state.values()} == {9.0}
    assert all(tensor.isfinite().all() for tensor in [*ppo.state_tensors().values(), *policy.parameters()])


def test_a_gradient_that_is_not_finite_is_skipped_though_the_loss_is_finite():
    policy, rollout = make_policy_and_rollout()
    ppo = PPO(policy, algorithm(), seed=0)
    next(policy.critic_parameters()).register_hook(lambda gradient: gradient * math.nan)
    before = flat(policy.parameters())
    assert ppo.update(rollout, 0, lambda: None)["train/nonfinite_skipped"] == 12
    assert torch.equal(flat(policy.parameters()), before)


class BrokenEntropy:
    """A policy's `default_forward` with an infinite entropy."""

    def __init__(self, policy):
        self._forward = policy.default_forward

    def __call__(self, batch):
        out = self._forward(batch)
        return out.set("entropy", torch.full_like(out["entropy"], math.inf))


@pytest.mark.parametrize("ent_coef", [0.0, 0.1])
def test_a_step_whose_entropy_is_not_finite_is_skipped_whatever_its_weight(monkeypatch, ent_coef):
    policy, rollout = make_policy_and_rollout()
    monkeypatch.setattr(policy, "default_forward", BrokenEntropy(policy))
    before = flat(policy.parameters())
    metrics = PPO(policy, algorithm(ent_coef=ent_coef), seed=0).update(rollout, 0, lambda: None)
    assert metrics["train/nonfinite_skipped"] == 12
    assert torch.equal(flat(policy.parameters()), before)


def test_the_critics_warm_up_does_not_ask_for_the_actors_entropy(monkeypatch):
    policy, rollout = make_policy_and_rollout()
    monkeypatch.setattr(policy, "default_forward", BrokenEntropy(policy))
    metrics = PPO(policy, algorithm(critic_warmup_updates=1), seed=0).update(rollout, 0, lambda: None)
    assert metrics["train/nonfinite_skipped"] == 0


def test_skipped_minibatches_are_outside_the_means():
    policy, rollout = make_policy_and_rollout()
    ppo = SteppingPPO(policy, algorithm(), seed=0)
    metrics = ppo.update(poisoned(rollout), 0, lambda: None)
    kept = [step for step, changed in zip(ppo.steps, ppo.is_changed, strict=True) if changed]
    assert metrics["train/policy_loss"] == pytest.approx(sum(float(step.terms[0]) for step in kept) / 9)
    assert metrics["train/critic_grad_norm"] == pytest.approx(sum(float(step.norms[1]) for step in kept) / 9)


def test_if_all_minibatches_are_skipped_nothing_changes_and_the_means_are_nan():
    policy, rollout = make_policy_and_rollout()
    before = flat(policy.parameters())
    ppo = PPO(policy, algorithm(target_kl=1e-9), seed=0)
    metrics = ppo.update(poisoned(rollout, NUM_STEPS * NUM_ENVS), 0, lambda: None)
    assert torch.equal(flat(policy.parameters()), before)
    assert math.isnan(metrics["train/policy_loss"])
    assert (metrics["train/nonfinite_skipped"], metrics["train/num_epochs"]) == (12, 3)


def test_target_kl_is_compared_with_the_minibatches_that_were_trained():
    policy, rollout = make_policy_and_rollout()
    ppo = PPO(policy, algorithm(target_kl=1e-9, learning_rate=1e-2), seed=0)
    assert ppo.update(poisoned(rollout), 0, lambda: None)["train/num_epochs"] == 1


def test_too_many_skipped_steps_of_a_run_end_it():
    policy, rollout = make_policy_and_rollout()
    ppo = PPO(policy, algorithm(max_nonfinite_steps=6), seed=0)
    ppo.update(poisoned(rollout), 0, lambda: None)
    ppo.update(rollout, 1, lambda: None)
    before = flat(policy.parameters())
    with pytest.raises(TrainingError, match=r"^training diverged: .* 9 minibatches .*max_nonfinite_steps = 6$"):
        ppo.update(rollout, 2, lambda: None)
    assert torch.equal(flat(policy.parameters()), before)
    assert ppo.num_nonfinite_steps == 6


class Reads(TorchDispatchMode):
    """Counts operations that would wait for the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("target_kl", "num_reads"), [(None, 0), (1e9, 3)], ids=["without target_kl", "with target_kl"])
def test_epochs_read_nothing_back_from_the_device_but_a_target_kl(target_kl, num_reads):
    policy, rollout = make_policy_and_rollout()
    ppo = PPO(policy, algorithm(target_kl=target_kl), seed=0)
    batch = ppo._prepare(poisoned(rollout), 0)
    with Reads() as reads:
        _, num_epochs = ppo._run_epochs(batch, 1, lambda: None)
    assert num_epochs == 3
    assert reads.count == num_reads


# What is left out before it reaches others.


def update_with(advantage, spoil):
    """Return an update's metrics and parameters after `spoil` was given the rollout and the policy."""
    policy, rollout = make_policy_and_rollout()
    rollout.data["terminated"][2:4, 1] = False
    spoil(rollout, policy)
    metrics = PPO(policy, algorithm(advantage=advantage, n_step=3), seed=0).update(rollout, 0, lambda: None)
    return metrics, flat(policy.parameters())


def marking(rows):
    def mark(rollout, policy):
        rollout.data["valid"][rows, 1] = False

    return mark


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("advantage", ["gae", "monte_carlo", "n_step"])
def test_a_reward_that_is_not_finite_is_as_if_its_decision_had_been_invalid_from_the_start(advantage, number):
    def spoil(rollout, policy):
        rollout.data["rewards"][3, 1] = number

    wanted, wanted_parameters = update_with(advantage, marking([3]))
    metrics, parameters = update_with(advantage, spoil)
    assert torch.equal(parameters, wanted_parameters)
    assert wanted["train/nonfinite_decisions"] == 0
    assert metrics == wanted | {"train/nonfinite_decisions": 1}


@pytest.mark.parametrize(("is_terminated", "lost"), [(False, [2, 3]), (True, [3])], ids=["open", "terminated"])
@pytest.mark.parametrize("advantage", ["gae", "monte_carlo", "n_step"])
def test_a_value_that_is_not_finite_leaves_out_its_decision_and_what_bootstraps_from_it(advantage, is_terminated, lost):
    def end(rollout, policy):
        rollout.data["terminated"][2, 1] = is_terminated

    def spoil(rollout, policy):
        end(rollout, policy)
        where, get_value = rollout.obs["state"][3, 1], policy.get_value
        policy.get_value = lambda obs: get_value(obs).masked_fill((obs["state"] == where).all(-1), math.nan)

    def mark(rollout, policy):
        end(rollout, policy)
        marking(lost)(rollout, policy)

    wanted, wanted_parameters = update_with(advantage, mark)
    metrics, parameters = update_with(advantage, spoil)
    assert torch.equal(parameters, wanted_parameters)
    assert metrics == wanted | {"train/nonfinite_decisions": len(lost)}


def test_rewards_that_add_up_to_too_large_a_number_are_left_out_too():
    policy, rollout = make_policy_and_rollout()
    rollout.data["terminated"][:] = False
    rollout.data["rewards"][3:5, 1] = 1.5e18
    batch = PPO(policy, algorithm(normalize_advantages=False), seed=0)._prepare(rollout, 0)
    lost = batch["is_lost"].view(NUM_STEPS, NUM_ENVS)
    assert lost[:4, 1].all()
    assert int(lost.sum()) == 4
    assert torch.equal(~batch["valid"], batch["is_lost"])
    assert all(batch[name].isfinite().all() for name in ("advantages", "returns"))


@pytest.mark.parametrize("number", [1e19, -3e37])
@pytest.mark.parametrize("advantage", ["gae", "monte_carlo", "n_step"])
def test_a_reward_whose_square_is_not_finite_is_left_out_and_counted(advantage, number):
    def spoil(rollout, policy):
        rollout.data["rewards"][3, 1] = number

    wanted, wanted_parameters = update_with(advantage, marking([3]))
    metrics, parameters = update_with(advantage, spoil)
    assert torch.equal(parameters, wanted_parameters)
    assert metrics == wanted | {"train/nonfinite_decisions": 1}


def test_equal_returns_leave_nothing_to_explain():
    policy, rollout = make_policy_and_rollout()
    rollout.data["rewards"][:], rollout.data["terminated"][:] = 0.1, True
    metrics = PPO(policy, algorithm(), seed=0).update(rollout, 0, lambda: None)
    assert math.isnan(metrics["train/explained_variance"])
    assert math.isfinite(metrics["train/value_loss"])


def test_a_decision_that_was_invalid_already_is_not_counted_again():
    policy, rollout = make_policy_and_rollout()
    rollout.data["valid"][3, 1], rollout.data["rewards"][3, 1] = False, math.nan
    metrics = PPO(policy, algorithm(), seed=0).update(rollout, 0, lambda: None)
    assert metrics["train/nonfinite_decisions"] == 0
    assert metrics["train/nonfinite_skipped"] == 0


def test_nothing_is_read_back_to_leave_decisions_out():
    policy, rollout = make_policy_and_rollout()
    rollout.data["rewards"][3, 1] = math.nan
    with Reads() as reads:
        batch = PPO(policy, algorithm(), seed=0)._prepare(rollout, 0)
    assert reads.count == 0
    assert int(batch["is_lost"].sum()) == 1


def test_values_that_all_diverged_count_as_skipped_steps_and_end_the_run():
    policy, rollout = make_policy_and_rollout()
    rollout.data["rewards"][:] = math.nan
    before = flat(policy.parameters())
    metrics = PPO(policy, algorithm(), seed=0).update(rollout, 0, lambda: None)
    assert (metrics["train/nonfinite_decisions"], metrics["train/nonfinite_skipped"]) == (24, 12)
    assert torch.equal(flat(policy.parameters()), before)
    with pytest.raises(TrainingError, match="training diverged"):
        PPO(policy, algorithm(max_nonfinite_steps=11), seed=0).update(rollout, 0, lambda: None)


def stop_at(minibatch, error):
    calls = iter(range(minibatch))

    def on_minibatch():
        if next(calls, None) is None:
            raise error

    return on_minibatch


@pytest.mark.parametrize("error", [RuntimeError("collector failed"), KeyboardInterrupt()])
@pytest.mark.parametrize("num_finished", [0, 1, 2])
def test_an_update_that_is_abandoned_leaves_no_trace(error, num_finished):
    """In the second update, after the critic's warm-up, the actor's state does not exist yet."""
    policy, rollout = make_policy_and_rollout()
    ppo = PPO(policy, algorithm(critic_warmup_updates=1), seed=0)
    for version in range(num_finished):
        ppo.update(rollout, version, lambda: None)
    before, state = flat(policy.parameters()), {name: x.clone() for name, x in ppo.state_tensors().items()}
    with pytest.raises(type(error)):
        ppo.update(poisoned(rollout), num_finished, stop_at(6, error))
    assert torch.equal(flat(policy.parameters()), before)
    assert ppo.state_tensors().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in ppo.state_tensors().items())
    assert ppo.num_nonfinite_steps == 0


@pytest.mark.parametrize("is_replaced", [False, True], ids=["in place", "by another tensor"])
def test_an_abandoned_update_leaves_no_trace_in_buffers(is_replaced):
    """A running mean, as of batch statistics, moves with every forward."""
    policy, rollout = make_policy_and_rollout()
    policy.register_buffer("running", torch.zeros(3))
    forward = policy.default_forward

    def counting_forward(batch):
        mean = 0.9 * policy.running + 0.1 * batch["obs", "state"].mean(0)
        policy.running = mean if is_replaced else policy.running.copy_(mean)
        return forward(batch)

    policy.default_forward = counting_forward
    ppo = PPO(policy, algorithm(), seed=0)
    ppo.update(rollout, 0, lambda: None)
    before = flat(policy.buffers())
    with pytest.raises(KeyboardInterrupt):
        ppo.update(rollout, 1, stop_at(6, KeyboardInterrupt()))
    assert torch.equal(flat(policy.buffers()), before)


def test_after_an_abandoned_update_training_goes_on_as_if_it_had_not_begun():
    outcomes = []
    for is_disturbed in (False, True):
        policy, rollout = make_policy_and_rollout()
        ppo = PPO(policy, algorithm(critic_warmup_updates=1), seed=0)
        for version in range(3):
            if is_disturbed:
                with pytest.raises(RuntimeError, match="collector failed"):
                    ppo.update(rollout, version, stop_at(7, RuntimeError("collector failed")))
            ppo.update(rollout, version, lambda: None)
        outcomes.append(flat([*policy.parameters(), *ppo.state_tensors().values()]))
    assert torch.equal(*outcomes)


@pytest.mark.parametrize("num_before", [0, 1, 2])
def test_a_ppo_that_loaded_another_s_state_goes_on_like_it(num_before):
    """After one update, the critic's warm-up, the actor has no state to load."""
    policy, rollout = make_policy_and_rollout()
    ppo = PPO(policy, algorithm(critic_warmup_updates=1), seed=0)
    for version in range(num_before):
        ppo.update(rollout, version, lambda: None)
    copy, _ = make_policy_and_rollout()
    copy.load_state_dict(policy.state_dict())
    resumed = PPO(copy, algorithm(critic_warmup_updates=1), seed=0)
    resumed.load_state_tensors({name: tensor.clone() for name, tensor in ppo.state_tensors().items()})
    for version in range(num_before, 4):
        assert ppo.update(rollout, version, lambda: None) == resumed.update(rollout, version, lambda: None)
    assert torch.equal(flat(policy.parameters()), flat(copy.parameters()))
    assert torch.equal(flat(ppo.state_tensors().values()), flat(resumed.state_tensors().values()))


def test_during_the_critic_s_warm_up_the_actor_has_no_state():
    policy, rollout = make_policy_and_rollout()
    ppo = PPO(policy, algorithm(critic_warmup_updates=1), seed=0)
    ppo.update(rollout, 0, lambda: None)
    critic = {id(p) for p in policy.critic_parameters()}
    names = [name for name, p in policy.named_parameters() if id(p) in critic]
    assert set(ppo.state_tensors()) == {f"{n}.{key}" for n in names for key in ("step", "exp_avg", "exp_avg_sq")}
