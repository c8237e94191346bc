"""Simulators in processes: one message per worker and decision, results through shared memory, faults survived.

This file says which worker simulates what and which chunks are under way. It replaces a worker that fails and marks
what was lost with it. How a process answers is in `worker`.

Shapes: N environments, n of them addressed by one call, H executed actions of a chunk, A action size, D size of the
`state` observation.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import compress
from types import TracebackType
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from asyncflow.config.interpreters import choose_interpreter
from asyncflow.config.observations import STATE, rendered_rooms
from asyncflow.config.sections import EnvConfig
from asyncflow.envs.base import ChunkResult, ChunkSpan, EnvInterrupted, Fault, VecEnv, as_slice
from asyncflow.envs.chunks import ChunkBoard, check_actions
from asyncflow.envs.journal import EpisodeJournal
from asyncflow.envs.server import Interpreter
from asyncflow.envs.tasks import join_tasks, tell_task
from asyncflow.envs.worker import Recipe, SimulatorFactories, Waker, Worker, WorkerFailure, WorkerSetup, pack_factory
from asyncflow.errors import ConfigError, EnvError
from asyncflow.simulators.spec import EnvSpec

_CLOSE_TIMEOUT_S = 2.0


class WorkerVecEnv(VecEnv, AbstractContextManager["WorkerVecEnv"]):
    """N simulators spread over processes in contiguous blocks.

    A worker that fails is replaced at the next call that waits for it. Its episodes are lost, whosever chunks were
    under way: until `step_wait` has reported an environment as broken, `step_async` starts nothing there.

    Attributes:
        interpreter: The program that simulates.
        notices: Lines that a run shows when it starts.
    """

    def __init__(
        self,
        make_simulator: SimulatorFactories,
        config: EnvConfig,
        num_envs: int,
        chunk_length: int,
        seed: int,
    ) -> None:
        """Start the workers and wait until each has constructed its simulators.

        Args:
            make_simulator: Seed -> simulator. It runs in the workers, to which cloudpickle sends it: with its code if
                that is a script's or a notebook's. For several tasks a mapping from their names, which environments
                have in turn.
            config: Its `num_workers`, of which at most N are used, `n_obs_steps`, what its cameras yield,
                `step_timeout_s`, `max_restarts` and `restart_window_s` are read.
            num_envs: Environments, N.
            chunk_length: Actions of a chunk, H.
            seed: Environment i is constructed from `derive_seed(seed, "simulator", i)`.

        Raises:
            EnvError: A simulator could not be constructed.
            ConfigError: It cannot be constructed as asked, breaks its contract or cannot be pickled, or shared memory
                does not suffice; tasks observe or act otherwise than each other, or are more than environments.
        """
        factories = dict(make_simulator) if isinstance(make_simulator, Mapping) else {"": make_simulator}
        if not 0 < len(factories) <= num_envs:
            raise ConfigError(f"num_envs = {num_envs}: {len(factories)} tasks need one environment each at least")
        interpreter = _choose(config.python, [each for each in factories.values() if isinstance(each, Recipe)])
        packed = [pack_factory(each, interpreter) for each in factories.values()]
        self.interpreter = interpreter.executable
        self.num_envs, self.n_action_steps = num_envs, chunk_length
        self._config = config
        self._seed = 0
        self._journal = EpisodeJournal.start(num_envs)
        self._pending: dict[range, list[Worker]] = {}
        self._lost: set[int] = set()  # environments whose episode ended with its worker, not yet reported
        self._faults: list[Fault] = []  # not yet reported
        self._restarts: deque[float] = deque()  # when workers were replaced, within the window
        self._failure: str | None = None
        self._waker = Waker()
        self._workers: list[Worker] = []
        self._board = ChunkBoard.allocate(num_envs, chunk_length, config.n_obs_steps, rendered_rooms(config))
        self._setup = WorkerSetup(packed, self._board, seed, interpreter)
        try:
            specs, self.notices = self._start_workers(min(num_envs, config.num_workers or len(os.sched_getaffinity(0))))
            self.versions = self._workers[0].versions
            self.spec = specs[0] if len(specs) == 1 else join_tasks(specs, list(factories))
        except BaseException:
            self.close()
            raise

    def reset(self, seed: int, journal: EpisodeJournal | None = None) -> TensorDict:
        """Start episode 0 of every environment, or rebuild a journal's open episodes; waits for all workers.

        Environments whose worker fails meanwhile begin the episode after that. So do those whose episode ends in its
        replay, which happens on a machine that rounds differently.

        Returns:
            The observations to decide on next, [N].

        Raises:
            EnvError: As `step_wait`, or a chunk is under way.
        """
        self._check_waitable()
        if self._pending:
            raise EnvError(f"reset while chunks are under way in {list(self._pending)}")
        self._seed = seed
        self._journal = journal.copy() if journal else EpisodeJournal.start(self.num_envs)
        for worker in self._workers:
            self._begin(worker)
        for worker in tuple(self._workers):
            self._receive(worker, "begin")
        self._replay()
        self._lost = {env for env, is_lost in enumerate(self._journal.is_lost) if is_lost}
        return self._read_obs("", slice(None))

    def journal(self) -> EpisodeJournal:
        """Return a copy of what would rebuild the open episodes; chunks under way are not in it. Never waits."""
        journal = self._journal.copy()
        journal.is_lost = [env in self._lost for env in range(self.num_envs)]
        return journal

    def step_async(self, actions: Tensor, env_ids: range) -> None:
        """Start one chunk, [n, H, A] within `spec.action_limits`, in each of `env_ids`; returns at once.

        Raises:
            EnvError: Wrong shape, or a chunk is under way in one of `env_ids`.
        """
        self._check_usable()
        shape = (len(env_ids), self._board.actions.shape[1], self.spec.action_dim)
        check_actions(actions, shape, env_ids, self._pending)
        self._board.actions[as_slice(env_ids), :, : self.spec.action_dim] = actions
        self._pending[env_ids] = self._start_chunks(env_ids, env_ids)

    def step_wait(self, env_ids: range) -> ChunkResult:
        """Wait for the workers of `env_ids` to finish the chunk started by `step_async(..., env_ids)`.

        Replaces those that raised, died or were silent for longer than `env.step_timeout_s`, and waits for that, too.

        Raises:
            EnvError: More than `env.max_restarts` workers failed within `env.restart_window_s` (the message holds the
                last one's traceback); or no such chunk is under way.
            EnvInterrupted: `interrupt` was called.
        """
        self._check_waitable()
        if env_ids not in self._pending:
            raise EnvError(f"step_wait({env_ids}): no chunk is under way there")
        for worker in self._pending.pop(env_ids):
            self._receive(worker, env_ids)
        result = self._read(env_ids)
        self._record(env_ids, result)
        return result

    def interrupt(self) -> None:
        """Make this and every later wait for simulators raise `EnvInterrupted`; the simulators go on until `close`."""
        self._waker.wake()

    def close(self) -> None:
        """Stop the workers and free their memory; waits for them a few seconds at most, then kills.

        May be called twice, and while chunks are under way.
        """
        self._failure = self._failure or "closed"
        deadline = time.monotonic() + _CLOSE_TIMEOUT_S
        for worker in self._workers:
            worker.dismiss()
        while self._workers:
            self._workers.pop().stop(deadline)
        self._waker.close()
        self._pending.clear()
        self._board.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _start_workers(self, num_workers: int) -> tuple[list[EnvSpec], tuple[str, ...]]:
        """Return the spec of each task, and the notices of all."""
        for index in range(num_workers):
            block = range(index * self.num_envs // num_workers, (index + 1) * self.num_envs // num_workers)
            self._workers.append(Worker(index, block, self._setup, self._waker))
        specs: dict[int, EnvSpec] = {}
        notices: dict[str, None] = {}  # each once, in their order
        for worker in self._workers:
            own_specs, own_notices = worker.wait_ready()
            specs |= own_specs
            notices |= dict.fromkeys(own_notices)
        return [specs[task] for task in sorted(specs)], tuple(notices)

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise EnvError(f"the environments cannot be used any more: {self._failure}")

    def _check_waitable(self) -> None:
        self._check_usable()
        if self._waker.is_awake:
            raise EnvInterrupted("the environments were interrupted")

    def _begin(self, worker: Worker) -> None:
        episodes = {env: self._journal.episodes[env] for env in worker.env_ids}
        worker.begin("begin", self._seed, episodes)

    def _start_chunks(self, key: Any, env_ids: Collection[int], unseen: Collection[int] = ()) -> list[Worker]:
        """Start the chunks on the board, but for lost environments; return the workers that owe an answer.

        Nobody looks at the `unseen` ones' observations, so their cameras are not rendered.
        """
        asked = []
        for worker in self._workers:
            mine = {env: env not in unseen for env in worker.env_ids if env in env_ids and env not in self._lost}
            if mine:
                worker.step(key, mine)
                asked.append(worker)
        return asked

    def _replay(self) -> None:
        """Rebuild the journal's open episodes chunk by chunk, as they were executed: no message can fill a pipe.

        Only the chunks that the next observation shows are rendered.
        """
        num_seen = math.ceil(self._config.n_obs_steps / self._board.actions.shape[1])
        for index in range(max(map(len, self._journal.chunks))):
            envs = {env for env, chunks in enumerate(self._journal.chunks) if len(chunks) > index}
            unseen = {env for env in envs if len(self._journal.chunks[env]) > index + num_seen}
            for env in envs:
                self._board.actions[env, :, : self.spec.action_dim] = self._journal.chunks[env][index]
            for worker in self._start_chunks("replay", envs, unseen):
                self._receive(worker, "replay")
            for env in envs - self._lost:
                if self._board.episode_length[env] or not self._board.executed[env]:
                    self._journal.begin_next(env)

    def _receive(self, worker: Worker, key: Any) -> None:
        """Wait for a worker's answer, or for its replacement."""
        try:
            worker.receive(key, self._config.step_timeout_s)
        except WorkerFailure as failure:
            self._replace(worker.index, failure)

    def _replace(self, index: int, failure: WorkerFailure) -> None:
        """Start processes in a worker's place until one has begun the next episode of every environment."""
        start, failures = time.monotonic(), [failure]
        self._count_restart(failure)
        while again := self._try_successor(index):
            failures.append(again)
            self._count_restart(again)
        seconds = time.monotonic() - start
        self._faults += [Fault(each.kind, f"{each.cause}; replaced in {seconds:.1f} s") for each in failures]

    def _try_successor(self, index: int) -> WorkerFailure | None:
        """Put another process in a worker's place and begin the next episodes; return why it failed, if it did."""
        worker = self._workers[index]
        self._lose(worker)
        worker.stop(deadline=0.0)  # before its successor writes to the same rows of the board
        self._workers[index] = worker = Worker(index, worker.env_ids, self._setup, self._waker)
        try:
            worker.wait_ready()
            self._begin(worker)
            worker.receive("begin", self._config.step_timeout_s)
        except WorkerFailure as failure:
            return failure
        return None

    def _lose(self, worker: Worker) -> None:
        """Give up the episodes of a worker, and what it still owed to any group."""
        self._lost.update(worker.env_ids)
        for env in worker.env_ids:
            self._journal.begin_next(env)
        for workers in self._pending.values():
            if worker in workers:
                workers.remove(worker)

    def _count_restart(self, failure: WorkerFailure) -> None:
        config, now = self._config, time.monotonic()
        self._restarts.append(now)
        while self._restarts[0] < now - config.restart_window_s:
            self._restarts.popleft()
        if len(self._restarts) > config.max_restarts:
            self._failure = (
                f"{len(self._restarts)} workers failed within env.restart_window_s = {config.restart_window_s:g}, "
                f"more than env.max_restarts = {config.max_restarts}; the last: {failure}"
            )
            raise EnvError(self._failure)

    def _read(self, env_ids: range) -> ChunkResult:
        board, rows = self._board, as_slice(env_ids)
        broken = board.executed[rows] == 0
        return ChunkResult(
            obs=self._read_obs("", rows),
            final_obs=self._read_obs("final_", rows),
            rewards=board.rewards[rows].clone(),
            executed=board.executed[rows].clone(),
            terminated=board.terminated[rows].clone(),
            truncated=board.truncated[rows].clone(),
            succeeded=board.succeeded[rows].clone(),
            episode_return=board.episode_return[rows].clone(),
            episode_length=board.episode_length[rows].clone(),
            broken=broken,
            faults=self._take_faults(compress(env_ids, broken.tolist())),
            spans=tuple(self._read_spans(env_ids)),
        )

    def _read_spans(self, env_ids: range) -> Iterator[ChunkSpan]:
        """Yield when each worker simulated its part; of lost environments the board may tell the chunk before."""
        started_s, ended_s = self._board.started_s, self._board.ended_s
        for worker in self._workers:
            mine = [env for env in worker.env_ids if env in env_ids and env not in self._lost]
            if mine:
                yield ChunkSpan(f"worker {worker.index}", float(started_s[mine].min()), float(ended_s[mine].max()))

    def _take_faults(self, broken: Iterable[int]) -> tuple[Fault, ...]:
        given_up = [self._board.nonfinite_fault(env, self._journal.episodes[env]) for env in broken]
        faults, self._faults = self._faults, []
        return (*faults, *(fault for fault in given_up if fault is not None))

    def _record(self, env_ids: range, result: ChunkResult) -> None:
        """Enter a result's chunks into the journal; lost environments have begun their next episode there before."""
        kept = [row for row, env in enumerate(env_ids) if env not in self._lost]
        actions = self._board.actions[as_slice(env_ids), :, : self.spec.action_dim]
        has_ended = result.terminated | result.truncated | result.broken
        self._journal.record([env_ids[row] for row in kept], actions[kept], has_ended[kept])
        self._lost.difference_update(env_ids)

    def _read_obs(self, prefix: str, rows: slice) -> TensorDict:
        """Return copies of `obs` or `final_obs`, and of what cameras yielded with it."""
        shape, rendered = self.spec.state_shape, getattr(self._board, prefix + "rendered")
        state: Tensor = getattr(self._board, prefix + "obs")[rows, : math.prod(shape)].clone()
        obs = TensorDict({STATE: state.view(-1, *shape)}, batch_size=state.shape[:1])
        for kind, shapes in self.spec.rendered.items():
            by_camera = zip(shapes.items(), rendered[kind][rows].unbind(2), strict=True)
            copies = {
                name: part.clone(memory_format=torch.contiguous_format).view(-1, *s) for (name, s), part in by_camera
            }
            obs[kind] = TensorDict(copies, batch_size=state.shape[:1])
        return tell_task(obs, self.spec, range(self.num_envs)[rows])


def _choose(python: str | None, recipes: list[Recipe]) -> Interpreter:
    """Return what simulates; functions of the user's own have no recipe.

    Raises:
        ConfigError: There is none, or tasks of one run need several.
    """
    kinds = list(dict.fromkeys(recipe.kind for recipe in recipes)) or [None]
    chosen = {choose_interpreter(python, kind) for kind in kinds}
    if len(chosen) > 1:
        raise ConfigError(f"env.tasks: {' and '.join(map(str, kinds))} are simulated by different interpreters")
    return Interpreter(chosen.pop(), recipes[0].preload if recipes else None, kinds[0])
