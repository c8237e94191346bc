"""The parent's side of the interpreters in which simulators run: one server process for each, started once.

A server imports what its simulators need and then forks worker processes (`simulators/server.py`). It serves this
process until that ends, whichever environments come and go. Any thread may ask for workers.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

from asyncflow.config.interpreters import KINDS
from asyncflow.errors import ConfigError
from asyncflow.signals import ENDING_SIGNALS
from asyncflow.simulators import boot_file
from asyncflow.simulators.messages import Channel

_END_TIMEOUT_S = 2.0
_NUM_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
_OTHER_PYTHON = ("PYTHONHOME", "__PYVENV_LAUNCHER__")  # of this interpreter, and wrong for any other


class Interpreter(NamedTuple):
    """Where simulators run.

    Attributes:
        python: The interpreter; None means this process's own.
        preload: `module:function` that imports what its simulators need; None where nothing is known of them.
        kind: As `Recipe.kind`.
    """

    python: str | None = None
    preload: str | None = None
    kind: str | None = None

    @property
    def executable(self) -> str:
        """The program that is started."""
        return self.python or sys.executable

    def search_path(self) -> dict[str, Any]:
        """Return where it searches for modules: as here, or after its own folders in this one and the script's."""
        if self.python is None:
            return {"path": list(sys.path), "more_path": []}
        main = sys.modules["__main__"]
        script = getattr(main, "__file__", None) if getattr(main, "__spec__", None) is None else None
        return {"path": None, "more_path": [os.getcwd(), *([] if script is None else [str(Path(script).parent)])]}


class Server:
    """A running server."""

    def __init__(self, interpreter: Interpreter) -> None:
        """Start it; it imports while the caller goes on.

        Raises:
            ConfigError: The program cannot be started.
        """
        self.interpreter, self.owner = interpreter, os.getpid()
        control, theirs = socket.socketpair()
        self._control = control
        command = [interpreter.executable, str(boot_file()), str(theirs.fileno())]
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)  # it and its workers inherit that
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=_error_output(),  # what an interpreter prints when it starts is no part of the output
                pass_fds=[theirs.fileno()],
                env=make_environment(interpreter),
            )
        except OSError as error:
            control.close()
            raise ConfigError(f"env.python = {interpreter.executable}: {error.strerror}") from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()
        # The kernel's signal at a parent's end comes when the thread that started the child ends.
        parent = os.getpid() if threading.current_thread() is threading.main_thread() else None
        setup = {"parent": parent, "preload": interpreter.preload, **interpreter.search_path()}
        with contextlib.suppress(OSError):  # it has refused; a worker that is asked for says why
            Channel(control).send(setup)

    def start_worker(self, board: int) -> Channel:
        """Ask for a worker; return the parent's end of its channel.

        Args:
            board: Descriptor of the shared memory.

        Raises:
            ConnectionError: The server has ended.
        """
        mine, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self._control, [b"w"], [theirs.fileno(), board])
            except ConnectionError:
                mine.close()
                raise
        return Channel(mine)

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    @property
    def process(self) -> int:
        """The number of its process."""
        return self._process.pid

    def find_end(self) -> tuple[int | None, str]:
        """Return its exit code, None while it runs, and what it said before its end; waits a moment for that."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_TIMEOUT_S)
        if self._process.returncode is None:
            return None, ""
        with contextlib.suppress(OSError):
            return self._process.returncode, self._control.recv(65536).decode(errors="replace")
        return self._process.returncode, ""

    def end(self) -> None:
        """Let it end, and its workers with it."""
        self._control.close()
        if self.owner != os.getpid():  # a fork of the process that started it
            return
        try:
            self._process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:  # it imports something
            self._process.kill()
            self._process.wait()


_servers: dict[Interpreter, Server] = {}
_lock = threading.Lock()


def start_worker(interpreter: Interpreter, board: int) -> tuple[Server, Channel]:
    """Start a worker, and its server unless that runs; return the server and the channel to the worker.

    Raises:
        ConfigError: The interpreter cannot be started.
    """
    with _lock:
        server = _servers.get(interpreter)
        if server is not None and server.owner == os.getpid():
            with contextlib.suppress(ConnectionError):
                return server, server.start_worker(board)
            server.end()
        server = _servers[interpreter] = Server(interpreter)
        with contextlib.suppress(ConnectionError):
            return server, server.start_worker(board)
    raise ConfigError(explain_end(interpreter, *server.find_end()))


def explain_end(interpreter: Interpreter, code: int | None, said: str) -> str:
    """Return in one line why an interpreter ended before it could simulate; of its end as `Server.find_end` says."""
    if said:
        mends = interpreter.kind is None or "; run: " in said
        return f"env.python: {said}" + ("" if mends else f"; run: asyncflow envs install {interpreter.kind}")
    return f"env.python = {interpreter.executable}: it ended {describe_exit(code)} {_describe_moment(interpreter)}"


def _describe_moment(interpreter: Interpreter) -> str:
    """Return when a server that said nothing ended, and what mends it."""
    if interpreter.kind is not None:
        install = f"asyncflow envs install {interpreter.kind}"
        return f"before it had imported {KINDS[interpreter.kind].package}; run: {install}"
    if interpreter.preload is not None:
        return f"before it had imported {interpreter.preload.partition(':')[0]}"
    return "before it could simulate; expected Python 3.8 or newer, with numpy and the simulator's packages"


def describe_exit(code: int | None) -> str:
    """Return in words how a process ended: "with exit code 3", "by SIGSEGV"."""
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"by {signal.Signals(-code).name}"
    return f"with exit code {code}"


def _error_output() -> int:
    """Return where errors are written; nowhere, if that is closed."""
    try:
        os.fstat(2)
    except OSError:
        return subprocess.DEVNULL
    return 2


def running_servers() -> list[int]:
    """Return the processes of this process's servers."""
    own = [server for server in _servers.values() if server.owner == os.getpid()]
    return [server.process for server in own if server.is_running]


def running_workers() -> list[int]:
    """Return the processes of this process's workers, as Linux lists them."""
    found: list[int] = []
    for server in running_servers():
        with contextlib.suppress(OSError):  # it has just ended
            found += map(int, Path(f"/proc/{server}/task/{server}/children").read_text().split())
    return found


def make_environment(interpreter: Interpreter) -> dict[str, str]:
    """Return the variables of a server or a worker: those of this process, with one thread for each library."""
    variables = {**os.environ, **dict.fromkeys(_NUM_THREADS, "1")}
    if interpreter.python is not None:
        variables = {name: value for name, value in variables.items() if name not in _OTHER_PYTHON}
    return variables


@atexit.register
def _end_servers() -> None:
    for server in _servers.values():
        server.end()
    _servers.clear()
