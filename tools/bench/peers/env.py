"""asyncflow's simulator as a gymnasium environment, for the peers: one action is a whole chunk.

Owns what gymnasium asks for. Who resets it, and in which process, is the peer's business.

Shapes: H executed actions of a chunk, A action size, D size of the `state` observation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from asyncflow.config.sections import EnvConfig
from asyncflow.config.tasks import resolve_task
from asyncflow.seeding import derive_seed
from asyncflow.simulators.robosuite.simulator import RobosuiteSimulator
from tools.bench.core.workers import CHUNK_LENGTH, HORIZON
from tools.bench.peers.setting import GAMMA


@dataclass(frozen=True)
class EnvPlan:
    """What the environments of one run have in common."""

    fast_step: bool
    seed: int


class ChunkEnv(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """Lift, whose step executes H actions, or fewer where the episode ends; `info["executed"]` says how many."""

    def __init__(self, plan: EnvPlan, index: int) -> None:
        """Construct the simulator of one environment, with the seeds that asyncflow's own would have."""
        settings = resolve_task(EnvConfig(task="Lift", horizon=HORIZON, fast_step=plan.fast_step))
        self._simulator = RobosuiteSimulator(settings, derive_seed(plan.seed, "simulator", index))
        self._seed, self._index, self._episode, self._length = plan.seed, index, 0, 0
        spec = self._simulator.spec
        self._action_dim = spec.action_dim
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, spec.state_shape, np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (CHUNK_LENGTH * spec.action_dim,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start the next episode; `seed` is not read, as the environment's own decides."""
        self._simulator.reset(derive_seed(self._seed, "episode", self._index, self._episode))
        self._episode, self._length = self._episode + 1, 0
        return self._simulator.observe(), {"executed": np.int64(0)}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Execute a chunk, [H * A]; return observation, `sum_i gamma^i r_i`, both ends, and the steps executed."""
        total, terminated = 0.0, False
        for executed, each in enumerate(action.reshape(-1, self._action_dim)):
            reward, terminated = self._simulator.step(each)
            total += GAMMA**executed * reward
            self._length += 1
            if terminated or self._length >= HORIZON:
                break
        truncated = self._length >= HORIZON and not terminated
        return self._simulator.observe(), total, terminated, truncated, {"executed": np.int64(executed + 1)}

    def close(self) -> None:
        """Free the simulator."""
        self._simulator.close()
