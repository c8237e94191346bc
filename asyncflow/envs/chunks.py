"""How one simulator executes chunks, in any process: an episode's end, its reset and seed, where results are written.

Shapes: N environments, n of them addressed by one call, H executed actions of a chunk, A action size, D size of the
`state` observation, O env steps that an observation shows (n_obs_steps), C cameras, P points of a cloud.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asyncflow.config.contracts import name_of
from asyncflow.config.observations import KINDS, Shape
from asyncflow.devices import share_memory
from asyncflow.envs.base import Fault, Simulator, StepResult
from asyncflow.envs.contract import CheckedSimulator
from asyncflow.errors import ContractError, EnvError
from asyncflow.seeding import derive_seed

MAX_STATE = 4096
MAX_ACTION = 64
_NONFINITE = ("", "action", "reward", "observation")  # what a number of the board's column stands for
_OUTCOME = (
    "rewards", "executed", "terminated", "truncated", "succeeded", "episode_return", "episode_length", "nonfinite",
    "nonfinite_step",
)  # fmt: skip


@dataclass(frozen=True)
class ChunkBoard:
    """The memory that the parent and its workers share; row i belongs to environment i.

    It is allocated before a simulator says how much it needs, hence the room for `MAX_STATE` and `MAX_ACTION`: pages
    that nobody writes take no memory. What cameras yield is known from the configuration.

    Attributes:
        actions: [N, H, MAX_ACTION] written by the parent, everything else by the workers.
        obs: [N, MAX_STATE] observation to decide on next, of which O * D numbers are used.
        final_obs: [N, MAX_STATE] last observation of the chunk's own episode.
        rendered: Kind -> [N, O, C, ...], what cameras yield with `obs`; a kind that none yields is absent.
        final_rendered: The same of `final_obs`.
        rewards: [N, H] zero after the episode's end.
        executed: [N] env steps executed; zero where the chunk counts for nothing.
        terminated: [N] the episode ended by itself, as by success.
        truncated: [N] the episode was cut, at the horizon at the latest.
        succeeded: [N] an episode ended that solved the task.
        episode_return: [N] undiscounted return of the episode that ended, or zero.
        episode_length: [N] env steps of the episode that ended, or zero.
        nonfinite: [N] what was not finite, as a place in `_NONFINITE`; zero if nothing was.
        nonfinite_step: [N] in which env step of its episode, from 1; or zero.
        started_s: [N] when the chunk began, in `time.perf_counter` seconds.
        ended_s: [N] when it ended, the next episode's reset included.
        n_obs_steps: O.
    """

    actions: Tensor
    obs: Tensor
    final_obs: Tensor
    rendered: dict[str, Tensor]
    final_rendered: dict[str, Tensor]
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
    n_obs_steps: int

    @classmethod
    def allocate(
        cls,
        num_envs: int,
        chunk_length: int,
        n_obs_steps: int = 1,
        rooms: Mapping[str, Shape] | None = None,
    ) -> ChunkBoard:
        """Allocate shared memory without a name, which the system frees with its last user.

        Args:
            num_envs: N.
            chunk_length: H.
            n_obs_steps: O.
            rooms: Kind -> [C, ...], what all cameras of a kind yield at one env step.

        Raises:
            ConfigError: /dev/shm is too small, which would kill the process at a write, or cannot be written.
        """

        def rendered() -> dict[str, Tensor]:
            sizes = {kind: (num_envs, n_obs_steps, *room) for kind, room in (rooms or {}).items()}
            return {kind: torch.empty(size, dtype=getattr(torch, KINDS[kind].dtype)) for kind, size in sizes.items()}

        board = cls(
            actions=torch.zeros(num_envs, chunk_length, MAX_ACTION),
            obs=torch.empty(num_envs, MAX_STATE),
            final_obs=torch.empty(num_envs, MAX_STATE),
            rendered=rendered(),
            final_rendered=rendered(),
            rewards=torch.zeros(num_envs, chunk_length),
            executed=torch.zeros(num_envs, dtype=torch.int64),
            terminated=torch.zeros(num_envs, dtype=torch.bool),
            truncated=torch.zeros(num_envs, dtype=torch.bool),
            succeeded=torch.zeros(num_envs, dtype=torch.bool),
            episode_return=torch.zeros(num_envs),
            episode_length=torch.zeros(num_envs, dtype=torch.int64),
            nonfinite=torch.zeros(num_envs, dtype=torch.int64),
            nonfinite_step=torch.zeros(num_envs, dtype=torch.int64),
            started_s=torch.zeros(num_envs, dtype=torch.float64),
            ended_s=torch.zeros(num_envs, dtype=torch.float64),
            n_obs_steps=n_obs_steps,
        )
        share_memory(list(board.tensors().values()))
        return board

    def tensors(self) -> dict[str, Tensor]:
        """Return all memory by name; that of a kind is `KIND` and `final_KIND`."""
        named = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        plain = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        return plain | self.rendered | {f"final_{kind}": tensor for kind, tensor in self.final_rendered.items()}

    def row(self, env: int) -> dict[str, NDArray[Any]]:
        """Return writable views of one environment's row."""
        return {name: tensor.numpy()[env, ...] for name, tensor in self.tensors().items()}

    def nonfinite_fault(self, env: int, episode: int) -> Fault | None:
        """Return why the last chunk of an environment gave up its episode; None if the numbers were finite."""
        cause, step = int(self.nonfinite[env]), int(self.nonfinite_step[env])
        return nonfinite_fault(env, episode, step, _NONFINITE[cause]) if cause else None


class _NonFiniteError(Exception):
    """A number of a chunk is not finite: what it is, and in which env step of the episode."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(what, step)
        self.cause = _NONFINITE.index(what)
        self.step = step


class _Frame(NamedTuple):
    """One moment of an episode: [D], and what `Simulator.render` returned; nothing if it was not asked."""

    state: NDArray[np.float32]
    rendered: dict[str, NDArray[Any]]


class EpisodeRunner:
    """Executes chunks in one simulator, episode after episode, and writes the results into its row of the board."""

    def __init__(self, simulator: Simulator, env: int, board: ChunkBoard) -> None:
        """Take over a simulator.

        Args:
            simulator: Used by nobody else from now on.
            env: Index of the environment, which keys its seeds and is its row.
            board: Memory shared with the parent.

        Raises:
            ContractError: As `CheckedSimulator`, or the board has no room for what its spec says.
        """
        self._n_obs_steps, self._kinds = board.n_obs_steps, tuple(board.rendered)
        self._simulator = CheckedSimulator(simulator, {kind: each.shape[2:] for kind, each in board.rendered.items()})
        self.spec = self._simulator.spec.with_history(self._n_obs_steps)
        self.notices = tuple(map(str, getattr(simulator, "notices", ())))
        self._env = env
        self._row = board.row(env)
        self._history: deque[_Frame] = deque(maxlen=self._n_obs_steps)
        self._size = math.prod(self.spec.state_shape)
        self._action_dim = self.spec.action_dim
        if self._size > MAX_STATE or self._action_dim > MAX_ACTION:
            raise ContractError(
                f"{name_of(simulator)}.spec: state has {self._size} of at most {MAX_STATE} numbers, "
                f"actions {self._action_dim} of at most {MAX_ACTION}"
            )

    def begin(self, seed: int, episode: int) -> None:
        """Start an episode and write its first observation, as after a chunk that counts for nothing.

        Args:
            seed: The seed that those of all episodes are derived from.
            episode: Number of the episode.

        Raises:
            EnvError: The observation is not finite.
        """
        self._seed = seed
        self._begin_episode(episode)
        self._clear_row()

    def execute(self, is_rendered: bool = True) -> None:
        """Execute the chunk that the row holds, up to the episode's end, then start the next episode if it ended.

        An action, a reward or an observation that is not finite ends the episode, too. The chunk then counts for
        nothing, and the row says what it was. Unless it `is_rendered`, the row's images and clouds are old ones.

        Raises:
            EnvError: The first observation of the next episode is not finite.
        """
        length = self._length
        self._row["started_s"][...] = time.perf_counter()
        try:
            last = self._step_chunk(is_rendered)
            self._look(is_rendered and not last.terminated)
            self._write("final_")
        except _NonFiniteError as error:
            self._give_up(error)
        else:
            self._finish_chunk(self._length - length, last)
        self._row["ended_s"][...] = time.perf_counter()

    def _step_chunk(self, is_rendered: bool) -> StepResult:
        """Execute actions up to the episode's end; return what the last one did."""
        self._row["rewards"][:] = 0.0
        actions = self._row["actions"][:, : self._action_dim]
        is_finite = np.isfinite(actions).all(axis=1)
        if not is_finite.all():  # MuJoCo would quietly reset its state to the model's default
            raise _NonFiniteError("action", self._length + 1 + int(is_finite.argmin()))
        planned = min(len(actions), self.spec.horizon - self._length)
        for step, action in enumerate(actions[:planned]):
            last = self._simulator.step(action)
            self._length += 1
            self._return += last.reward
            self._row["rewards"][step] = last.reward
            if not math.isfinite(self._row["rewards"][step]):
                raise _NonFiniteError("reward", self._length)
            if last.terminated or last.truncated:
                break
            if planned - self._n_obs_steps <= step < planned - 1:  # the last one is looked at by the caller
                self._look(is_rendered)
        return last

    def _finish_chunk(self, executed: int, last: StepResult) -> None:
        row, terminated = self._row, last.terminated
        has_ended = terminated or last.truncated or self._length >= self.spec.horizon
        row["executed"][...], row["terminated"][...] = executed, terminated
        row["truncated"][...] = has_ended and not terminated
        row["succeeded"][...] = has_ended and last.is_success
        row["episode_return"][...] = self._return if has_ended else 0.0
        row["episode_length"][...] = self._length if has_ended else 0
        if has_ended:
            self._begin_episode(self._episode + 1)
        else:
            row["obs"][: self._size] = row["final_obs"][: self._size]
            self._copy_rendered("final_", "")
        if terminated:
            self._copy_rendered("", "final_")

    def _give_up(self, error: _NonFiniteError) -> None:
        self._begin_episode(self._episode + 1)
        self._clear_row()
        self._row["nonfinite"][...], self._row["nonfinite_step"][...] = error.cause, error.step

    def _begin_episode(self, episode: int) -> None:
        self._episode, self._length, self._return = episode, 0, 0.0
        self._simulator.reset(derive_seed(self._seed, "episode", self._env, episode))
        try:
            self._look()
        except _NonFiniteError:
            raise EnvError(
                f"environment {self._env}: the first observation of episode {episode} is not finite"
            ) from None
        self._history.extend([self._history[-1]] * self._n_obs_steps)  # an episode begins at rest
        self._write()

    def _look(self, is_rendered: bool = True) -> None:
        """Take the present moment into the history; rendering takes far longer than the rest."""
        self._check_finite(state := self._simulator.observe())
        rendered = self._simulator.render() if is_rendered and self._kinds else {}
        for values in rendered.values():
            if values.dtype.kind == "f":
                self._check_finite(values)
        self._history.append(_Frame(state, rendered))

    def _check_finite(self, numbers: NDArray[np.float32]) -> None:
        if not np.isfinite(numbers).all():
            raise _NonFiniteError("observation", self._length)

    def _write(self, prefix: str = "") -> None:
        """Write the history, oldest first, to `obs` or `final_obs` and their images; a success is not rendered."""
        self._row[f"{prefix}obs"][: self._size] = np.concatenate([frame.state for frame in self._history])
        for step, frame in enumerate(self._history):
            for kind, values in frame.rendered.items():
                self._row[f"{prefix}{kind}"][step] = values

    def _copy_rendered(self, source: str, target: str) -> None:
        for kind in self._kinds:
            self._row[target + kind][...] = self._row[source + kind]

    def _clear_row(self) -> None:
        """Make the row that of a chunk that counts for nothing, before the first observation of an episode."""
        for name in _OUTCOME:
            self._row[name][...] = 0
        self._row["final_obs"][: self._size] = self._row["obs"][: self._size]
        self._copy_rendered("", "final_")


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
