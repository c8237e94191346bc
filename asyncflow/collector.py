"""Collector: acts in the environments and fills the ring, inline or in a thread of its own.

Owns the acting copy of the policy and the order of inference and stepping. It must not know how rollouts are trained.
Environments are split into groups: while one group's chunk runs in the simulators, the policy infers for another. All
groups meet at a rollout's end.

Shapes: T decisions, N environments, n of them in a group, H executed actions.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor

from asyncflow.buffer import BufferClosed, BufferPlan, EpisodeStats, Rollout, RolloutBuffer
from asyncflow.envs.base import ChunkResult, EnvSpec, VecEnv, as_slice
from asyncflow.errors import CollectorError
from asyncflow.policies.base import Policy
from asyncflow.seeding import policy_noise
from asyncflow.streams import collector_stream
from asyncflow.timing import OverlapClock, Stopwatch
from asyncflow.weights import PublisherClosed, WeightPublisher, changing_tensors, make_acting_copy


@dataclass(frozen=True)
class CollectorSettings:
    """What of the configuration collecting depends on.

    Attributes:
        seed: The run's seed.
        gamma: Discount per env step.
        num_env_groups: G.
        max_policy_lag: L; None acts with the newest version instead of exactly `max(0, n - L)`.
        emulated_latency_s: Seconds added to a decision of all environments.
    """

    seed: int
    gamma: float
    num_env_groups: int = 1
    max_policy_lag: int | None = 0
    emulated_latency_s: float = 0.0


@dataclass(frozen=True)
class Channel:
    """What the collector and the trainer share: rollouts one way, weights the other, and who was busy when."""

    buffer: RolloutBuffer
    publisher: WeightPublisher
    clock: OverlapClock


class RolloutWriter:
    """Collects one rollout after another into the buffer; used by one thread."""

    def __init__(self, env: VecEnv, policy: Policy, channel: Channel, settings: CollectorSettings) -> None:
        """Copy the policy; touches the environments only when the first rollout starts."""
        self._env, self._settings = env, settings
        self._buffer, self._publisher, self._clock = channel.buffer, channel.publisher, channel.clock
        self._policy = make_acting_copy(policy)
        self._weights = changing_tensors(self._policy)
        self._groups = [range(g, env.num_envs, settings.num_env_groups) for g in range(settings.num_env_groups)]
        self._obs: list[TensorDict] = []
        self._watch = Stopwatch()
        self._episodes = EpisodeStats()
        self._num_truncations = torch.zeros(env.num_envs, dtype=torch.int64)

    def collect_rollout(self) -> None:
        """Fill one slot of the ring and hand it over.

        Waits for a slot, then for the version that it needs, then for simulators.

        Raises:
            BufferClosed: The buffer was closed.
            PublisherClosed: The publisher was closed.
            EnvError: A simulator failed.
        """
        with self._watch.measure("wait_slot_s"), self._clock.waiting("collector"):
            index, slot = self._buffer.begin_rollout()
            version = self._load_weights(index)
        with self._watch.measure("collect_s"), torch.no_grad():
            self._collect(index, slot)
        self._buffer.finish_rollout(slot, version, self._episodes, self._watch.take())
        self._episodes = EpisodeStats()

    def _load_weights(self, rollout_index: int) -> int:
        lag = self._settings.max_policy_lag
        wanted = None if lag is None else max(0, rollout_index - lag)
        with self._publisher.lease(wanted) as (version, tensors), torch.no_grad():
            torch._foreach_copy_(self._weights, tensors)
        return version

    def _collect(self, index: int, slot: int) -> None:
        """Interleave the groups: each waits for its chunk, decides, and starts the next one."""
        if not self._obs:
            first = self._env.reset(self._settings.seed)
            self._obs = [first[as_slice(group)] for group in self._groups]
        self._num_truncations.zero_()
        num_steps = self._buffer.plan.num_steps
        for t in range(num_steps):
            for g in range(len(self._groups)):
                if t > 0:
                    self._receive(slot, t - 1, g)
                self._decide(index, slot, t, g)
        for g, group in enumerate(self._groups):
            self._receive(slot, num_steps - 1, g)
            self._buffer.write_obs(slot, num_steps, group, self._obs[g])

    def _decide(self, index: int, slot: int, t: int, g: int) -> None:
        """Infer for group `g`, start its chunk, and write the decision while the simulators run."""
        group, obs = self._groups[g], self._obs[g]
        with self._watch.measure("inference_s"):
            decision = self._infer(obs, group, index * self._buffer.plan.num_steps + t)
            actions = decision["actions"][:, : self._policy.n_action_steps].cpu()  # sync: the simulators need them
        self._env.step_async(actions, group)
        self._buffer.write_obs(slot, t, group, obs)
        self._buffer.write(slot, t, group, decision)

    def _infer(self, obs: TensorDict, group: range, decision_index: int) -> TensorDict:
        noise = policy_noise(self._settings.seed, group, decision_index, self._policy.noise_size)
        device = self._buffer.device
        decision = self._policy.sample_actions(obs.to(device), "train", noise.to(device))
        if self._settings.emulated_latency_s:
            time.sleep(self._settings.emulated_latency_s * len(group) / self._env.num_envs)
        return decision

    def _receive(self, slot: int, t: int, g: int) -> None:
        """Wait for group `g`'s chunk and write what decision `t` led to."""
        group = self._groups[g]
        with self._watch.measure("env_step_s"):
            result = self._env.step_wait(group)
        final_index = self._store_final_obs(slot, group, result)
        self._buffer.write(slot, t, group, outcome_fields(result, self._settings.gamma, final_index))
        self._buffer.count(slot, len(group))
        _add_episodes(self._episodes, result)
        self._obs[g] = result.obs

    def _store_final_obs(self, slot: int, group: range, result: ChunkResult) -> Tensor:
        """Put true final observations into the side table and return each environment's row there, [n]."""
        rows = self._num_truncations[as_slice(group)].clone()
        for i in result.truncated.nonzero().flatten().tolist():
            self._buffer.write_final_obs(slot, int(rows[i]), group[i], result.final_obs[i])
            self._num_truncations[group[i]] += 1
        return torch.where(result.truncated, rows, torch.zeros_like(rows))


def outcome_fields(result: ChunkResult, gamma: float, final_index: Tensor) -> dict[str, Tensor]:
    """Return what the ring stores of a chunk's outcome, each [n].

    A chunk's reward is `sum_i gamma^i r_i`, its discount `gamma ** executed`.
    """
    powers = gamma ** torch.arange(result.rewards.shape[1], dtype=torch.float32)
    return {
        "rewards": (result.rewards * powers).sum(-1),
        "discounts": gamma ** result.executed.float(),
        "executed": result.executed,
        "terminated": result.terminated,
        "truncated": result.truncated,
        "valid": torch.ones_like(result.terminated),
        "final_index": final_index,
    }


def _add_episodes(episodes: EpisodeStats, result: ChunkResult) -> None:
    for i in (result.terminated | result.truncated).nonzero().flatten().tolist():
        episodes.returns.append(float(result.episode_return[i]))
        episodes.lengths.append(int(result.episode_length[i]))
        episodes.successes.append(bool(result.terminated[i]))


def plan_ring(policy: Policy, spec: EnvSpec, num_envs: int, num_steps: int, num_slots: int) -> BufferPlan:
    """Return the ring that rollouts of this policy in these environments need; allocates nothing of that size.

    The horizon cuts an environment's episode at most once per `ceil(horizon / H)` decisions.
    """
    device = next(policy.parameters()).device
    obs = TensorDict({k: torch.zeros(num_envs, *shape) for k, shape in spec.obs_shapes.items()}, [num_envs])
    with torch.no_grad():
        noise = torch.zeros(num_envs, policy.noise_size, device=device)
        decision = make_acting_copy(policy).sample_actions(obs.to(device), "train", noise)
    outcome = outcome_fields(_empty_result(obs, policy.n_action_steps), 1.0, torch.zeros(num_envs, dtype=torch.int64))
    fields = dict(decision.cpu().items()) | outcome
    decisions_per_episode = -(-spec.horizon // policy.n_action_steps)
    max_truncations = -(-num_steps // decisions_per_episode)
    return BufferPlan(TensorDict(fields, [num_envs]), obs, num_slots, num_steps, max_truncations)


def _empty_result(obs: TensorDict, chunk_length: int) -> ChunkResult:
    num_envs = len(obs)
    zeros, counts = torch.zeros(num_envs), torch.zeros(num_envs, dtype=torch.int64)
    false = torch.zeros(num_envs, dtype=torch.bool)
    return ChunkResult(obs, obs, torch.zeros(num_envs, chunk_length), counts, false, false, zeros, counts)


class Collector(ABC):
    """Where the trainer gets its rollouts from. The trainer never asks which kind it has."""

    @abstractmethod
    def start(self) -> None:
        """Begin to collect, if rollouts are collected ahead; called by the trainer, once."""

    @abstractmethod
    def next_rollout(self) -> Rollout:
        """Return the next rollout; called by the trainer, which releases it to the buffer.

        Raises:
            CollectorError: Collecting failed; the cause is the original exception.
            BufferClosed: The buffer was closed on purpose.
        """

    @abstractmethod
    def check(self) -> None:
        """Do nothing while collecting goes well; called by the trainer between minibatches, never waits.

        Raises:
            CollectorError: Collecting failed; the cause is the original exception.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop collecting within one decision; called by the trainer, may be called twice."""


class InlineCollector(Collector):
    """Collects a rollout when it is asked for one, in the caller's thread (`standard`)."""

    def __init__(self, writer: RolloutWriter, channel: Channel) -> None:
        self._writer, self._buffer, self._clock = writer, channel.buffer, channel.clock

    def start(self) -> None:
        """Nothing is collected ahead."""

    def next_rollout(self) -> Rollout:
        """Collect one; waits for the simulators only."""
        try:
            with self._clock.busy("collector"):
                self._writer.collect_rollout()
        except BufferClosed:
            raise
        except Exception as error:
            raise CollectorError(f"collecting failed: {error}") from error
        return self._buffer.take()

    def check(self) -> None:
        """Nothing runs between two calls of `next_rollout`, so nothing can have failed."""

    def close(self) -> None:
        """Let a `next_rollout` under way end at its next decision."""
        self._buffer.close()


class ThreadedCollector(Collector):
    """Collects in a thread of its own, as far ahead as the ring has slots (`vla`)."""

    def __init__(self, writer: RolloutWriter, channel: Channel, num_rollouts: int | None = None) -> None:
        """Make the thread, which ends by itself after `num_rollouts`."""
        self._writer = writer
        self._buffer, self._publisher, self._clock = channel.buffer, channel.publisher, channel.clock
        self._num_rollouts = num_rollouts
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="asyncflow-collector", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def next_rollout(self) -> Rollout:
        """Wait for a finished rollout; woken by the collector thread, also when it fails."""
        try:
            return self._buffer.take()
        except BufferClosed:
            self.check()
            raise

    def check(self) -> None:
        """Raise what the thread raised, if it did."""
        if self._error is not None:
            raise CollectorError(f"the collector thread failed: {self._error}") from self._error

    def close(self) -> None:
        """Wake the thread, and wait until the decision under way is finished and the thread has left."""
        self._buffer.close()
        self._publisher.close()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        """Collect until the buffer is closed or the run's last rollout is written. The collector thread's life."""
        num_collected = 0
        try:
            with collector_stream(self._buffer.device), self._clock.busy("collector"):
                while num_collected != self._num_rollouts:
                    self._writer.collect_rollout()
                    num_collected += 1
        except (BufferClosed, PublisherClosed):
            self._buffer.close()  # again: a signal handler's notification may have found nobody waiting yet
        except BaseException as error:  # the main thread raises it
            self._error = error
            self._buffer.close()
