"""Environments that the test scripts, a collector on them, and what the trainer does after an update."""

import threading

import torch
from tensordict import TensorDict

from asyncflow.config.sections import PolicyConfig
from asyncflow.envs.base import ChunkResult, Fault, VecEnv
from asyncflow.envs.journal import EpisodeJournal
from asyncflow.errors import EnvError
from asyncflow.metrics.timing import OverlapClock
from asyncflow.policies import make_policy
from asyncflow.rollout.channel import Channel
from asyncflow.rollout.collector import InlineCollector, ThreadedCollector
from asyncflow.rollout.plan import plan_ring
from asyncflow.rollout.ring import RolloutRing
from asyncflow.rollout.weights import WeightPublisher
from asyncflow.rollout.writer import CollectorSettings, RolloutWriter
from asyncflow.simulators.spec import EnvSpec

NUM_ENVS, NUM_STEPS, CHUNK = 4, 3, 2
CPU = torch.device("cpu")


class CountingEnv(VecEnv):
    """Observations count an environment's decisions; environment 1's episodes are cut after every second one.

    Where `breaks` holds (environment, its decision's number), the episode of that decision is broken.
    """

    def __init__(self, fails_at=None, breaks=()):
        self.spec = EnvSpec({"state": (2,)}, action_dim=2, horizon=2 * CHUNK)
        self.num_envs = NUM_ENVS
        self.counts = torch.zeros(NUM_ENVS)
        self.fails_at = fails_at
        self.breaks = breaks
        self.interrupted = threading.Event()
        self.calls = []

    def reset(self, seed, journal=None):
        self.calls.append(("reset", seed))
        return self.observe(range(NUM_ENVS))

    def observe(self, env_ids, extra=0.0):
        ids = torch.tensor(list(env_ids))
        return TensorDict({"state": torch.stack([ids.float(), self.counts[ids] + extra], 1)}, [len(ids)])

    def journal(self):
        return EpisodeJournal(self.counts.long().tolist(), [[] for _ in range(NUM_ENVS)], [False] * NUM_ENVS)

    def interrupt(self):
        self.interrupted.set()

    def step_async(self, actions, env_ids):
        self.actions = actions
        self.calls.append(("async", tuple(env_ids)))

    def step_wait(self, env_ids):
        self.calls.append(("wait", tuple(env_ids)))
        ids = torch.tensor(list(env_ids))
        self.counts[ids] += 1
        if self.fails_at is not None and self.counts.max() >= self.fails_at:
            raise EnvError("worker 0 died with exit code -9")
        broken = torch.tensor([(i, int(self.counts[i])) in self.breaks for i in env_ids])
        truncated = (ids == 1) & (self.counts[ids] % 2 == 0) & ~broken
        zeros, counts = torch.zeros(len(ids)), torch.full((len(ids),), CHUNK)
        rewards = torch.tensor([1.0, 0.5]).repeat(len(ids), 1) * ~broken[:, None]
        final_obs = self.observe(env_ids, extra=100.0)
        terminated = torch.zeros_like(truncated)
        faults = tuple(Fault("died", f"environment {i}") for i in ids[broken].tolist())
        ends = (terminated, truncated, zeros, counts)
        return ChunkResult(self.observe(env_ids), final_obs, rewards, counts, *ends, broken, faults)

    def close(self):
        pass


def build(env, num_slots=1, groups=1, lag=0, threaded=False, *, journal=None, **settings):
    config = PolicyConfig(kind="gaussian", hidden_sizes=[8], horizon=CHUNK, n_action_steps=CHUNK, log_prob="joint_sum")
    policy = make_policy(config, env.spec, seed=0)
    buffer = RolloutRing(plan_ring(policy, env.spec, NUM_ENVS, NUM_STEPS, num_slots), CPU)
    channel = Channel(buffer, WeightPublisher(policy, lag), OverlapClock())
    settings = CollectorSettings(seed=0, gamma=0.5, num_env_groups=groups, max_policy_lag=lag, **settings)
    writer = RolloutWriter(env, policy, channel, settings, journal)
    collector = (ThreadedCollector if threaded else InlineCollector)(writer, channel)
    return policy, channel, collector


def finish_update(channel, rollout):
    """Do what the trainer does after an update: publish, then release."""
    channel.publisher.publish(channel.publisher.newest + 1)
    channel.buffer.release(rollout)
