"""Simulators in processes: one message per worker and decision, results through shared memory.

Owns the processes, their messages and their end. It must not know what is simulated: a worker gets a factory of
simulators, and `chunks` executes chunks in them.

Shapes: N environments, n of them addressed by one call, H executed actions of a chunk, A action size, D size of the
`state` observation.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.util import Finalize
from types import TracebackType
from typing import Any

import torch
import torch.multiprocessing as mp
from tensordict import TensorDict
from torch import Tensor

from asyncflow.config import EnvConfig
from asyncflow.envs.base import ChunkResult, EnvSpec, VecEnv, as_slice
from asyncflow.envs.chunks import ChunkBoard, EpisodeRunner, Simulator, check_actions
from asyncflow.errors import EnvError
from asyncflow.seeding import derive_seed

SimulatorFactory = Callable[[int], Simulator]

_START_TIMEOUT_S = 300.0  # importing robosuite and compiling its numba functions, on a busy machine
_JOIN_TIMEOUT_S = 2.0
_PARENTS_SIGNALS = {signal.SIGINT, signal.SIGTERM}  # they reach the whole process group; the parent handles them
_NUM_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


class WorkerVecEnv(VecEnv, AbstractContextManager["WorkerVecEnv"]):
    """N simulators spread over processes in contiguous blocks."""

    def __init__(
        self,
        make_simulator: SimulatorFactory,
        config: EnvConfig,
        num_envs: int,
        chunk_length: int,
        seed: int,
    ) -> None:
        """Start the workers and wait until each has constructed its simulators.

        Args:
            make_simulator: Seed -> simulator; must be picklable. It runs in the workers.
            config: Its `num_workers`, of which at most N are used, and `step_timeout_s` are read.
            num_envs: Environments, N.
            chunk_length: Actions of a chunk, H.
            seed: Environment i is constructed from `derive_seed(seed, "simulator", i)`.

        Raises:
            EnvError: A simulator could not be constructed.
        """
        self.num_envs = num_envs
        self._timeout_s = config.step_timeout_s
        self._pending: dict[range, list[_Worker]] = {}
        self._failure: str | None = None
        self._workers: list[_Worker] = []
        self._board = ChunkBoard.allocate(num_envs, chunk_length)
        num_workers = min(num_envs, config.num_workers or len(os.sched_getaffinity(0)))
        try:
            with _worker_environment():
                for index in range(num_workers):
                    block = range(index * num_envs // num_workers, (index + 1) * num_envs // num_workers)
                    self._workers.append(_Worker(index, block, make_simulator, self._board, seed))
            specs = [self._receive(worker, "ready", _START_TIMEOUT_S) for worker in self._workers]
        except BaseException:
            self.close()
            raise
        self.spec: EnvSpec = specs[0]

    def reset(self, seed: int) -> TensorDict:
        """Start episode 0 of every environment and return its observations, [N]; waits for all workers.

        Raises:
            EnvError: As `step_wait`, or a chunk is under way.
        """
        self._check_usable()
        if self._pending:
            raise EnvError(f"reset while chunks are under way in {list(self._pending)}")
        for worker in self._workers:
            worker.send("reset", seed)
        for worker in self._workers:
            self._receive(worker, "reset", self._timeout_s)
        return self._read_obs(self._board.obs, slice(None))

    def step_async(self, actions: Tensor, env_ids: range) -> None:
        """Start one chunk, [n, H, A] in [-1, 1], in each of `env_ids`; returns at once.

        Raises:
            EnvError: Wrong shape, an action that is not finite, or a chunk is under way in one of `env_ids`.
        """
        self._check_usable()
        shape = (len(env_ids), self._board.actions.shape[1], self.spec.action_dim)
        check_actions(actions, shape, env_ids, self._pending)
        self._board.actions[as_slice(env_ids), :, : self.spec.action_dim] = actions
        self._pending[env_ids] = [worker for worker in self._workers if _intersect(env_ids, worker.env_ids)]
        for worker in self._pending[env_ids]:
            worker.send("step", env_ids)

    def step_wait(self, env_ids: range) -> ChunkResult:
        """Wait for the workers of `env_ids` to finish the chunk started by `step_async(..., env_ids)`.

        Raises:
            EnvError: A simulator raised (the message holds its traceback), its worker died or was silent for longer
                than `step_timeout_s`; or no such chunk is under way.
        """
        self._check_usable()
        if env_ids not in self._pending:
            raise EnvError(f"step_wait({env_ids}): no chunk is under way there")
        for worker in self._pending.pop(env_ids):
            self._receive(worker, env_ids, self._timeout_s)
        return self._read(as_slice(env_ids))

    def close(self) -> None:
        """Stop the workers and free their memory; waits for them a few seconds at most, then kills.

        May be called twice, and while chunks are under way.
        """
        self._failure = self._failure or "closed"
        deadline = time.monotonic() + _JOIN_TIMEOUT_S
        for worker in self._workers:
            worker.connection.close()  # a worker leaves when its pipe closes
        while self._workers:
            self._workers.pop().stop(deadline)
        self._pending.clear()
        self._board = ChunkBoard.allocate(0, 0)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise EnvError(f"the environments cannot be used any more: {self._failure}")

    def _receive(self, worker: _Worker, key: Any, timeout_s: float) -> Any:
        try:
            return worker.receive(key, timeout_s)
        except EnvError as error:
            self._failure = str(error)
            raise

    def _read(self, rows: slice) -> ChunkResult:
        board = self._board
        return ChunkResult(
            obs=self._read_obs(board.obs, rows),
            final_obs=self._read_obs(board.final_obs, rows),
            rewards=board.rewards[rows].clone(),
            executed=board.executed[rows].clone(),
            terminated=board.terminated[rows].clone(),
            truncated=board.truncated[rows].clone(),
            episode_return=board.episode_return[rows].clone(),
            episode_length=board.episode_length[rows].clone(),
        )

    def _read_obs(self, rows_of: Tensor, rows: slice) -> TensorDict:
        state = rows_of[rows, : self.spec.obs_shapes["state"][0]].clone()
        return TensorDict({"state": state}, batch_size=state.shape[:1])


class _Worker:
    """The parent's side of one process. Messages are answered in the order in which they were sent."""

    def __init__(
        self, index: int, env_ids: range, make_simulator: SimulatorFactory, board: ChunkBoard, seed: int
    ) -> None:
        self.env_ids = env_ids
        self.connection, child = mp.Pipe()
        self._name = f"worker {index} (environments {env_ids.start} to {env_ids.stop - 1})"
        self._answers: dict[Any, Any] = {}
        self._process = mp.get_context("spawn").Process(
            target=_serve, args=(child, make_simulator, env_ids, board, seed), name=f"simulators-{index}", daemon=True
        )
        self._process.start()
        child.close()  # or the pipe would stay open after the worker's death
        # At exit, multiprocessing joins its daemons; a worker leaves when its pipe closes, so that must come first.
        Finalize(None, self.connection.close, exitpriority=1)

    def send(self, command: str, argument: Any) -> None:
        with contextlib.suppress(OSError):  # the worker is dead; `receive` says why
            self.connection.send((command, argument))

    def receive(self, key: Any, timeout_s: float) -> Any:
        """Wait for the answer to one message; earlier answers to other messages are kept for their own caller."""
        while key not in self._answers:
            kind, key_answered, payload = self._receive_next(timeout_s)
            if kind == "error":
                raise EnvError(f"{self._name} failed:\n{payload}")
            self._answers[key_answered] = payload
        return self._answers.pop(key)

    def _receive_next(self, timeout_s: float) -> Any:
        ready = wait([self.connection, self._process.sentinel], timeout_s)
        if not ready:
            raise EnvError(f"{self._name} has been silent for {timeout_s:g} s (env.step_timeout_s); exit code: none")
        with contextlib.suppress(EOFError, OSError):
            if self.connection.poll():  # also what a worker said before it died
                return self.connection.recv()
        self._process.join(_JOIN_TIMEOUT_S)  # the exit code comes a moment after the pipe's end
        raise EnvError(f"{self._name} died with exit code {self._process.exitcode}")

    def stop(self, deadline: float) -> None:
        """Wait for the process until the deadline, then kill it."""
        self._process.join(max(0.0, deadline - time.monotonic()))
        if self._process.is_alive():
            self._process.kill()
            self._process.join(_JOIN_TIMEOUT_S)
        self._process.close()


def _serve(
    connection: Connection, make_simulator: SimulatorFactory, env_ids: range, board: ChunkBoard, seed: int
) -> None:
    """Run a worker process: construct the simulators, answer messages, leave when the pipe closes.

    The simulators' memory goes with the process; closing them and the interpreter first would take seconds.
    """
    for number in _PARENTS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    runners: dict[int, EpisodeRunner] = {}
    try:
        for env in env_ids:
            runners[env] = EpisodeRunner(make_simulator(derive_seed(seed, "simulator", env)), env, board)
        connection.send(("done", "ready", runners[env_ids[0]].spec))
        while True:
            _answer(connection, runners, *connection.recv())
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent closed the environments, or died
    except BaseException:
        with contextlib.suppress(OSError):
            connection.send(("error", None, traceback.format_exc()))
        os._exit(1)
    os._exit(0)


def _answer(connection: Connection, runners: dict[int, EpisodeRunner], command: str, argument: Any) -> None:
    if command == "reset":
        for runner in runners.values():
            runner.reset(argument)
        connection.send(("done", "reset", None))
    else:
        for env in _intersect(argument, range(min(runners), max(runners) + 1)):
            runners[env].execute()
        connection.send(("done", argument, None))


@contextlib.contextmanager
def _worker_environment() -> Iterator[None]:
    """Set what a worker inherits: one thread per numeric library, and signals blocked until the worker ignores them."""
    saved = {name: os.environ.get(name) for name in _NUM_THREADS}
    resource_tracker.ensure_running()  # started later, it would unblock them again
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _PARENTS_SIGNALS)
    os.environ.update(dict.fromkeys(_NUM_THREADS, "1"))
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _intersect(env_ids: range, block: range) -> range:
    """Return the elements of `env_ids` within a contiguous block; its step is positive."""
    first = max(0, -(-(block.start - env_ids.start) // env_ids.step))
    last = max(0, -(-(block.stop - env_ids.start) // env_ids.step))
    return env_ids[first:last]
