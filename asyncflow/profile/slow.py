"""Stages that take longer than they do: wrappers around simulators, policy and update, for `asyncflow profile`.

With them, overlap can be planned for hardware that is not there, and the profiler checked against stages of known
length. A run of `asyncflow train` wears none of them. One factor belongs to a whole rollout, so that the spread is that
of a stage: with a factor per decision, a rollout's sum would hardly vary. Waiting is outside the interpreter's lock.

Shapes: T decisions, N environments, n of them in a group, H executed actions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from asyncflow.config.sections import MAX_SECONDS
from asyncflow.envs.base import ChunkResult, ChunkSpan, VecEnv
from asyncflow.envs.journal import EpisodeJournal
from asyncflow.errors import ConfigError
from asyncflow.ppo.ppo import PPO
from asyncflow.rollout.inference import Sampler
from asyncflow.rollout.ring import Rollout
from asyncflow.rollout.streams import finish_event, record_event
from asyncflow.run.trainer import Trainer
from asyncflow.seeding import derive_seed
from asyncflow.simulators.spec import EnvSpec

Spread = Literal["constant", "uniform", "exponential", "lognormal"]
LANE = "emulated"  # of emulated simulation in a trace


@dataclass(frozen=True)
class Emulation:
    """How much longer the stages of a run take, and how that varies from rollout to rollout.

    Attributes:
        inference_s: Mean seconds that a decision of all environments takes longer; a group takes its share.
        env_s: The same of a chunk.
        update_s: The same of a minibatch.
        spread: Shape of the distribution over rollouts.
        variation: Standard deviation over mean; the exponential distribution's is 1 whatever stands here.
    """

    inference_s: float = 0.0
    env_s: float = 0.0
    update_s: float = 0.0
    spread: Spread = "constant"
    variation: float = 0.5

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            ConfigError: The spread is none, or a number is out of its range.
        """
        for name in ("inference_s", "env_s", "update_s"):
            if not 0 <= getattr(self, name) <= MAX_SECONDS:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be 0 to {MAX_SECONDS:g}")
        if self.spread not in get_args(Spread):
            raise ConfigError(f"--spread {self.spread}: must be one of {', '.join(get_args(Spread))}")
        most = 3**-0.5 if self.spread == "uniform" else 100.0  # beyond it, a uniform latency would be negative
        if not 0 <= self.variation <= most:
            raise ConfigError(f"--variation {self.variation}: must be 0 to {most:.2g} for a {self.spread} spread")

    def put_on(self, trainer: Trainer) -> None:
        """Let a trainer's stages take longer from now on; called before it trains. Allocates its ring."""
        trainer.collecting.set_up(trainer.progress)
        seed, first = trainer.settings.seed, trainer.progress.next_rollout
        size, num_envs = trainer.collecting.plan.num_decisions, trainer.env.num_envs

        def latency(purpose: str, mean_s: float) -> Latency:
            return Latency(mean_s, self.spread, self.variation, seed, purpose)

        writer = trainer.collecting.writer
        if self.env_s:
            writer.env = SlowVecEnv(writer.env, latency("env", self.env_s), RolloutCount(size, first))
        if self.inference_s:
            slow_inference = latency("inference", self.inference_s)
            writer.sample = SlowPolicy(writer.sample, slow_inference, RolloutCount(size, first), num_envs)
        if self.update_s:
            trainer.ppo = SlowPPO(trainer.ppo, latency("update", self.update_s))


NOTHING = Emulation()


@dataclass(frozen=True)
class Latency:
    """Seconds that one call of a stage takes longer, keyed by seed, purpose and rollout.

    Attributes:
        mean_s: Mean of a call that serves all environments, or a whole minibatch.
        spread: As in `Emulation`.
        variation: As in `Emulation`.
        seed: The run's seed.
        purpose: Name of the stage, which separates its numbers from those of the others.
    """

    mean_s: float
    spread: Spread = "constant"
    variation: float = 0.0
    seed: int = 0
    purpose: str = ""

    def factor(self, rollout: int) -> float:
        """Return by how much the calls of one rollout are longer than the mean."""
        if self.spread == "constant":
            return 1.0
        rng = np.random.default_rng(derive_seed(self.seed, f"latency_{self.purpose}", rollout))
        if self.spread == "uniform":
            return 1.0 + self.variation * math.sqrt(3.0) * (2.0 * rng.random() - 1.0)
        if self.spread == "exponential":
            return float(rng.exponential())
        variance = math.log1p(self.variation**2)
        return math.exp(math.sqrt(variance) * rng.standard_normal() - variance / 2)

    def seconds(self, rollout: int, share: float = 1.0) -> float:
        """Return what a call takes that serves `share` of the environments."""
        return self.mean_s * share * self.factor(rollout)

    def wait(self, rollout: int, share: float = 1.0) -> None:
        """Take that long."""
        time.sleep(self.seconds(rollout, share))


class RolloutCount:
    """Tells to which rollout a call belongs: a rollout has T x N decisions, and groups meet at its end."""

    def __init__(self, size: int, first: int = 0) -> None:
        """Start at the beginning of rollout `first`; a rollout has `size` decisions."""
        self._size, self._num_decisions = size, first * size

    def add(self, num_decisions: int) -> int:
        """Count a call's decisions and return their rollout."""
        rollout = self._num_decisions // self._size
        self._num_decisions += num_decisions
        return rollout


class SlowVecEnv(VecEnv):
    """Environments whose chunks take longer, one after another, as in processes that all groups share."""

    def __init__(self, env: VecEnv, latency: Latency, count: RolloutCount) -> None:
        """Take over environments, which nobody else uses from now on but for `interrupt` and `close`."""
        self.env, self.num_envs, self.spec, self.notices = env, env.num_envs, env.spec, env.notices
        self.versions = env.versions
        self._latency, self._count, self._free_at = latency, count, 0.0

    @property
    def simulator_spec(self) -> EnvSpec:
        """What the environments can be built from again."""
        return self.env.simulator_spec

    def reset(self, seed: int, journal: EpisodeJournal | None = None) -> TensorDict:
        """Start or rebuild episodes, as fast as ever."""
        return self.env.reset(seed, journal)

    def journal(self) -> EpisodeJournal:
        """Return the environments' journal."""
        return self.env.journal()

    def step_async(self, actions: Tensor, env_ids: range) -> None:
        """Start one chunk in each of `env_ids`."""
        self.env.step_async(actions, env_ids)

    def step_wait(self, env_ids: range) -> ChunkResult:
        """Wait for a chunk, then until it would have been simulated; waited for in the order of their start."""
        result = self.env.step_wait(env_ids)
        ended_s = max((span.end_s for span in result.spans), default=time.perf_counter())
        start_s = max(ended_s, self._free_at)
        seconds = self._latency.seconds(self._count.add(len(env_ids)), len(env_ids) / self.num_envs)
        self._free_at = start_s + seconds
        time.sleep(max(0.0, self._free_at - time.perf_counter()))
        return replace(result, spans=(*result.spans, ChunkSpan(LANE, start_s, self._free_at)))

    def interrupt(self) -> None:
        """End a wait for simulators."""
        self.env.interrupt()

    def close(self) -> None:
        """Stop the simulators."""
        self.env.close()


class SlowPolicy:
    """A policy's decisions, which take longer by the whole latency: on a GPU it begins when the device is done."""

    def __init__(self, sample: Sampler, latency: Latency, count: RolloutCount, num_envs: int) -> None:
        """Take over how the collector's policy decides."""
        self._sample, self._latency, self._count, self._num_envs = sample, latency, count, num_envs

    def __call__(self, obs: TensorDictBase, noise: Tensor) -> TensorDict:
        """Decide, [n]; only the collector calls it."""
        decision = self._sample(obs, noise)
        finish_event(record_event(noise.device))  # sync: emulated latencies come on top of the device's work
        self._latency.wait(self._count.add(len(noise)), len(noise) / self._num_envs)
        return decision


class SlowPPO(PPO):
    """PPO whose minibatches take longer: each begins with a wait, in which kernels launched before run on."""

    def __init__(self, ppo: PPO, latency: Latency) -> None:
        """Take over a PPO with its optimizer; the other one is not used any more."""
        vars(self).update(vars(ppo))
        self._latency = latency

    def update(self, rollout: Rollout, version: int, on_minibatch: Callable[[], None]) -> dict[str, float]:
        """As `PPO.update`."""

        def wait() -> None:
            on_minibatch()
            self._latency.wait(version)

        return super().update(rollout, version, wait)
