"""Executes chunks in one simulator, episode after episode, and writes what they yield to the shared board.

An episode ends by itself, is cut at the horizon, or is given up because a number in it is not finite. A chunk never
crosses an episode's end.

Shapes: H executed actions of a chunk, D size of the `state` observation, O env steps that an observation shows
(n_obs_steps), C cameras, P points of a cloud.
"""

from __future__ import annotations

import math
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from asyncflow.config.contracts import name_of
from asyncflow.errors import ContractError, EnvError
from asyncflow.seeding import derive_seed
from asyncflow.simulators.board import FINAL, MAX_ACTION, MAX_STATE
from asyncflow.simulators.checked import CheckedSimulator

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from asyncflow.simulators.base import Simulator, StepResult
    from asyncflow.simulators.board import Board

NONFINITE = ("", "action", "reward", "observation")  # what a number of the board's column stands for
_OUTCOME = (
    "rewards", "executed", "terminated", "truncated", "succeeded", "episode_return", "episode_length", "nonfinite",
    "nonfinite_step",
)  # fmt: skip


class _NonFiniteError(Exception):
    """A number of a chunk is not finite: what it is, and in which env step of the episode."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(what, step)
        self.cause = NONFINITE.index(what)
        self.step = step


class _Frame(NamedTuple):
    """One moment of an episode: [D], and what `Simulator.render` returned; nothing if it was not asked."""

    state: NDArray[np.float32]
    rendered: dict[str, NDArray[Any]]


class EpisodeRunner:
    """Executes chunks in one simulator, episode after episode, and writes the results into its row of the board."""

    def __init__(self, simulator: Simulator, env: int, board: Board, num_tasks: int = 1) -> None:
        """Take over a simulator.

        Args:
            simulator: Used by nobody else from now on.
            env: Index of the environment, which keys its seeds and is its row.
            board: Memory shared with the parent.
            num_tasks: Tasks that the environments have in turn, of which the simulator's is one.

        Raises:
            ContractError: As `CheckedSimulator`, or the board has no room for what its spec says.
        """
        self._n_obs_steps, self._kinds = board.plan.n_obs_steps, board.kinds
        self._simulator = CheckedSimulator(simulator, board.plan.rooms)
        self.spec = self._simulator.spec.with_history(self._n_obs_steps)
        self.notices = tuple(map(str, getattr(simulator, "notices", ())))
        self._env = env
        self._turns = len(range(env % num_tasks, board.plan.num_envs, num_tasks))  # environments of the same task
        self._turn = env // num_tasks  # its place among them
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
            self._write(FINAL)
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
            self._copy_rendered(FINAL, "")
        if terminated:
            self._copy_rendered("", FINAL)

    def _give_up(self, error: _NonFiniteError) -> None:
        self._begin_episode(self._episode + 1)
        self._clear_row()
        self._row["nonfinite"][...], self._row["nonfinite_step"][...] = error.cause, error.step

    def _begin_episode(self, episode: int) -> None:
        self._episode, self._length, self._return = episode, 0, 0.0
        seed = derive_seed(self._seed, "episode", self._env, episode)
        if self.spec.num_start_states:
            self._simulator.reset_to(seed, self._start_state(episode))
        else:
            self._simulator.reset(seed)
        try:
            self._look()
        except _NonFiniteError:
            raise EnvError(
                f"environment {self._env}: the first observation of episode {episode} is not finite"
            ) from None
        self._history.extend([self._history[-1]] * self._n_obs_steps)  # an episode begins at rest
        self._write()

    def _start_state(self, episode: int) -> int:
        """Return the start state of an episode: those of a task come in turn over all of its environments.

        An environment that would meet the same ones again moves on by one, so that it comes to all of them: else the
        states of environments whose episodes are short would come more often.
        """
        num_states = self.spec.num_start_states
        num_met = num_states // math.gcd(num_states, self._turns)
        return (self._turn + episode * self._turns + episode // num_met) % num_states

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
        self._copy_rendered("", FINAL)
