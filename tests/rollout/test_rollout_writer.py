"""What the collector writes and which weights it uses; on environments that the test scripts."""

import copy
import math
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from counting_env import CHUNK, NUM_ENVS, NUM_STEPS, CountingEnv, build, finish_update
from tensordict import TensorDict

from asyncflow.envs.base import ChunkResult, ChunkSpan
from asyncflow.envs.toy import ToyVecEnv, render
from asyncflow.errors import CollectorError
from asyncflow.metrics.tracing import read_spans
from asyncflow.policies import GaussianPolicy
from asyncflow.rollout import staging
from asyncflow.rollout.plan import outcome_fields
from asyncflow.rollout.staging import Staging
from asyncflow.rollout.writer import give_up_non_finite


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


def make_seen_toy():
    return ToyVecEnv(NUM_ENVS, CHUNK, horizon=2 * CHUNK, tasks=["ToyImages"])


@pytest.mark.parametrize("is_encoded", [False, True])
@pytest.mark.parametrize("make_env", [CountingEnv, make_seen_toy])
@pytest.mark.parametrize("groups", [1, 2])
def test_what_is_staged_fills_the_ring_as_what_is_not(monkeypatch, groups, make_env, is_encoded):
    """As on a GPU, but that buffers are overwritten as soon as they were copied: nobody may keep one."""
    if is_encoded:
        monkeypatch.setattr(GaussianPolicy, "encode_obs", lambda _, obs: obs.apply(torch.neg))

    def upload(buffer, device):
        sent = buffer.clone()
        buffer.fill_(77)
        return sent

    rings = []
    for device in ("cpu", "cuda"):
        _, channel, collector = build(make_env(), num_slots=2, groups=groups, lag=1)
        for group in collector.writer._groups:
            group.staging = Staging(torch.device(device))
        with monkeypatch.context() as patch:
            patch.setattr(staging, "_pin", torch.empty_like)
            patch.setattr(staging, "_start_upload", upload)
            patch.setattr(staging, "record_event", lambda device: None)
            for _ in range(2):
                finish_update(channel, collector.next_rollout())
        rings.append(channel.buffer.memory.flatten_keys())
    assert rings[0]["final_obs.state"].any()
    assert rings[0].keys() == rings[1].keys()
    assert all(torch.equal(rings[0][name], rings[1][name]) for name in rings[0].keys())  # noqa: SIM118 - TensorDict


def test_a_stored_log_prob_is_that_of_the_stored_action():
    policy, _, collector = build(CountingEnv())
    rollout = collector.next_rollout()
    batch = rollout.data.clone()
    batch["obs"] = rollout.obs[:-1]
    with torch.no_grad():
        again = policy.default_forward(batch.flatten(0, 1))["log_probs"]
    torch.testing.assert_close(again, rollout.data["log_probs"].flatten(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("groups", [1, 2])
def test_truncated_episodes_keep_their_true_final_observation(groups):
    _, _, collector = build(CountingEnv(), groups=groups)
    rollout = collector.next_rollout()
    assert rollout.data["truncated"].nonzero().tolist() == [[1, 1]]
    row = int(rollout.data["final_index"][1, 1])
    assert rollout.final_obs["state"][row, 1].tolist() == [1.0, 102.0]


@pytest.mark.parametrize("groups", [1, 2])
def test_an_environment_that_is_cut_twice_in_a_rollout_keeps_both_final_observations(groups):
    _, channel, collector = build(CountingEnv(), groups=groups)
    finish_update(channel, collector.next_rollout())
    rollout = collector.next_rollout()  # decisions 4 to 6, cut after the fourth and the sixth
    assert rollout.data["truncated"].nonzero().tolist() == [[0, 1], [2, 1]]
    rows = rollout.data["final_index"][[0, 2], 1]
    assert rollout.final_obs["state"][rows, 1, 1].tolist() == [104.0, 106.0]


@pytest.mark.parametrize("shift", [0.0, 0.01])
def test_a_resumed_run_that_does_not_stand_where_it_was_cut_is_told(shift):
    _, _, cut = build(ToyVecEnv(NUM_ENVS, CHUNK))
    journal = cut.next_rollout().info.journal
    env = journal.chunks.index(max(journal.chunks, key=len))
    journal.chunks[env][0] = journal.chunks[env][0] + shift
    _, _, resumed = build(ToyVecEnv(NUM_ENVS, CHUNK), journal=journal)
    faults = [fault.message for fault in resumed.next_rollout().info.faults]
    assert len(faults) == bool(shift)
    assert all(message.startswith(f"environments {env}: replayed to another state") for message in faults)


def test_rewards_and_discounts_of_a_chunk():
    obs = TensorDict({}, [2])
    flags = torch.zeros(2, dtype=torch.bool)
    rewards = torch.tensor([[1.0, 1.0, 1.0], [4.0, 0.0, 0.0]])
    executed = torch.tensor([3, 1])
    result = ChunkResult(obs, obs, rewards, executed, flags, flags, torch.zeros(2), executed, flags)
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


@pytest.mark.parametrize("groups", [1, 2])
def test_a_broken_episode_is_invalid_from_its_beginning_within_the_slot(groups):
    """Environment 1's first episode ends with its second decision; its third decision breaks the next one."""
    _, _, collector = build(CountingEnv(breaks={(0, 2), (1, 3)}), groups=groups)
    rollout = collector.next_rollout()
    assert (~rollout.data["valid"]).nonzero().tolist() == [[0, 0], [1, 0], [2, 1]]
    assert [fault.message for fault in rollout.info.faults] == ["environment 0", "environment 1"]


def test_where_an_episode_began_is_kept_for_every_environment_of_every_group():
    """Environment 1, the first of the second group, begins an episode where environment 0's goes on."""
    _, _, collector = build(CountingEnv(breaks={(0, 3)}), groups=2)
    rollout = collector.next_rollout()
    assert (~rollout.data["valid"]).nonzero().tolist() == [[0, 0], [1, 0], [2, 0]]


@pytest.mark.parametrize("groups", [1, 2])
def test_earlier_rollouts_stand_when_an_episode_breaks_later(groups):
    _, channel, collector = build(CountingEnv(breaks={(0, 5)}), groups=groups)
    first = collector.next_rollout()
    assert first.data["valid"].all()
    finish_update(channel, first)
    second = collector.next_rollout()
    assert (~second.data["valid"]).nonzero().tolist() == [[0, 0], [1, 0]]
    finish_update(channel, second)
    assert channel.buffer.books() == {"collected": 24, "trained": 22, "dropped": 0, "invalid": 2, "in_flight": 0}


def test_a_rollout_without_a_valid_decision_ends_the_run_with_its_fault():
    breaks = {(env, NUM_STEPS) for env in range(NUM_ENVS)} | {(1, 2)}
    _, _, collector = build(CountingEnv(breaks=breaks))
    with pytest.raises(CollectorError, match=r"rollout 0: not one decision is valid; environment 3"):
        collector.next_rollout()


def test_a_rollout_carries_what_rebuilds_the_episodes_open_at_its_end():
    _, channel, collector = build(CountingEnv())
    for index in range(2):
        rollout = collector.next_rollout()
        assert rollout.info.journal.episodes == [NUM_STEPS * (index + 1)] * NUM_ENVS
        finish_update(channel, rollout)


def test_a_decision_with_a_number_that_is_not_finite_is_refused_as_a_whole():
    decision = TensorDict({"chains": torch.ones(3, 2), "values": torch.ones(3), "steps": torch.zeros(3).long()}, [3])
    decision["chains"][0, 1], decision["values"][2] = torch.inf, torch.nan
    actions = give_up_non_finite(torch.ones(3, CHUNK, 2), decision)
    assert actions.isnan().flatten(1).all(1).tolist() == [True, False, True]
    assert (actions[1] == 1).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_never_reaches_the_ring(bad):
    env = CountingEnv(breaks={(2, 1)})
    policy, channel, collector = build(env)
    sample = type(policy).sample_actions

    def spoil(self, obs, mode, noise):
        decision = sample(self, obs, mode, noise)
        decision["log_probs"][2] = torch.where(obs["state"][2, 1] == 0, bad, decision["log_probs"][2])
        return decision

    seen = []
    step_async = env.step_async
    env.step_async = lambda actions, env_ids: (seen.append(actions), step_async(actions, env_ids))
    collector.writer._policy.sample_actions = spoil.__get__(collector.writer._policy)
    rollout = collector.next_rollout()
    assert seen[0][2].isnan().all()  # which makes the environment give up the episode
    assert all(x.isfinite().all() for x in channel.buffer.memory["data"].values())
    assert (~rollout.data["valid"]).nonzero().tolist() == [[0, 2]]


def test_environments_get_actions_within_their_limits_and_the_ring_keeps_what_was_decided():
    env, seen = CountingEnv(), []
    env.spec = replace(env.spec, action_low=(-0.01, -math.inf), action_high=(0.02, math.inf))
    step_async = env.step_async
    env.step_async = lambda actions, env_ids: (seen.append(actions), step_async(actions, env_ids))
    _, _, collector = build(env)
    decided = collector.next_rollout().data["actions"][:, :, :CHUNK]
    given = torch.stack(seen)
    assert decided[..., 0].min() < -0.01
    assert decided[..., 0].max() > 0.02
    torch.testing.assert_close(given[..., 0], decided[..., 0].clamp(-0.01, 0.02))
    assert torch.equal(given[..., 1], decided[..., 1])


def test_a_trace_holds_the_collectors_stages_and_every_chunk(tmp_path):
    _, channel, collector = build(SpannedEnv(), groups=2)
    channel.tracer.open(tmp_path / "trace.json")
    collector.next_rollout()
    channel.tracer.close()
    spans = read_spans(tmp_path / "trace.json")
    assert Counter(span.name for span in spans if span.lane == "collector") == {
        "wait_slot": 1,
        "collect": 1,
        "inference": 2 * NUM_STEPS,
        "env_step": 2 * NUM_STEPS,
    }
    chunks = [span.numbers for span in spans if span.lane == "worker 3"]
    assert chunks == [{"rollout": 0, "step": t, "group": g} for t in range(NUM_STEPS) for g in range(2)]


class SpannedEnv(CountingEnv):
    """Tells of a worker that simulates every chunk."""

    def step_wait(self, env_ids):
        now = time.perf_counter()
        return replace(super().step_wait(env_ids), spans=(ChunkSpan("worker 3", now, now),))


def test_pictures_stand_beside_the_states_they_were_rendered_from():
    _, _, collector = build(make_seen_toy(), groups=2)
    rollout = collector.next_rollout()
    finals = rollout.final_obs.flatten(0, 1)
    written = finals["state"].any(1)
    assert written.any()
    for obs in (rollout.obs.flatten(0, 1), finals[written]):
        assert torch.equal(obs["images", "top"], render(obs["state"]))
