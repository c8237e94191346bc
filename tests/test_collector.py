"""What the collector writes, which weights it uses, and how it fails; on environments that the test scripts."""

import copy
import threading

import pytest
import torch
from tensordict import TensorDict

from asyncflow.buffer import BufferClosed, RolloutBuffer
from asyncflow.collector import (
    Channel,
    CollectorSettings,
    InlineCollector,
    RolloutWriter,
    ThreadedCollector,
    outcome_fields,
    plan_ring,
)
from asyncflow.config import PolicyConfig
from asyncflow.envs.base import ChunkResult, EnvSpec, VecEnv
from asyncflow.errors import CollectorError, EnvError
from asyncflow.policies import make_policy
from asyncflow.timing import OverlapClock
from asyncflow.weights import WeightPublisher

NUM_ENVS, NUM_STEPS, CHUNK = 4, 3, 2
CPU = torch.device("cpu")


class CountingEnv(VecEnv):
    """Observations count an environment's decisions; environment 1's episodes are cut after every second one."""

    def __init__(self, fails_at=None):
        self.spec = EnvSpec({"state": (2,)}, action_dim=2, horizon=2 * CHUNK)
        self.num_envs = NUM_ENVS
        self.counts = torch.zeros(NUM_ENVS)
        self.fails_at = fails_at
        self.calls = []

    def reset(self, seed):
        self.calls.append(("reset", seed))
        return self.observe(range(NUM_ENVS))

    def observe(self, env_ids, extra=0.0):
        ids = torch.tensor(list(env_ids))
        return TensorDict({"state": torch.stack([ids.float(), self.counts[ids] + extra], 1)}, [len(ids)])

    def step_async(self, actions, env_ids):
        self.calls.append(("async", tuple(env_ids)))

    def step_wait(self, env_ids):
        self.calls.append(("wait", tuple(env_ids)))
        ids = torch.tensor(list(env_ids))
        self.counts[ids] += 1
        if self.fails_at is not None and self.counts.max() >= self.fails_at:
            raise EnvError("worker 0 died with exit code -9")
        truncated = (ids == 1) & (self.counts[ids] % 2 == 0)
        zeros, counts = torch.zeros(len(ids)), torch.full((len(ids),), CHUNK)
        rewards = torch.tensor([1.0, 0.5]).repeat(len(ids), 1)
        final_obs = self.observe(env_ids, extra=100.0)
        terminated = torch.zeros_like(truncated)
        return ChunkResult(self.observe(env_ids), final_obs, rewards, counts, terminated, truncated, zeros, counts)

    def close(self):
        pass


def build(env, num_slots=1, groups=1, lag=0, threaded=False):
    config = PolicyConfig(kind="gaussian", hidden_sizes=[8], horizon=CHUNK, n_action_steps=CHUNK, log_prob="joint_sum")
    policy = make_policy(config, env.spec.obs_shapes, 2, seed=0)
    buffer = RolloutBuffer(plan_ring(policy, env.spec, NUM_ENVS, NUM_STEPS, num_slots), CPU)
    channel = Channel(buffer, WeightPublisher(policy, lag), OverlapClock())
    settings = CollectorSettings(seed=0, gamma=0.5, num_env_groups=groups, max_policy_lag=lag)
    writer = RolloutWriter(env, policy, channel, settings)
    collector = (ThreadedCollector if threaded else InlineCollector)(writer, channel)
    return policy, channel, collector


def finish_update(channel, rollout):
    """Do what the trainer does after an update: publish, then release."""
    channel.publisher.publish(channel.publisher.newest + 1)
    channel.buffer.release(rollout)


@pytest.mark.parametrize("groups", [1, 2])
def test_every_decision_stands_beside_the_observation_it_was_made_on(groups):
    env = CountingEnv()
    _, channel, collector = build(env, groups=groups)
    first = collector.next_rollout()
    assert torch.equal(first.obs["state"][..., 0], torch.arange(4.0).expand(NUM_STEPS + 1, -1))
    assert torch.equal(first.obs["state"][..., 1], torch.arange(4.0)[:, None].expand(-1, 4))
    finish_update(channel, first)
    second = collector.next_rollout()
    assert second.obs["state"][0, :, 1].tolist() == [3.0] * 4  # goes on where the first one ended
    assert env.calls.count(("reset", 0)) == 1


def test_a_stored_log_prob_is_that_of_the_stored_action():
    policy, _, collector = build(CountingEnv())
    rollout = collector.next_rollout()
    batch = rollout.data.clone()
    batch["obs"] = rollout.obs[:-1]
    with torch.no_grad():
        again = policy.default_forward(batch.flatten(0, 1))["log_probs"]
    torch.testing.assert_close(again, rollout.data["log_probs"].flatten(), atol=1e-5, rtol=0)


def test_truncated_episodes_keep_their_true_final_observation():
    _, _, collector = build(CountingEnv())
    rollout = collector.next_rollout()
    assert rollout.data["truncated"].nonzero().tolist() == [[1, 1]]
    row = int(rollout.data["final_index"][1, 1])
    assert rollout.final_obs["state"][row, 1].tolist() == [1.0, 102.0]


def test_an_environment_that_is_cut_twice_in_a_rollout_keeps_both_final_observations():
    _, channel, collector = build(CountingEnv())
    finish_update(channel, collector.next_rollout())
    rollout = collector.next_rollout()  # decisions 4 to 6, cut after the fourth and the sixth
    assert rollout.data["truncated"].nonzero().tolist() == [[0, 1], [2, 1]]
    rows = rollout.data["final_index"][[0, 2], 1]
    assert rollout.final_obs["state"][rows, 1, 1].tolist() == [104.0, 106.0]


def test_rewards_and_discounts_of_a_chunk():
    obs = TensorDict({}, [2])
    flags = torch.zeros(2, dtype=torch.bool)
    rewards = torch.tensor([[1.0, 1.0, 1.0], [4.0, 0.0, 0.0]])
    executed = torch.tensor([3, 1])
    result = ChunkResult(obs, obs, rewards, executed, flags, flags, torch.zeros(2), executed)
    fields = outcome_fields(result, 0.5, executed)
    assert fields["rewards"].tolist() == [1.75, 4.0]
    assert fields["discounts"].tolist() == [0.125, 0.5]


def test_one_group_steps_while_the_policy_infers_for_another():
    env = CountingEnv()
    _, _, collector = build(env, groups=2)
    collector.next_rollout()
    steps = [call for call in env.calls if call[0] != "reset"]
    even, odd = (0, 2), (1, 3)
    assert steps[:4] == [("async", even), ("async", odd), ("wait", even), ("async", even)]


def test_an_inline_failure_is_a_collector_error_with_its_cause():
    _, _, collector = build(CountingEnv(fails_at=2))
    with pytest.raises(CollectorError, match="exit code -9") as info:
        collector.next_rollout()
    assert isinstance(info.value.__cause__, EnvError)


def test_a_failing_thread_wakes_the_trainer_with_its_traceback():
    """A predecessor's main thread waited forever for a collector that was dead."""
    _, channel, collector = build(CountingEnv(fails_at=5), num_slots=2, threaded=True)
    collector.start()
    finish_update(channel, collector.next_rollout())
    with pytest.raises(CollectorError, match="exit code -9") as info:
        collector.next_rollout()
    assert info.value.__cause__.__traceback__ is not None
    with pytest.raises(CollectorError):
        collector.check()
    collector.close()


def test_close_stops_a_thread_that_waits_for_a_slot():
    _, _, collector = build(CountingEnv(), num_slots=1, threaded=True)
    collector.start()
    collector.next_rollout()
    collector.close()
    collector.close()
    assert not collector._thread.is_alive()
    collector.check()  # a stop is not a failure
    with pytest.raises(BufferClosed):
        collector.next_rollout()


def test_only_one_thread_ever_steps_the_simulators():
    """A predecessor had two threads stepping one simulator after a restart."""
    env, threads = CountingEnv(), set()
    step_async = env.step_async
    env.step_async = lambda actions, env_ids: (threads.add(threading.get_ident()), step_async(actions, env_ids))
    _, channel, collector = build(env, num_slots=2, threaded=True)
    collector.start()
    for _ in range(3):
        finish_update(channel, collector.next_rollout())
    collector.close()
    assert len(threads) == 1
    assert threading.get_ident() not in threads


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_acting_weights_are_those_of_the_version_that_the_rollout_names(lag):
    policy, channel, collector = build(CountingEnv(), lag=lag)
    versions = [copy.deepcopy(policy)]
    for index in range(4):
        rollout = collector.next_rollout()
        assert rollout.policy_version == max(0, index - lag)
        batch = rollout.data.clone()
        batch["obs"] = rollout.obs[:-1]
        matches = [is_from(version, batch.flatten(0, 1)) for version in versions]
        assert matches == [number == rollout.policy_version for number in range(index + 1)]
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.1)
        versions.append(copy.deepcopy(policy))
        finish_update(channel, rollout)


def is_from(policy, batch):
    """Whether the stored log-probs are this policy's."""
    with torch.no_grad():
        again = policy.default_forward(batch)["log_probs"]
    return bool((again - batch["log_probs"]).abs().max() < 1e-5)
