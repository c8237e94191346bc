"""One worker process: what it is sent, how it answers, how it ends. Both sides of its pipe.

`workers` decides what follows from a failure. A worker gets a factory of simulators, and `chunks` executes chunks in
them.

Shapes: N environments.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import parent_process, resource_tracker, spawn
from multiprocessing.connection import Connection, wait
from multiprocessing.util import Finalize
from typing import Any, Literal

import torch
import torch.multiprocessing as mp

from asyncflow.envs.base import EnvInterrupted, EnvSpec, Simulator
from asyncflow.envs.chunks import ChunkBoard, EpisodeRunner
from asyncflow.errors import ConfigError, EnvError
from asyncflow.seeding import derive_seed
from asyncflow.signals import ENDING_SIGNALS

SimulatorFactory = Callable[[int], Simulator]

_START_TIMEOUT_S = 300.0  # importing robosuite and compiling its numba functions, on a busy machine
_JOIN_TIMEOUT_S = 2.0
_SLICE_S = 1.0  # of a wait
_STOPPED_S = 0.5  # a slice that ends so much too late is one in which this process was stopped
_NUM_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_prepare = spawn.get_preparation_data
_start_lock = threading.Lock()  # two threads may replace workers, and starting one changes the environment variables


class WorkerFailure(EnvError):
    """A worker is of no use any more.

    Attributes:
        kind: The process died, its simulator raised, or it was silent for too long.
        cause: One line with the worker's name. The message adds the traceback, if there is one.
    """

    def __init__(self, kind: Literal["died", "raised", "timeout"], cause: str, trace: str = "") -> None:
        super().__init__(f"{cause}\n{trace}".rstrip())
        self.kind = kind
        self.cause = cause


class Waker:
    """A pipe to oneself: `wake` ends every wait that includes it, the present ones and all later ones."""

    def __init__(self) -> None:
        self.is_awake = False
        self.receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)

    def wake(self) -> None:
        """Make waits end. Called by any thread or by a signal handler, after `close` too; never waits."""
        self.is_awake = True
        with contextlib.suppress(OSError):  # closed, or full of earlier calls
            self._sender.send(b"\0")

    def close(self) -> None:
        """Free the descriptors; may be called twice."""
        self.receiver.close()
        self._sender.close()


@dataclass(frozen=True)
class WorkerSetup:
    """The setup that every worker gets.

    Attributes:
        make_simulator: Seed -> simulator, pickled.
        board: Memory shared with the parent.
        seed: Environment i is constructed from `derive_seed(seed, "simulator", i)`.
    """

    make_simulator: bytes
    board: ChunkBoard
    seed: int


class Worker:
    """The parent's side of one process. Messages are answered in the order in which they were sent.

    Attributes:
        index: Its place among the workers.
        env_ids: The environments that it simulates.
        name: What messages call it.
    """

    def __init__(self, index: int, env_ids: range, setup: WorkerSetup, waker: Waker) -> None:
        """Start the process; `wait_ready` waits for its simulators."""
        self.index = index
        self.env_ids = env_ids
        self.name = f"worker {index} (environments {env_ids.start} to {env_ids.stop - 1})"
        self._waker = waker
        self._answers: dict[Any, Any] = {}
        self._connection, child = mp.Pipe()
        self._process = mp.get_context("spawn").Process(
            target=_serve, args=(child, setup, env_ids), name=f"simulators-{index}", daemon=True
        )
        with _worker_environment():
            self._process.start()
            # At exit, multiprocessing joins its daemons; a stopped or hung one would never leave. This stands before
            # the block's end, where the signals that came meanwhile are delivered.
            self._kill_at_exit = Finalize(None, self._process.kill, exitpriority=1)
        child.close()  # or the pipe would stay open after the worker's death

    def wait_ready(self) -> tuple[EnvSpec, tuple[str, ...]]:
        """Wait until the simulators are constructed; return their spec and their notices, or raise as `receive`."""
        ready: tuple[EnvSpec, tuple[str, ...]] = self.receive(
            "ready", _START_TIMEOUT_S, "the time to construct one simulator"
        )
        return ready

    def send(self, command: Literal["begin", "step"], key: Any, argument: Any) -> None:
        """Send a message, which is answered under `key`; never waits, since messages are few and small.

        Args:
            command: `begin` starts episodes, its argument is (seed, environment -> episode); `step` executes a chunk
                in each environment of its argument, environment -> whether its cameras are rendered.
            key: What to `receive`.
            argument: Depends on the command.
        """
        with contextlib.suppress(OSError):  # the worker is dead; `receive` says why
            self._connection.send((command, key, argument))

    def receive(self, key: Any, timeout_s: float, limit: str = "env.step_timeout_s") -> Any:
        """Wait for the answer to one message; earlier answers to other messages are kept for their own caller.

        Raises:
            WorkerFailure: The simulator raised, the process died, or it was silent for longer than `timeout_s`, time in
                which this process was stopped (Ctrl-Z) left out.
            EnvInterrupted: The waker was woken.
            ConfigError: The simulator cannot be built as asked, a user's mistake.
        """
        while key not in self._answers:
            kind, key_answered, payload = self._receive_next(timeout_s, limit)
            if kind == "alive":
                continue  # one simulator of several is constructed, or has begun its episode
            if kind == "refused":
                raise ConfigError(payload)
            if kind == "error":
                last_line = payload.strip().rsplit("\n", maxsplit=1)[-1]
                raise WorkerFailure("raised", f"{self.name} raised {last_line}", payload)
            self._answers[key_answered] = payload
        return self._answers.pop(key)

    def _receive_next(self, timeout_s: float, limit: str) -> Any:
        ready = _wait([self._connection, self._process.sentinel, self._waker.receiver], timeout_s)
        if self._waker.receiver in ready:
            raise EnvInterrupted(f"interrupted while waiting for {self.name}")
        if not ready:
            raise WorkerFailure("timeout", f"{self.name} was silent for {timeout_s:g} s ({limit})")
        with contextlib.suppress(EOFError, OSError):
            if self._connection.poll():  # also what a worker said before it died
                return self._connection.recv()
        self._process.join(_JOIN_TIMEOUT_S)  # the exit code comes a moment after the pipe's end
        raise WorkerFailure("died", f"{self.name} died with exit code {self._process.exitcode}")

    def dismiss(self) -> None:
        """Close the pipe, at which the process leaves after the chunk under way; never waits."""
        self._connection.close()

    def stop(self, deadline: float) -> None:
        """Wait for the process until the deadline, then kill it, and free what it held here; may be called twice."""
        if not self._kill_at_exit.still_active():
            return
        self._kill_at_exit.cancel()
        self.dismiss()
        self._process.join(max(0.0, deadline - time.monotonic()))
        if self._process.is_alive():
            self._process.kill()  # works on a stopped process, too
            self._process.join(_JOIN_TIMEOUT_S)
        with contextlib.suppress(ValueError):  # stuck in the kernel, which kills it when it comes out
            self._process.close()


def _wait(objects: list[Any], timeout_s: float) -> list[Any]:
    """Wait as `multiprocessing.connection.wait` does, but do not count the time in which this process was stopped.

    Ctrl-Z stops the workers, too. Time goes on meanwhile, but the slice of the wait that it falls into ends too late.
    """
    remaining_s = timeout_s
    while True:
        slice_s, start = min(_SLICE_S, remaining_s), time.monotonic()
        ready = wait(objects, slice_s)
        waited_s = time.monotonic() - start
        if waited_s < slice_s + _STOPPED_S:
            remaining_s -= waited_s
        if ready or remaining_s <= 0:
            return ready


def _serve(connection: Connection, setup: WorkerSetup, env_ids: range) -> None:
    """Run a worker process: construct the simulators, answer messages, leave when the pipe closes.

    The simulators' memory goes with the process; closing them and the interpreter first would take seconds.
    """
    _die_with_parent()
    with contextlib.suppress(OSError):
        os.dup2(2, 1)  # what simulators print is no part of the program's output
    for number in ENDING_SIGNALS:  # they reach the whole process group; the parent handles them
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    try:
        _work(connection, setup, env_ids)
    except ConfigError as error:
        with contextlib.suppress(OSError):
            connection.send(("refused", None, str(error)))
    except BaseException:
        with contextlib.suppress(OSError):
            connection.send(("error", None, traceback.format_exc()))
        os._exit(1)
    os._exit(0)


def _work(connection: Connection, setup: WorkerSetup, env_ids: range) -> None:
    """Construct the simulators and obey, until the parent closes the pipe or dies."""

    def tell_alive() -> None:
        connection.send(("alive", None, None))

    runners = {}
    for env in env_ids:
        runners[env] = _build_runner(setup, env)
        tell_alive()
    first = runners[env_ids[0]]
    connection.send(("done", "ready", (first.spec, first.notices)))
    while True:
        try:
            command, key, argument = connection.recv()
        except (EOFError, OSError):
            return
        _obey(runners, command, argument, tell_alive)
        connection.send(("done", key, None))


def _build_runner(setup: WorkerSetup, env: int) -> EpisodeRunner:
    make_simulator = pickle.loads(setup.make_simulator)
    return EpisodeRunner(make_simulator(derive_seed(setup.seed, "simulator", env)), env, setup.board)


def _obey(
    runners: dict[int, EpisodeRunner], command: str, argument: Any, tell_alive: Callable[[], None] = lambda: None
) -> None:
    """Execute a command; resets may take long, so each of them is told. A chunk is one message."""
    if command == "begin":
        seed, episodes = argument
        for env, episode in episodes.items():
            runners[env].begin(seed, episode)
            tell_alive()
    else:
        for env, is_rendered in argument.items():
            runners[env].execute(is_rendered)


def _die_with_parent() -> None:
    """Let the kernel kill this process when its parent ends: hung or stopped, it would not see its pipe close.

    Linux only. The signal comes when the *thread* that started this process ends. Workers are started by the thread
    that uses the environments; a replacement by the collector's, which ends when they are no longer needed.
    """
    parent = parent_process()
    if sys.platform != "linux" or parent is None:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent.pid:  # it died before the line above
        os._exit(1)


def _prepare_without_main(name: str) -> dict[str, Any]:
    return {key: value for key, value in _prepare(name).items() if not key.startswith("init_main")}


@contextlib.contextmanager
def _worker_environment() -> Iterator[None]:
    """Set what a worker inherits: one thread per numeric library, and signals blocked until the worker ignores them.

    A worker does not run the main program's file again, as `spawn` has it: cloudpickle sends along what is needed of
    it. So a script that makes environments needs no `if __name__ == "__main__"`.
    """
    with _start_lock:
        saved = {name: os.environ.get(name) for name in _NUM_THREADS}
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
        resource_tracker.ensure_running()  # here, so that it too blocks those that it does not ignore by itself
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)  # it has unblocked the others
        os.environ.update(dict.fromkeys(_NUM_THREADS, "1"))
        try:
            spawn.get_preparation_data = _prepare_without_main
            yield
        finally:
            spawn.get_preparation_data = _prepare
            for name, value in saved.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
