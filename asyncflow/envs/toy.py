"""Tasks without a simulator: reach a goal in the plane. For tests, examples and the presets named after toys.

The dynamics are vectorised over environments. The toy follows the same contract as the simulators, chunks and seeds
included.

Shapes: N environments, n of them addressed by one call, H executed actions of a chunk.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict
from torch import Tensor

from asyncflow.config.observations import IMAGES, POINTS, Shape, field_key
from asyncflow.config.suites import TOY_GOALS
from asyncflow.config.tasks import TOY, TOY_IMAGES, TOY_POINTS
from asyncflow.envs.base import ChunkResult, ChunkSpan, EnvInterrupted, Fault, VecEnv
from asyncflow.envs.chunks import check_actions, nonfinite_fault
from asyncflow.envs.journal import EpisodeJournal
from asyncflow.envs.tasks import join_tasks, tell_task
from asyncflow.errors import EnvError
from asyncflow.seeding import derive_seed
from asyncflow.simulators.spec import EnvSpec

STEP_SIZE = 0.1
GOAL_RADIUS = 0.1
DEFAULT_HORIZON = 40
CAMERA, IMAGE_SIZE, BLOB_RADIUS = "top", 28, 0.25
NUM_POINTS = 32  # of a cloud: a ring around the position, another around the goal


class ToyVecEnv(VecEnv, AbstractContextManager["ToyVecEnv"]):
    """Move by 0.1 times the action, [2]; an episode ends with reward 1 within 0.1 of the goal.

    The `state`, [2 + 2 G], is the position and G goals; a camera may show all of them from above, as a picture or as a
    point cloud. Only with an instruction are there two goals, of which it says the one to reach; the other one ends the
    episode without success and every step is paid by how much nearer it leads. Chunks are executed by `step_async`
    itself: nothing waits. Only an action can be not finite here, and nothing else can fail.
    """

    def __init__(
        self, num_envs: int, chunk_length: int, horizon: int | None = None, tasks: Sequence[str] = (TOY,)
    ) -> None:
        """Allocate the state of N environments.

        Args:
            num_envs: Environments, N.
            chunk_length: Actions of a chunk, H.
            horizon: Env steps until an episode is truncated; None means 40.
            tasks: Names of toys, over which the environments are spread.

        Raises:
            ConfigError: They observe different things.
        """
        self.num_envs = num_envs
        specs = [_describe(task, horizon or DEFAULT_HORIZON) for task in tasks]
        self.spec = specs[0] if len(specs) == 1 else join_tasks(specs, tasks)
        num_goals = len(TOY_GOALS) if tasks[0] in TOY_GOALS else 1
        goals = [list(TOY_GOALS).index(task) if task in TOY_GOALS else 0 for task in tasks]
        self._goal = torch.tensor([goals[task] for task in self.spec.task_ids(range(num_envs))])  # the one to reach
        self._is_told = num_goals > 1
        self._chunk_length = self.n_action_steps = chunk_length
        self._seed = 0
        self._state = torch.zeros(num_envs, 2 + 2 * num_goals)
        self._episode = torch.zeros(num_envs, dtype=torch.int64)
        self._length = torch.zeros(num_envs, dtype=torch.int64)
        self._return = torch.zeros(num_envs)
        self._results: dict[range, tuple[ChunkResult, Tensor]] = {}  # with the actions that led there
        self._journal = EpisodeJournal.start(num_envs)
        self._is_interrupted = False

    def reset(self, seed: int, journal: EpisodeJournal | None = None) -> TensorDict:
        """Start episode 0 of every environment, or rebuild a journal's open episodes; return observations, [N]."""
        self._check_not_interrupted()
        if self._results:
            raise EnvError(f"reset while chunks are under way in {list(self._results)}")
        self._seed = seed
        self._journal = journal.copy() if journal else EpisodeJournal.start(self.num_envs)
        self._episode = torch.tensor(self._journal.episodes) - 1
        self._begin_episodes(torch.arange(self.num_envs))
        for env in range(self.num_envs):
            actions = self._journal.actions(env)
            if actions is not None:
                self._execute(actions[None], torch.tensor([env]))
        return self._observe(self._state.clone(), range(self.num_envs))

    def journal(self) -> EpisodeJournal:
        """Return a copy of what would rebuild the open episodes; chunks under way are not in it."""
        return self._journal.copy()

    def step_async(self, actions: Tensor, env_ids: range) -> None:
        """Execute one chunk, [n, H, 2] in [-1, 1], in each of `env_ids`.

        Raises:
            EnvError: Wrong shape, or a chunk is under way in one of `env_ids`.
        """
        shape = (len(env_ids), self._chunk_length, 2)
        check_actions(actions, shape, env_ids, self._results)
        kept = actions.to(torch.float32, copy=True)
        start_s = time.perf_counter()
        result = self._execute(kept, torch.tensor(env_ids))
        span = ChunkSpan("worker 0", start_s, time.perf_counter())
        self._results[env_ids] = replace(result, spans=(span,)), kept

    def step_wait(self, env_ids: range) -> ChunkResult:
        """Return the chunk started by `step_async(..., env_ids)`; waits for nothing.

        Raises:
            EnvError: There is no such chunk.
            EnvInterrupted: `interrupt` was called.
        """
        self._check_not_interrupted()
        if env_ids not in self._results:
            raise EnvError(f"step_wait({env_ids}): no chunk is under way there")
        result, actions = self._results.pop(env_ids)
        self._journal.record(env_ids, actions, result.terminated | result.truncated | result.broken)
        return result

    def interrupt(self) -> None:
        """Make every later `reset` and `step_wait` raise `EnvInterrupted`."""
        self._is_interrupted = True

    def close(self) -> None:
        """Forget chunks under way."""
        self._results.clear()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _check_not_interrupted(self) -> None:
        if self._is_interrupted:
            raise EnvInterrupted("the environments were interrupted")

    def _observe(self, state: Tensor, env_ids: Sequence[int]) -> TensorDict:
        obs = TensorDict({"state": state}, batch_size=state.shape[:1])
        for kind in self.spec.rendered:
            obs[kind] = TensorDict({CAMERA: SEEN[kind](state)}, batch_size=state.shape[:1])
        return tell_task(obs, self.spec, env_ids)

    def _execute(self, actions: Tensor, rows: Tensor) -> ChunkResult:
        faults, broken = self._find_faults(actions, rows)
        actions = actions.nan_to_num().clamp(-1.0, 1.0)
        state, length = self._state[rows], self._length[rows]
        terminated, truncated, succeeded = torch.zeros(3, len(rows), dtype=torch.bool)
        executed, rewards = torch.zeros_like(length), torch.zeros(actions.shape[:2])
        for step, action in enumerate(actions.unbind(1)):
            is_open = ~(terminated | truncated | broken)
            before = _distances(state)
            state[:, :2] += STEP_SIZE * action * is_open[:, None]
            executed += is_open
            at_goal = is_open[:, None] & _is_at_goal(state)
            has_ended, reached = at_goal.any(1), at_goal.gather(1, self._goal[rows, None]).squeeze(1)
            terminated |= has_ended
            succeeded |= reached
            truncated |= is_open & ~has_ended & (length + executed >= self.spec.horizon)
            rewards[:, step] = reached.float()
            if self._is_told:
                rewards[:, step] += (before - _distances(state)).gather(1, self._goal[rows, None]).squeeze(1)
        self._state[rows] = state
        self._length[rows] += executed
        self._return[rows] += rewards.sum(1)
        episode_return, episode_length = self._end_episodes(rows, terminated | truncated)
        self._begin_episodes(rows[broken])
        obs, env_ids = self._state[rows], rows.tolist()
        return ChunkResult(
            obs=self._observe(obs, env_ids),
            final_obs=self._observe(torch.where(broken[:, None], obs, state), env_ids),
            rewards=rewards,
            executed=executed,
            terminated=terminated,
            truncated=truncated,
            episode_return=episode_return,
            episode_length=episode_length,
            broken=broken,
            faults=faults,
            succeeded=succeeded,
        )

    def _find_faults(self, actions: Tensor, rows: Tensor) -> tuple[tuple[Fault, ...], Tensor]:
        """Return a fault for each environment that is given an action that is not finite, and which they are, [n]."""
        is_finite = actions.isfinite().all(dim=2)
        broken = ~is_finite.all(dim=1)
        first = self._length[rows] + 1 + is_finite.int().argmin(dim=1)
        faults = [
            nonfinite_fault(env, int(self._episode[env]), step, "action")
            for env, step in zip(rows[broken].tolist(), first[broken].tolist(), strict=True)
        ]
        return tuple(faults), broken

    def _end_episodes(self, rows: Tensor, ended: Tensor) -> tuple[Tensor, Tensor]:
        """Return the return and the length of the episodes that ended, zero elsewhere, and begin new ones."""
        episode_return, episode_length = self._return[rows] * ended, self._length[rows] * ended
        self._begin_episodes(rows[ended])
        return episode_return, episode_length

    def _begin_episodes(self, rows: Tensor) -> None:
        self._episode[rows] += 1
        self._length[rows], self._return[rows] = 0, 0.0
        for env in rows.tolist():
            rng = np.random.default_rng(derive_seed(self._seed, "episode", env, int(self._episode[env])))
            self._state[env] = torch.from_numpy(_draw_two_goals(rng) if self._is_told else rng.uniform(-1.0, 1.0, 4))


def _describe(task: str, horizon: int) -> EnvSpec:
    """Return what a toy observes, and how it is acted in."""
    is_told = task in TOY_GOALS
    fields: dict[str, Shape] = {"state": (2 + 2 * (len(TOY_GOALS) if is_told else 1),)}
    if task == TOY_IMAGES or is_told:
        fields[field_key(IMAGES, CAMERA)] = (3, IMAGE_SIZE, IMAGE_SIZE)
    if task == TOY_POINTS:
        fields[field_key(POINTS, CAMERA)] = (NUM_POINTS, 6)
    return EnvSpec(fields, action_dim=2, horizon=horizon, task=task, instruction=TOY_GOALS.get(task, ""))


def _draw_two_goals(rng: np.random.Generator) -> NDArray[np.float64]:
    """Return a position in the middle and two goals around it, in directions that differ by 90 degrees or more."""
    angle = rng.uniform(0.0, 2 * np.pi)
    angles = np.array([angle, angle + rng.uniform(0.5 * np.pi, 1.5 * np.pi)])
    goals = rng.uniform(0.4, 0.7, (2, 1)) * np.stack([np.cos(angles), np.sin(angles)], 1)
    return np.concatenate([rng.uniform(-0.1, 0.1, 2), goals.ravel()])


def _is_at_goal(state: Tensor) -> Tensor:
    """Return at which goals states [n, 2 + 2 G] are, [n, G]."""
    offset = _offsets(state).square()
    return offset[..., 0] + offset[..., 1] < GOAL_RADIUS**2


def _distances(state: Tensor) -> Tensor:
    """Return how far the goals are in states [n, 2 + 2 G], [n, G]."""
    distances: Tensor = _offsets(state).square().sum(-1).sqrt()
    return distances


def _offsets(state: Tensor) -> Tensor:
    goals: Tensor = state[:, 2:].unflatten(1, (-1, 2))
    return state[:, None, :2] - goals


def render(state: Tensor) -> Tensor:
    """Return pictures of states [n, 2 + 2 G], [n, 3, h, w] uint8: the position as a red blob, a green and a blue goal.

    Of a single goal it is the green one.
    """
    axis = torch.linspace(-1.0, 1.0, IMAGE_SIZE)
    x, y = state[:, 0::2, None, None], state[:, 1::2, None, None]
    distance = ((axis - x).square() + (axis[:, None] - y).square()).sqrt()
    blobs = (255 * (1 - distance / BLOB_RADIUS).clamp(min=0)).to(torch.uint8)
    return torch.cat([blobs, torch.zeros_like(blobs[:, : 3 - blobs.shape[1]])], 1)


def point_cloud(state: Tensor) -> Tensor:
    """Return clouds of states [n, 4], [n, NUM_POINTS, 6]: a red ring around the position, a green one around goal."""
    angle = torch.arange(NUM_POINTS // 2) * (4 * torch.pi / NUM_POINTS)
    ring = GOAL_RADIUS * torch.stack([angle.cos(), angle.sin()], 1)
    places = (state.view(len(state), 2, 1, 2) + ring).flatten(1, 2)
    colours = torch.eye(3)[:2].repeat_interleave(NUM_POINTS // 2, 0).expand(len(state), -1, -1)
    return torch.cat([places, torch.zeros_like(places[..., :1]), colours], 2)


SEEN = {IMAGES: render, POINTS: point_cloud}
