"""RolloutWriter: acts in the environments and fills one slot of the ring after another.

Owns the acting copy of the policy and the order of inference and stepping. It must not know which thread it runs in,
nor how rollouts are trained. Environments are split into groups: while one group's chunk runs in the simulators, the
policy infers for another. All groups meet at a rollout's end. What goes to a CUDA device or comes back is staged
(`staging`); all of it is queued on the stream of the thread that collects.

Shapes: T decisions, N environments, n of them in a group, H executed actions.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from asyncflow.config.sections import CompileMode
from asyncflow.envs.base import ChunkResult, Fault, VecEnv, as_slice, start_chunk
from asyncflow.envs.journal import EpisodeJournal
from asyncflow.errors import EnvError
from asyncflow.metrics.timing import Stopwatch
from asyncflow.policies.base import Policy
from asyncflow.rollout.channel import Channel
from asyncflow.rollout.episodes import Episode
from asyncflow.rollout.inference import make_sampler
from asyncflow.rollout.latency import NO_LATENCY, EmulatedLatency, EmulatedSimulators
from asyncflow.rollout.plan import outcome_fields
from asyncflow.rollout.ring import RolloutInfo
from asyncflow.rollout.staging import Staging
from asyncflow.rollout.streams import record_event, wait_event
from asyncflow.rollout.success_value import rewards_after_success
from asyncflow.rollout.weights import changing_tensors, make_acting_copy
from asyncflow.seeding import policy_noise


@dataclass(frozen=True)
class CollectorSettings:
    """What of the configuration collecting depends on.

    Attributes:
        seed: The run's seed.
        gamma: Discount per env step.
        is_success_continued: Whether the last reward of a success goes on.
        num_env_groups: G.
        max_policy_lag: L; None acts with the newest version instead of exactly `max(0, n - L)`.
        inference_latency: Emulated, of a decision of all environments.
        env_latency: Emulated, of a chunk of all environments.
        compile: How the acting copy infers.
    """

    seed: int
    gamma: float
    is_success_continued: bool = False
    num_env_groups: int = 1
    max_policy_lag: int | None = 0
    inference_latency: EmulatedLatency = NO_LATENCY
    env_latency: EmulatedLatency = NO_LATENCY
    compile: CompileMode = "none"


class RolloutWriter:
    """Collects one rollout after another into the buffer; used by one thread."""

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
        self._env, self._settings = env, settings
        self._buffer, self._publisher, self._clock = channel.buffer, channel.publisher, channel.clock
        self._policy = make_acting_copy(policy)
        self._journal = journal
        self._weights = list(changing_tensors(self._policy).values())
        self._groups = [range(g, env.num_envs, settings.num_env_groups) for g in range(settings.num_env_groups)]
        self._staging = [Staging(self._buffer.device) for _ in self._groups]
        self._sample = make_sampler(self._policy, settings.compile, *self._example_inputs())
        self._built = record_event(self._buffer.device)
        self._obs: list[TensorDictBase] = []  # of each group, on the device
        self._raw: set[int] = set()  # groups whose observation is not encoded yet
        self._tracer = channel.tracer
        self._watch = Stopwatch(channel.tracer.recorder("collector"))
        self._simulators = EmulatedSimulators(settings.env_latency)
        self._episodes: list[Episode] = []
        self._faults: list[Fault] = []
        self._states = torch.zeros(0)  # [N, ..., D] what every environment was last observed in, on the CPU
        self._num_truncations = torch.zeros(env.num_envs, dtype=torch.int64)
        self._num_invalid = 0
        self._episode_starts = [0] * env.num_envs  # first decision of the open episode within the slot being written

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
            index, slot = self._buffer.begin_rollout()
            version = self._load_weights(index)
        with self._watch.measure("collect_s"), torch.no_grad():
            self._collect(index, slot)
        self._hand_over(index, slot, version)

    def interrupt(self) -> None:
        """End a wait for simulators, now and later. Any thread or a signal handler; never waits."""
        self._env.interrupt()

    def _example_inputs(self) -> tuple[TensorDictBase, Tensor]:
        """Return encoded observations and noise of one group, as every decision has them."""
        n, device = len(self._groups[0]), self._buffer.device
        return self._buffer.plan.obs[:n].to(device), torch.zeros(n, self._policy.noise_size, device=device)

    def _hand_over(self, index: int, slot: int, version: int) -> None:
        if self._num_invalid == self._buffer.plan.num_steps * self._env.num_envs:
            reason = self._faults[-1].message if self._faults else "every episode was given up"
            raise EnvError(f"rollout {index}: not one decision is valid; {reason}")
        faults, self._faults = tuple(self._faults), []
        episodes, self._episodes = tuple(self._episodes), []
        journal = self._env.journal()
        journal.note_states(self._states)
        self._buffer.finish_rollout(slot, RolloutInfo(version, episodes, self._watch.take(), faults, journal))

    def _load_weights(self, rollout_index: int) -> int:
        lag = self._settings.max_policy_lag
        wanted = None if lag is None else max(0, rollout_index - lag)
        wait_event(self._built, self._buffer.device)  # the acting copy was made on the building thread's stream
        with self._publisher.lease(wanted) as (version, tensors), torch.no_grad():
            torch._foreach_copy_(self._weights, tensors)
        return version

    def _collect(self, index: int, slot: int) -> None:
        """Interleave the groups: each waits for its chunk, decides, and starts the next one."""
        if not self._obs:
            first = self._env.reset(self._settings.seed, self._journal)
            self._states = first["state"].clone()
            self._check_replay()
            pairs = zip(self._staging, self._groups, strict=True)
            self._obs = [staging.send_rows("obs", first[as_slice(group)]) for staging, group in pairs]
            self._raw = set(range(len(self._groups)))
        self._num_truncations.zero_()
        self._num_invalid = 0
        self._episode_starts = [0] * self._env.num_envs
        num_steps = self._buffer.plan.num_steps
        for t in range(num_steps):
            for g in range(len(self._groups)):
                if t > 0:
                    self._receive(index, slot, t - 1, g)
                self._decide(index, slot, t, g)
        for g, group in enumerate(self._groups):
            self._receive(index, slot, num_steps - 1, g)
            self._buffer.write_obs(slot, num_steps, group, self._encoded_obs(g))

    def _check_replay(self) -> None:
        """Tell if a resumed run does not stand where it was cut."""
        if self._journal is not None and (differing := self._journal.find_differing(self._states)):
            which = ", ".join(str(env) for env in differing)
            cause = "this processor or a changed package rounds differently, or the simulator does not repeat itself"
            message = (
                f"environments {which}: replayed to another state than the run was cut in ({cause}); going on there"
            )
            self._faults.append(Fault("replayed", message))

    def _decide(self, index: int, slot: int, t: int, g: int) -> None:
        """Infer for group `g`, start its chunk, and write the decision while the simulators run."""
        group = self._groups[g]
        with self._watch.measure("inference_s"):
            obs = self._encoded_obs(g)
            decision = self._infer(obs, g, index * self._buffer.plan.num_steps + t)
            executed = decision["actions"][:, : self._policy.n_action_steps]
            actions = self._staging[g].fetch(give_up_non_finite(executed, decision))  # sync: the simulators need them
            self._settings.inference_latency.wait(index, len(group) / self._env.num_envs)  # beyond the device's work
        start_chunk(self._env, actions, group)
        if not bool(actions.isfinite().all()):
            decision = without_non_finite(decision)
        self._buffer.write_obs(slot, t, group, obs)
        self._buffer.write(slot, t, group, decision)

    def _encoded_obs(self, g: int) -> TensorDictBase:
        """Return group `g`'s observation as the ring keeps it; encoded once, also where it begins the next rollout."""
        if g in self._raw:
            self._obs[g] = self._policy.encode_obs(self._obs[g])
            self._raw.remove(g)
        return self._obs[g]

    def _infer(self, obs: TensorDictBase, g: int, decision_index: int) -> TensorDict:
        group = self._groups[g]
        noise = policy_noise(self._settings.seed, group, decision_index, self._policy.noise_size)
        noise = self._staging[g].send("noise", {"noise": noise})["noise"]
        return self._sample(obs, noise)

    def _wait_for_chunk(self, index: int, t: int, g: int) -> ChunkResult:
        """Wait for group `g`'s chunk, its emulated latency included, and trace who simulated it when."""
        group = self._groups[g]
        with self._watch.measure("env_step_s"):
            result = self._env.step_wait(group)
            spans = [(f"worker {span.worker}", span.start_s, span.end_s) for span in result.spans]
            if self._settings.env_latency.mean_s:
                ended_s = max((span.end_s for span in result.spans), default=time.perf_counter())
                spans.append(("emulated", *self._simulators.wait(ended_s, index, len(group) / self._env.num_envs)))
        for lane, start_s, end_s in spans:
            self._tracer.add(lane, "chunk", start_s, end_s, rollout=index, step=t, group=g)
        return result

    def _receive(self, index: int, slot: int, t: int, g: int) -> None:
        """Wait for group `g`'s chunk and write what decision `t` led to."""
        group = self._groups[g]
        result = self._wait_for_chunk(index, t, g)
        outcome = outcome_fields(result, self._settings.gamma, self._store_final_obs(slot, g, result))
        if self._settings.is_success_continued:
            outcome["rewards"] += rewards_after_success(result, self._settings.gamma)
        self._buffer.write(slot, t, group, self._staging[g].send("outcome", outcome))
        self._buffer.count(slot, len(group))
        self._faults += result.faults
        self._follow_episodes(index, slot, t, group, result)
        self._states[as_slice(group)] = result.obs["state"]
        self._obs[g] = self._staging[g].send_rows("obs", result.obs)
        self._raw.add(g)

    def _follow_episodes(self, index: int, slot: int, t: int, group: range, result: ChunkResult) -> None:
        """Note the episodes that ended, and take back what the slot holds of broken ones."""
        now = index * self._buffer.plan.num_steps + t
        for i in (result.terminated | result.truncated | result.broken).nonzero().flatten().tolist():
            env = group[i]
            if result.broken[i]:
                broken = range(self._episode_starts[env], t + 1)
                self._buffer.invalidate(slot, broken, env)
                self._num_invalid += len(broken)
            else:
                length = int(result.episode_length[i])
                start = now + 1 - math.ceil(length / self._policy.n_action_steps)  # its last chunk alone may be short
                episode_return, is_success = float(result.episode_return[i]), bool(result.is_success[i])
                self._episodes.append(Episode(start, episode_return, length, is_success))
            self._episode_starts[env] = t + 1

    def _store_final_obs(self, slot: int, g: int, result: ChunkResult) -> Tensor:
        """Put true final observations into the side table and return each environment's row there, [n]."""
        group = self._groups[g]
        rows = self._num_truncations[as_slice(group)].clone()
        cut = result.truncated.nonzero().flatten().tolist()
        if cut:
            sent = self._staging[g].send_rows("final_obs", result.final_obs)
            ended: Any = torch.stack([sent[i] for i in cut])  # a list as index would be uploaded, with a wait
            finals = self._policy.encode_obs(ended)
        for row, i in enumerate(cut):
            self._buffer.write_final_obs(slot, int(rows[i]), group[i], finals[row])
            self._num_truncations[group[i]] += 1
        return torch.where(result.truncated, rows, torch.zeros_like(rows))


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
