"""How one simulator executes chunks: the episode's end, its reset, its seed, and where the results are written.

Owns the chunk semantics of the contract in `base`. It must not know which process it runs in.

Shapes: N environments, n of them addressed by one call, H executed actions of a chunk, A action size, D size of the
`state` observation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from asyncflow.envs.base import EnvSpec
from asyncflow.errors import EnvError
from asyncflow.seeding import derive_seed

MAX_STATE = 4096
MAX_ACTION = 64


class Simulator(Protocol):
    """One simulated environment, which knows neither its horizon nor its index."""

    spec: EnvSpec

    def reset(self, seed: int) -> None:
        """Start the episode that belongs to `seed`."""

    def step(self, action: NDArray[Any]) -> tuple[float, bool]:
        """Execute one action, [A]; return its reward and whether the task is solved now."""

    def observe(self) -> NDArray[Any]:
        """Return the `state` observation after the last step or reset, [D]."""


@dataclass(frozen=True)
class ChunkBoard:
    """The memory that the parent and its workers share; row i belongs to environment i.

    It is allocated before a simulator says how much it needs, hence the room for `MAX_STATE` and `MAX_ACTION`: pages
    that nobody writes take no memory.

    Attributes:
        actions: [N, H, MAX_ACTION] written by the parent, everything else by the workers.
        obs: [N, MAX_STATE] observation to decide on next.
        final_obs: [N, MAX_STATE] last observation of the chunk's own episode.
        rewards: [N, H] zero after the episode's end.
        executed: [N] env steps executed.
        terminated: [N] the task was solved.
        truncated: [N] the horizon was reached without success.
        episode_return: [N] undiscounted return of the episode that ended, or zero.
        episode_length: [N] env steps of the episode that ended, or zero.
    """

    actions: Tensor
    obs: Tensor
    final_obs: Tensor
    rewards: Tensor
    executed: Tensor
    terminated: Tensor
    truncated: Tensor
    episode_return: Tensor
    episode_length: Tensor

    @classmethod
    def allocate(cls, num_envs: int, chunk_length: int) -> ChunkBoard:
        """Allocate shared memory without a name, which the system frees with its last user."""
        board = cls(
            actions=torch.zeros(num_envs, chunk_length, MAX_ACTION),
            obs=torch.empty(num_envs, MAX_STATE),
            final_obs=torch.empty(num_envs, MAX_STATE),
            rewards=torch.zeros(num_envs, chunk_length),
            executed=torch.zeros(num_envs, dtype=torch.int64),
            terminated=torch.zeros(num_envs, dtype=torch.bool),
            truncated=torch.zeros(num_envs, dtype=torch.bool),
            episode_return=torch.zeros(num_envs),
            episode_length=torch.zeros(num_envs, dtype=torch.int64),
        )
        for entry in fields(board):
            getattr(board, entry.name).share_memory_()
        return board

    def row(self, env: int) -> dict[str, NDArray[Any]]:
        """Return writable views of one environment's row."""
        return {entry.name: getattr(self, entry.name).numpy()[env, ...] for entry in fields(self)}


class EpisodeRunner:
    """Executes chunks in one simulator, episode after episode, and writes the results into its row of the board."""

    def __init__(self, simulator: Simulator, env: int, board: ChunkBoard) -> None:
        """Take over a simulator.

        Args:
            simulator: Used by nobody else from now on.
            env: Index of the environment, which keys its seeds and is its row.
            board: Memory shared with the parent.
        """
        self.spec = simulator.spec
        self._simulator = simulator
        self._env = env
        self._row = board.row(env)
        self._size = simulator.spec.obs_shapes["state"][0]
        self._action_dim = simulator.spec.action_dim
        if self._size > MAX_STATE or self._action_dim > MAX_ACTION:
            raise EnvError(
                f"state has {self._size} of at most {MAX_STATE} numbers, "
                f"actions {self._action_dim} of at most {MAX_ACTION}"
            )

    def reset(self, seed: int) -> None:
        """Start episode 0 and write its first observation."""
        self._seed = seed
        self._episode = -1
        self._begin_episode()
        self._row["obs"][: self._size] = self._simulator.observe()

    def execute(self) -> None:
        """Execute the chunk that the row holds, up to the episode's end, then start the next episode if it ended."""
        row, horizon = self._row, self.spec.horizon
        row["rewards"][:] = 0.0
        terminated, executed = False, 0
        for action in row["actions"][:, : self._action_dim]:
            reward, terminated = self._simulator.step(action)
            row["rewards"][executed] = reward
            self._return += reward
            executed += 1
            if terminated or self._length + executed >= horizon:
                break
        self._length += executed
        row["executed"][...], row["terminated"][...] = executed, terminated
        row["truncated"][...] = self._length >= horizon and not terminated
        self._observe(has_ended=terminated or self._length >= horizon)

    def _observe(self, has_ended: bool) -> None:
        row, size = self._row, self._size
        row["final_obs"][:size] = self._simulator.observe()
        row["episode_return"][...] = self._return if has_ended else 0.0
        row["episode_length"][...] = self._length if has_ended else 0
        if has_ended:
            self._begin_episode()
            row["obs"][:size] = self._simulator.observe()
        else:
            row["obs"][:size] = row["final_obs"][:size]

    def _begin_episode(self) -> None:
        self._episode += 1
        self._length, self._return = 0, 0.0
        self._simulator.reset(derive_seed(self._seed, "episode", self._env, self._episode))


def check_actions(actions: Tensor, shape: tuple[int, int, int], env_ids: range, pending: Iterable[range]) -> None:
    """Check a chunk before it is started.

    Args:
        actions: The chunk.
        shape: (n, H, A) that it must have.
        env_ids: The environments addressed.
        pending: The environments addressed by chunks under way.

    Raises:
        EnvError: Wrong shape, an action that is not finite, or an environment that is busy.
    """
    if tuple(actions.shape) != shape:
        raise EnvError(f"actions have shape {tuple(actions.shape)}, expected {shape} for {env_ids}")
    if not bool(actions.isfinite().all()):  # MuJoCo would quietly reset its state to the model's default
        raise EnvError(f"actions for {env_ids} are not finite; lower the learning rate or look for NaN in the policy")
    busy = set(env_ids).intersection(*[set().union(*pending)])
    if busy:
        raise EnvError(f"step_async({env_ids}): a chunk is under way in environments {sorted(busy)}")
