"""Chunks of actions as the parent sees them: the shared board as tensors, and what may be started.

Shapes: N environments, n of them addressed by one call, H executed actions of a chunk, A action size, O env steps that
an observation shows (n_obs_steps), C cameras.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from asyncflow.config.observations import Shape
from asyncflow.devices import check_memory
from asyncflow.envs.base import Fault
from asyncflow.errors import ConfigError, EnvError
from asyncflow.simulators.board import FINAL, Board, BoardPlan
from asyncflow.simulators.runner import NONFINITE


class ChunkBoard:
    """The shared memory as tensors; `BoardPlan.arrays` says what they are.

    Attributes:
        memory: The shared memory itself.
        rendered: Kind -> [N, O, C, ...], what cameras yield with `obs`; a kind that none yields is absent.
        final_rendered: The same of `final_obs`.
    """

    actions: Tensor
    obs: Tensor
    final_obs: Tensor
    rewards: Tensor
    executed: Tensor
    terminated: Tensor
    truncated: Tensor
    succeeded: Tensor
    episode_return: Tensor
    episode_length: Tensor
    nonfinite: Tensor
    nonfinite_step: Tensor
    started_s: Tensor
    ended_s: Tensor

    def __init__(self, memory: Board) -> None:
        """Look at shared memory."""
        self.memory = memory
        tensors = {name: torch.from_numpy(array) for name, array in memory.arrays.items()}
        self.rendered = {kind: tensors.pop(kind) for kind in memory.kinds}
        self.final_rendered = {kind: tensors.pop(FINAL + kind) for kind in memory.kinds}
        self._tensors = tuple(tensors)
        self.__dict__.update(tensors)

    @classmethod
    def allocate(
        cls, num_envs: int, chunk_length: int, n_obs_steps: int = 1, rooms: Mapping[str, Shape] | None = None
    ) -> ChunkBoard:
        """Allocate a board; arguments as `BoardPlan`.

        Raises:
            ConfigError: There is too little memory for it.
        """
        plan = BoardPlan(num_envs, chunk_length, n_obs_steps, dict(rooms or {}))
        num_bytes = plan.offsets()[1]
        keys = "env.num_envs or env.camera_size or env.num_points"
        check_memory(num_bytes, torch.device("cpu"), keys)
        try:
            return cls(Board.create(plan))
        except OSError as error:
            if error.errno == errno.EMFILE:
                raise  # the command line says how many there may be
            raise ConfigError(
                f"shared memory: simulators answer through {num_bytes} bytes of it, which cannot be had: "
                f"{error.strerror}; lower {keys}, or raise the limit (memory of a container, ulimit -f)"
            ) from error

    def nonfinite_fault(self, env: int, episode: int) -> Fault | None:
        """Return why the last chunk of an environment gave up its episode; None if the numbers were finite."""
        cause, step = int(self.nonfinite[env]), int(self.nonfinite_step[env])
        return nonfinite_fault(env, episode, step, NONFINITE[cause]) if cause else None

    def close(self) -> None:
        """Let go of the memory, which goes with the last user of its tensors; may be called twice."""
        self.memory.close()
        self.__dict__.update(dict.fromkeys(self._tensors, torch.empty(0)), rendered={}, final_rendered={})


def nonfinite_fault(env: int, episode: int, step: int, what: str) -> Fault:
    """Return the fault of an episode that was given up.

    Args:
        env: Index of the environment.
        episode: Number of the episode.
        step: Env step of the episode, from 1.
        what: `"action"`, `"reward"` or `"observation"`.
    """
    return Fault(
        "nonfinite", f"environment {env} gave up episode {episode}: the {what} of its env step {step} is not finite"
    )


def check_actions(actions: Tensor, shape: tuple[int, int, int], env_ids: range, pending: Iterable[range]) -> None:
    """Check a chunk before it is started.

    Args:
        actions: The chunk.
        shape: (n, H, A) that it must have.
        env_ids: The environments addressed.
        pending: The environments addressed by chunks under way.

    Raises:
        EnvError: Wrong shape, or an environment that is busy.
    """
    if tuple(actions.shape) != shape:
        raise EnvError(f"actions have shape {tuple(actions.shape)}, expected {shape} for {env_ids}")
    busy = set(env_ids).intersection(*[set().union(*pending)])
    if busy:
        raise EnvError(f"step_async({env_ids}): a chunk is under way in environments {sorted(busy)}")
