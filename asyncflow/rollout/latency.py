"""Emulated latencies: how long a stage of the loop pretends to take, for planning and for checking the profiler.

The waiting is outside the interpreter's lock. One factor belongs to a whole rollout, so that the spread is that of a
stage: with a factor per decision, a rollout's sum would hardly vary.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np

from asyncflow.config.sections import TrainerConfig
from asyncflow.seeding import derive_seed

Spread = Literal["constant", "uniform", "exponential", "lognormal"]


@dataclass(frozen=True)
class EmulatedLatency:
    """Seconds that one call of a stage takes in addition, keyed by seed, purpose and rollout.

    Attributes:
        mean_s: Mean of a call that serves all environments, or a whole minibatch; 0 emulates nothing.
        spread: Shape of the distribution over rollouts.
        coefficient: Standard deviation over mean; the exponential distribution's is 1 whatever stands here.
        seed: The run's seed.
        purpose: Name of the stage, which separates its numbers from those of the others.
    """

    mean_s: float = 0.0
    spread: Spread = "constant"
    coefficient: float = 0.0
    seed: int = 0
    purpose: str = ""

    @classmethod
    def from_config(cls, config: TrainerConfig, purpose: str, mean_s: float) -> EmulatedLatency:
        """Return how long a stage of a run pretends to take; `mean_s` stands in the section of that stage."""
        return cls(mean_s, config.emulated_spread, config.emulated_variation, config.seed, purpose)

    def factor(self, rollout: int) -> float:
        """Return by how much the calls of one rollout are longer than the mean."""
        if self.spread == "constant":
            return 1.0
        rng = np.random.default_rng(derive_seed(self.seed, f"latency_{self.purpose}", rollout))
        if self.spread == "uniform":
            return 1.0 + self.coefficient * math.sqrt(3.0) * (2.0 * rng.random() - 1.0)
        if self.spread == "exponential":
            return float(rng.exponential())
        variance = math.log1p(self.coefficient**2)
        return math.exp(math.sqrt(variance) * rng.standard_normal() - variance / 2)

    def seconds(self, rollout: int, share: float = 1.0) -> float:
        """Return what a call takes that serves `share` of the environments."""
        return self.mean_s * share * self.factor(rollout) if self.mean_s else 0.0

    def wait(self, rollout: int, share: float = 1.0) -> None:
        """Take that long."""
        if self.mean_s:
            time.sleep(self.seconds(rollout, share))


NO_LATENCY = EmulatedLatency()


class EmulatedSimulators:
    """Lets chunks take longer, one after another, as in processes that every group shares. One thread uses it."""

    def __init__(self, latency: EmulatedLatency) -> None:
        self.latency = latency
        self._free_at = 0.0

    def wait(self, ended_s: float, rollout: int, share: float) -> tuple[float, float]:
        """Wait until a chunk would have been simulated, called in the order in which chunks were started.

        Args:
            ended_s: When its real simulation ended, in `time.perf_counter` seconds.
            rollout: Number of the rollout.
            share: Part of the environments in it.

        Returns:
            When its emulated simulation began and ended.
        """
        start = max(ended_s, self._free_at)
        self._free_at = start + self.latency.seconds(rollout, share)
        time.sleep(max(0.0, self._free_at - time.perf_counter()))
        return start, self._free_at
