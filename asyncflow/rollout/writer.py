"""RolloutWriter: acts in the environments and fills one slot of the ring after another.

The writer has a copy of the policy to act with. It works the same in the collector thread and in the main thread.
Environments are split into groups: while one group's chunk runs in the simulators, the policy infers for another. All
groups meet at a rollout's end. What goes to a CUDA device or comes back is staged (`staging`); all of it is queued on
the stream of the thread that collects.

Shapes: T decisions, N environments, n of them in a group, H executed actions.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from asyncflow.config.sections import CompileMode
from asyncflow.envs.base import ChunkResult, Fault, VecEnv, as_slice, start_chunk
from asyncflow.envs.journal import EpisodeJournal
from asyncflow.errors import EnvError
from asyncflow.kernels import copy_each
from asyncflow.metrics.timing import Stopwatch
from asyncflow.policies.base import Policy
from asyncflow.rollout.channel import Channel
from asyncflow.rollout.episodes import Episode
from asyncflow.rollout.inference import make_sampler
from asyncflow.rollout.plan import outcome_fields
from asyncflow.rollout.ring import RolloutInfo, RolloutSlot
from asyncflow.rollout.staging import Staging
from asyncflow.rollout.streams import record_event, wait_event
from asyncflow.rollout.success_value import rewards_after_success
from asyncflow.rollout.weights import changing_tensors, make_acting_copy
from asyncflow.seeding import policy_noise


@dataclass(frozen=True)
class CollectorSettings:
    """The settings that collection uses.

    Attributes:
        seed: The run's seed.
        gamma: Discount per env step.
        is_success_continued: Whether the last reward of a success goes on.
        num_env_groups: G.
        max_policy_lag: L; None acts with the newest version instead of exactly `max(0, n - L)`.
        compile: How the acting copy infers.
    """

    seed: int
    gamma: float
    is_success_continued: bool = False
    num_env_groups: int = 1
    max_policy_lag: int | None = 0
    compile: CompileMode = "none"


@dataclass
class _Group:
    """Environments that step together.

    Attributes:
        number: Which group it is.
        env_ids: Its environments.
        staging: Its pinned buffers.
        obs: [n] what they were last observed in, on the device.
        is_encoded: Whether `obs` is as the ring keeps it.
    """

    number: int
    env_ids: range
    staging: Staging
    obs: TensorDictBase
    is_encoded: bool = False


class RolloutWriter:
    """Collects one rollout after another into the buffer; used by one thread.

    Attributes:
        env: Where it acts; what wraps it may be put in its place before the first rollout.
        sample: How the acting copy of the policy decides; likewise.
    """

    def __init__(
        self,
        env: VecEnv,
        policy: Policy,
        channel: Channel,
        settings: CollectorSettings,
        journal: EpisodeJournal | None = None,
    ) -> None:
        """Copy the policy, and compile or capture it; touches the environments only when the first rollout starts.

        Args:
            env: Used by nobody else from now on, but for `interrupt`.
            policy: What to act with.
            channel: Where rollouts go and weights come from.
            settings: What of the configuration collecting depends on.
            journal: The episodes that the first rollout goes on with; None begins episode 0 everywhere.

        Raises:
            ConfigError: The policy cannot be compiled or captured.
        """
        self.env, self._settings = env, settings
        self._buffer, self._publisher, self._clock = channel.buffer, channel.publisher, channel.clock
        self._policy = make_acting_copy(policy)
        self._journal = journal
        self._weights = list(changing_tensors(self._policy).values())
        self._groups = [self._make_group(g) for g in range(settings.num_env_groups)]
        self._is_reset = False
        self.sample = make_sampler(self._policy, settings.compile, *self._example_inputs())
        self._under_way: list[range] = []  # groups whose chunk was started and not waited for
        self._built = record_event(self._buffer.device)
        self._tracer = channel.tracer
        self._watch = Stopwatch(channel.tracer.recorder("collector"))
        self._episodes: list[Episode] = []
        self._faults: list[Fault] = []
        self._states = torch.zeros(0)  # [N, ..., D] what every environment was last observed in, on the CPU

    def collect_rollout(self) -> None:
        """Fill one slot of the ring and hand it over.

        Waits for a slot, then for the version that it needs, then for simulators.

        Raises:
            BufferClosed: The buffer was closed.
            PublisherClosed: The publisher was closed.
            EnvInterrupted: `interrupt` was called.
            EnvError: Simulators failed too often, or not one decision of the rollout is valid.
        """
        with self._watch.measure("wait_slot_s"), self._clock.waiting("collector"):
            slot = self._buffer.begin_rollout()
            version = self._load_weights(slot.index)
        with self._watch.measure("collect_s"), torch.no_grad():
            self._collect(slot)
        self._hand_over(slot, version)

    def interrupt(self) -> None:
        """End a wait for simulators, now and later. Any thread or a signal handler; never waits."""
        self.env.interrupt()

    def _make_group(self, number: int) -> _Group:
        env_ids = range(number, self.env.num_envs, self._settings.num_env_groups)
        example = self._buffer.plan.obs[: len(env_ids)].to(self._buffer.device)
        return _Group(number, env_ids, Staging(self._buffer.device), example)

    def drain(self) -> None:
        """Wait for chunks that were started and not waited for; whoever ends the environments is not in the way.

        Called when nobody collects any more, by the thread that did or after it has left.
        """
        while self._under_way:
            with contextlib.suppress(EnvError):
                self.env.step_wait(self._under_way.pop())

    def _example_inputs(self) -> tuple[TensorDictBase, Tensor]:
        """Return encoded observations and noise of one group, as every decision has them."""
        group, device = self._groups[0], self._buffer.device
        return group.obs, torch.zeros(len(group.env_ids), self._policy.noise_size, device=device)

    def _hand_over(self, slot: RolloutSlot, version: int) -> None:
        if slot.num_invalid == slot.num_written:
            reason = self._faults[-1].message if self._faults else "every episode was given up"
            raise EnvError(f"rollout {slot.index}: not one decision is valid; {reason}")
        faults, self._faults = tuple(self._faults), []
        episodes, self._episodes = tuple(self._episodes), []
        journal = self.env.journal()
        journal.note_states(self._states)
        num_tasks = len(self.env.spec.task_table)
        slot.finish(RolloutInfo(version, episodes, self._watch.take(), faults, journal, num_tasks))

    def _load_weights(self, rollout_index: int) -> int:
        lag = self._settings.max_policy_lag
        wanted = None if lag is None else max(0, rollout_index - lag)
        wait_event(self._built, self._buffer.device)  # the acting copy was made on the building thread's stream
        with self._publisher.lease(wanted) as (version, tensors):
            copy_each(self._weights, tensors)
        return version

    def _collect(self, slot: RolloutSlot) -> None:
        """Interleave the groups: each waits for its chunk, decides, and starts the next one."""
        if not self._is_reset:
            self._reset()
        num_steps = self._buffer.plan.num_steps
        for t in range(num_steps):
            for group in self._groups:
                if t > 0:
                    self._receive(slot, t - 1, group)
                self._decide(slot, t, group)
        for group in self._groups:
            self._receive(slot, num_steps - 1, group)
            slot.add_bootstrap_obs(group.env_ids, self._encoded_obs(group))

    def _reset(self) -> None:
        """Begin the first episodes, or go on with the journal's."""
        first = self.env.reset(self._settings.seed, self._journal)
        self._states = first["state"].clone()
        self._check_replay()
        for group in self._groups:
            self._observe(group, first[as_slice(group.env_ids)])
        self._is_reset = True

    def _check_replay(self) -> None:
        """Tell if a resumed run does not stand where it was cut."""
        if self._journal is not None and (differing := self._journal.find_differing(self._states)):
            which = ", ".join(str(env) for env in differing)
            cause = "this processor or a changed package rounds differently, or the simulator does not repeat itself"
            message = (
                f"environments {which}: replayed to another state than the run was cut in ({cause}); going on there"
            )
            self._faults.append(Fault("replayed", message))

    def _decide(self, slot: RolloutSlot, t: int, group: _Group) -> None:
        """Infer for a group, start its chunk, and write the decision while the simulators run."""
        with self._watch.measure("inference_s"):
            obs = self._encoded_obs(group)
            decision = self._infer(obs, group, slot.index * self._buffer.plan.num_steps + t)
            executed = decision["actions"][:, : self._policy.n_action_steps]
            actions = group.staging.fetch(give_up_non_finite(executed, decision))  # sync: the simulators need them
        start_chunk(self.env, actions, group.env_ids)
        self._under_way.append(group.env_ids)
        if not bool(actions.isfinite().all()):
            decision = without_non_finite(decision)
        slot.add(t, group.env_ids, obs, decision)

    def _observe(self, group: _Group, obs: TensorDict) -> None:
        """Send a group's new observation to the device."""
        group.obs, group.is_encoded = group.staging.send_rows("obs", obs), False

    def _encoded_obs(self, group: _Group) -> TensorDictBase:
        """Return a group's observation as the ring keeps it; encoded once, also where it begins the next rollout."""
        if not group.is_encoded:
            group.obs, group.is_encoded = self._policy.encode_obs(group.obs), True
        return group.obs

    def _infer(self, obs: TensorDictBase, group: _Group, decision_index: int) -> TensorDict:
        noise = policy_noise(self._settings.seed, group.env_ids, decision_index, self._policy.noise_size)
        noise = group.staging.send("noise", {"noise": noise})["noise"]
        return self.sample(obs, noise)

    def _wait_for_chunk(self, slot: RolloutSlot, t: int, group: _Group) -> ChunkResult:
        """Wait for a group's chunk, and trace who simulated it when."""
        with self._watch.measure("env_step_s"):
            self._under_way.remove(group.env_ids)  # before: a wait that fails is not repeated
            result = self.env.step_wait(group.env_ids)
        for lane, start_s, end_s in result.spans:
            self._tracer.add(lane, "chunk", start_s, end_s, rollout=slot.index, step=t, group=group.number)
        return result

    def _receive(self, slot: RolloutSlot, t: int, group: _Group) -> None:
        """Wait for a group's chunk and write what decision `t` led to."""
        result = self._wait_for_chunk(slot, t, group)
        outcome = outcome_fields(result, self._settings.gamma, self._store_final_obs(slot, group, result))
        if self._settings.is_success_continued:
            outcome["rewards"] += rewards_after_success(result, self._settings.gamma)
        slot.add_outcome(t, group.env_ids, group.staging.send("outcome", outcome))
        self._faults += result.faults
        self._follow_episodes(slot, t, group, result)
        self._states[as_slice(group.env_ids)] = result.obs["state"]
        self._observe(group, result.obs)

    def _follow_episodes(self, slot: RolloutSlot, t: int, group: _Group, result: ChunkResult) -> None:
        """Note the episodes that ended, and take back what the slot holds of broken ones."""
        now = slot.index * self._buffer.plan.num_steps + t
        for i in (result.terminated | result.truncated | result.broken).nonzero().flatten().tolist():
            if result.broken[i]:
                slot.break_episode(t, group.env_ids[i])
                continue
            slot.end_episode(t, group.env_ids[i])
            length = int(result.episode_length[i])
            start = now + 1 - math.ceil(length / self._policy.n_action_steps)  # its last chunk alone may be short
            episode_return, is_success = float(result.episode_return[i]), bool(result.is_success[i])
            task = self.env.spec.task_ids([group.env_ids[i]])[0]
            self._episodes.append(Episode(start, episode_return, length, is_success, task))

    def _store_final_obs(self, slot: RolloutSlot, group: _Group, result: ChunkResult) -> Tensor:
        """Put true final observations into the side table and return each environment's row there, [n]."""
        rows = torch.zeros(len(group.env_ids), dtype=torch.int64)
        cut = result.truncated.nonzero().flatten().tolist()
        if cut:
            sent = group.staging.send_rows("final_obs", result.final_obs)
            ended: Any = torch.stack([sent[i] for i in cut])  # a list as index would be uploaded, with a wait
            finals = self._policy.encode_obs(ended)
            for i, final_obs in zip(cut, finals, strict=True):
                rows[i] = slot.add_final_obs(group.env_ids[i], final_obs)
        return rows


def give_up_non_finite(actions: Tensor, decision: TensorDict) -> Tensor:
    """Return `actions`, [n, H, A], with NaN for whole decisions of which any number is not finite.

    Environments refuse such actions and give up the episode. Stays on the device: no read.
    """
    numbers = [
        x.flatten(1).sum(1, dtype=torch.float32) for x in decision.values() if x.is_floating_point() and x.dim() > 1
    ]
    numbers += [x.float() for x in decision.values() if x.is_floating_point() and x.dim() == 1]
    is_finite = torch.stack(numbers).sum(0).isfinite()
    return torch.where(is_finite[:, None, None], actions, torch.nan)


def without_non_finite(decision: TensorDict) -> TensorDict:
    """Return a decision with zeros for what is not finite; it is not going to be trained on."""
    tensors: dict[str, Tensor] = decision.to_dict()
    zeroed = {k: x.nan_to_num(0.0, 0.0, 0.0) if x.is_floating_point() else x for k, x in tensors.items()}
    return TensorDict(zeroed, decision.batch_size)
