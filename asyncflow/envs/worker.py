"""The parent's side of one worker process: what it is sent, how it answers, how it ends.

`workers` decides what follows from a failure. `simulators/worker.py` is the other side.

Shapes: N environments.
"""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any, Literal

import cloudpickle

from asyncflow.envs.base import EnvInterrupted
from asyncflow.envs.chunks import ChunkBoard
from asyncflow.envs.server import Interpreter, describe_exit, explain_end, make_environment, start_worker
from asyncflow.errors import ConfigError, ContractError, EnvError
from asyncflow.simulators.base import Simulator
from asyncflow.simulators.spec import EnvSpec

_START_TIMEOUT_S = 300.0  # importing robosuite and compiling its numba functions, on a busy machine
_JOIN_TIMEOUT_S = 2.0
_SLICE_S = 1.0  # of a wait
_STOPPED_S = 0.5  # a slice that ends so much too late is one in which this process was stopped


@dataclass(frozen=True)
class Recipe:
    """A simulator by its name, which any interpreter can build that has its packages.

    Attributes:
        target: `module:name` of what is called with a seed and the arguments.
        arguments: Keyword arguments, as JSON holds them.
        preload: `module:function` that imports what it needs, called once for all workers; None where there is none.
        kind: Which of `asyncflow envs` it is, so that its interpreter may be a remembered one; None where it is none.
    """

    target: str
    arguments: dict[str, Any] = field(default_factory=dict)
    preload: str | None = None
    kind: str | None = None


SimulatorFactory = Callable[[int], Simulator] | Recipe
SimulatorFactories = SimulatorFactory | Mapping[str, SimulatorFactory]
"""How simulators are made: those of one task, or task -> those of each."""


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
        factories: How simulators of each task are made, as `pack_factory` returns it; environments take turns.
        board: Memory shared with the workers.
        seed: Environment i is constructed from `derive_seed(seed, "simulator", i)`.
        interpreter: What runs the workers.
    """

    factories: list[dict[str, Any]]
    board: ChunkBoard
    seed: int
    interpreter: Interpreter

    def message(self, env_ids: range) -> dict[str, Any]:
        """Return what a worker is told first."""
        return {
            "factories": self.factories,
            "board": self.board.memory.plan.to_json(),
            "seed": self.seed,
            "env_ids": [env_ids.start, env_ids.stop],
            "environment": make_environment(self.interpreter),
            "folder": os.getcwd(),
            **self.interpreter.search_path(),
        }


class Worker:
    """The parent's side of one process. Messages are answered in the order in which they were sent.

    Attributes:
        index: Its place among the workers.
        env_ids: The environments that it simulates.
        name: What messages call it.
        process: Its number in the operating system; None until it has started, and after its end.
        versions: Of Python and of the packages that simulate, by name.
    """

    def __init__(self, index: int, env_ids: range, setup: WorkerSetup, waker: Waker) -> None:
        """Start the process; `wait_ready` waits for its simulators.

        Raises:
            ConfigError: Its interpreter cannot be started.
        """
        self.index = index
        self.env_ids = env_ids
        self.name = f"worker {index} (environments {env_ids.start} to {env_ids.stop - 1})"
        self.process: int | None = None
        self.versions: dict[str, str] = {}
        self._waker = waker
        self._exit_code: int | None = None
        self._importing: str | None = None  # the module that it imports at present
        self._num_sent = 0
        self._keys: dict[int, Any] = {0: "ready"}  # number of a message -> what it is received under
        self._answers: dict[Any, Any] = {}
        self._server, self._channel = start_worker(setup.interpreter, setup.board.memory.descriptor)
        self._channel.socket.settimeout(_START_TIMEOUT_S)  # an interpreter that hangs reads nothing
        with contextlib.suppress(OSError):  # it is refused, or that; `receive` says why
            self._channel.send(setup.message(env_ids))
        self._channel.socket.settimeout(None)

    def wait_ready(self) -> tuple[dict[int, EnvSpec], list[str]]:
        """Wait until the simulators are constructed, or raise as `receive`; then `versions` are known.

        Returns:
            The spec of each task that is simulated here, by its place, and notices.
        """
        ready = self.receive("ready", _START_TIMEOUT_S, "the time to construct one simulator")
        self.versions = ready["versions"]
        return {task: EnvSpec.from_json(spec) for task, spec in ready["specs"]}, ready["notices"]

    def begin(self, key: Any, seed: int, episodes: dict[int, int]) -> None:
        """Start an episode in each environment, environment -> episode; never waits.

        The answer is received under `key`.
        """
        self._send(key, {"command": "begin", "seed": seed, "episodes": list(episodes.items())})

    def step(self, key: Any, envs: dict[int, bool]) -> None:
        """Execute a chunk in each environment, environment -> whether its cameras are rendered; never waits.

        The answer is received under `key`.
        """
        self._send(key, {"command": "step", "envs": list(envs.items())})

    def _send(self, key: Any, message: dict[str, Any]) -> None:
        self._num_sent += 1
        self._keys[self._num_sent] = key
        with contextlib.suppress(OSError):  # the worker is dead; `receive` says why
            self._channel.send({"number": self._num_sent, **message})

    def receive(self, key: Any, timeout_s: float, limit: str = "env.step_timeout_s") -> Any:
        """Wait for the answer to one message; earlier answers to other messages are kept for their own caller.

        Raises:
            WorkerFailure: The simulator raised, the process died, or it was silent for longer than `timeout_s`, time in
                which this process was stopped (Ctrl-Z) left out.
            EnvInterrupted: The waker was woken.
            ConfigError: The simulator cannot be built as asked, a user's mistake.
        """
        while key not in self._answers:
            message = self._receive_next(timeout_s, limit)
            kind = message["kind"]
            if kind == "ended":  # the channel stays open where a process that it started holds it, too
                raise self._explain_death()
            if kind == "refused":
                raise ConfigError(message["text"])
            if kind == "error":
                trace = message["trace"]
                raise WorkerFailure("raised", f"{self.name} raised {trace.strip().rsplit(chr(10), 1)[-1]}", trace)
            if kind == "done":
                self._answers[self._keys.pop(message["number"])] = message
        return self._answers.pop(key)

    def _receive_next(self, timeout_s: float, limit: str) -> Any:
        """Return the next message of any kind, and note what it says of the process itself."""
        while not self._channel.has_message:
            ready = _wait([self._channel, self._waker.receiver], timeout_s)
            if self._waker.receiver in ready:
                raise EnvInterrupted(f"interrupted while waiting for {self.name}")
            if not ready:
                raise WorkerFailure("timeout", f"{self.name} was silent for {timeout_s:g} s ({limit})")
            try:
                self._channel.read()
            except EOFError:
                raise self._explain_death() from None
        return self._take()

    def _take(self) -> Any:
        try:
            message = self._channel.take()
        except ValueError:  # it was killed while it wrote, and its server's last message follows what it had written
            raise self._explain_death() from None
        if message["kind"] == "started":
            self.process = message["process"]
        elif message["kind"] in ("importing", "imported"):
            self._importing = message.get("module")
        elif message["kind"] == "ended":
            self.process, self._exit_code = None, message["code"]
        return message

    def _explain_death(self) -> Exception:
        """Return what the process's end is: a user's mistake, or, as where the system lacks memory, a failure."""
        interpreter, killed = self._server.interpreter, -signal.SIGKILL
        if self.process is None and self._exit_code is None:  # its server ended before it could start it
            code, said = self._server.find_end()
            if code != killed:
                return ConfigError(explain_end(interpreter, code, said))
        self.process = None
        if self._importing and self._exit_code not in (None, killed):
            ended = f"it ended {describe_exit(self._exit_code)} while it imported {self._importing}"
            return ConfigError(f"env.python = {interpreter.executable}: {ended}")
        how = "its server" if self._exit_code is None else f"exit code {self._exit_code}"
        return WorkerFailure("died", f"{self.name} died with {how}")

    def dismiss(self) -> None:
        """Close the channel, at which the process leaves after the chunk under way; never waits."""
        if self._server.owner == os.getpid():  # a fork of this process only lets go of what it inherited
            with contextlib.suppress(OSError):
                self._channel.socket.shutdown(socket.SHUT_WR)

    def kill(self) -> None:
        """End the process at once, unless it has ended."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process, signal.SIGKILL)  # works on a stopped process, too

    def stop(self, deadline: float) -> None:
        """Wait for the process until the deadline, then kill it, and free what it held here; may be called twice."""
        if self._channel.fileno() < 0:
            return
        self.dismiss()
        if self._server.owner == os.getpid() and not self._wait_for_end(deadline):
            self.kill()
            self._wait_for_end(time.monotonic() + _JOIN_TIMEOUT_S)
        self._channel.close()

    def _wait_for_end(self, deadline: float) -> bool:
        """Wait until the server tells the process's end, or dies as well; return whether that came."""
        try:
            while self._exit_code is None:
                if not wait([self._channel.socket], max(0.0, deadline - time.monotonic())):
                    return False
                self._channel.read()
                while self._channel.has_message:
                    self._take()
        except (EOFError, WorkerFailure):
            self.process = None
        return True


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


def pack_factory(make_simulator: SimulatorFactory, interpreter: Interpreter) -> dict[str, Any]:
    """Return a factory as it is sent to workers.

    Raises:
        ContractError: A function cannot be pickled.
        ConfigError: A function cannot be sent to another interpreter.
    """
    if isinstance(make_simulator, Recipe):
        return {"target": make_simulator.target, "arguments": make_simulator.arguments}
    if interpreter.python is not None:
        raise ConfigError(
            f"env.python = {interpreter.python}: make_simulator = {make_simulator} is an object of this interpreter; "
            "for another one name it, as in Recipe('my_module:MySimulator')"
        )
    try:
        return {"pickle": base64.b64encode(cloudpickle.dumps(make_simulator)).decode()}
    except Exception as error:  # whatever a class of another package raises
        raise ContractError(
            f"make_simulator = {make_simulator} cannot be pickled for the worker processes: {error}; what it refers to "
            "must not be open files, locks, running environments and the like"
        ) from None
