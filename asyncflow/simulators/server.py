"""Imports what simulators need once, then forks a worker whenever the parent asks for one.

Workers start in milliseconds, and share the memory of what was imported. The server has one thread, keeps no simulator,
and ends with its parent; its workers end with it.

It is told what to import, then gets two descriptors for each worker: its end of the channel to the parent, and the
board. It keeps that end, too, and says there how the worker ended, before the parent sees the channel close.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import select
import signal
import socket
import struct
import sys
from typing import Any

from asyncflow.errors import AsyncflowError
from asyncflow.signals import ENDING_SIGNALS
from asyncflow.simulators import worker
from asyncflow.simulators.imports import explain_import
from asyncflow.simulators.messages import Channel

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_TWO_DESCRIPTORS = struct.Struct("2i")


def serve(descriptor: int) -> None:
    """Serve the parent at the other end of `descriptor` until it is gone; never returns."""
    for number in ENDING_SIGNALS:  # they reach the whole process group, whose parent handles them; blocked, too
        signal.signal(number, signal.SIG_IGN)
    control = Channel(socket.socket(fileno=descriptor))
    setup = control.receive()
    if setup["parent"] == os.getppid():  # else a script stands in between, and the end of the channel has to do
        die_with(setup["parent"])
    worker.adopt_path(setup)
    problem = _preload(setup["preload"])
    gc.collect()
    _trim()
    gc.freeze()  # or the collector would write to every object, and so copy the pages that workers share
    _Server(control.socket, problem).run()
    os._exit(0)  # closing the interpreter would take seconds


def die_with(parent: int) -> None:
    """Let the kernel kill this process when its parent ends: hung or stopped, it would not see its channel close.

    Linux only. The signal comes when the *thread* that started this process ends.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)


def _preload(name: str | None) -> str | None:
    """Call `module:function`, which imports what workers need; return why that cannot be done, if it cannot."""
    if name is None:
        return None
    module, _, function = name.partition(":")
    try:
        getattr(importlib.import_module(module), function)()
    except AsyncflowError as error:
        return str(error)
    except BaseException as error:  # whatever a package raises that is imported, `SystemExit` included
        return explain_import(error, module)
    return None


def _trim() -> None:
    """Give freed memory back to the system, as far as its C library can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class _Server:
    """The loop that starts workers and says how they ended."""

    def __init__(self, control: socket.socket, problem: str | None) -> None:
        """Get ready.

        Args:
            control: Its connection to the parent.
            problem: Why no worker can be started; None if one can.
        """
        self._control, self._problem = control, problem
        self._channels: dict[int, Channel] = {}  # of the workers, by their process
        self._ended, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)

    def run(self) -> None:
        """Serve until the parent is gone, then end all workers."""
        is_served = True
        while is_served:
            ready, _, _ = select.select([self._control, self._ended], [], [])
            if self._ended in ready:
                self._ended.recv(4096)
                self._bury()
            if self._control in ready:
                is_served = self._answer()
        for process in self._channels:
            os.kill(process, signal.SIGKILL)

    def _answer(self) -> bool:
        """Start a worker; return whether the parent is still there."""
        try:
            byte, ancillary, *_ = self._control.recvmsg(1, socket.CMSG_SPACE(_TWO_DESCRIPTORS.size))
        except ConnectionError:
            return False
        if not byte:
            return False
        if not ancillary or len(ancillary[0][2]) < _TWO_DESCRIPTORS.size:
            return True  # this process may have no more descriptors; the parent sees its request's end
        descriptor, board = _TWO_DESCRIPTORS.unpack(ancillary[0][2])
        for each in (descriptor, board):
            os.set_inheritable(each, False)  # or programs that simulators start would keep them
        channel = Channel(socket.socket(fileno=descriptor))
        if self._problem is not None:
            with contextlib.suppress(OSError):
                channel.send({"kind": "refused", "text": self._problem})
            channel.close()
        elif process := os.fork():
            self._channels[process] = channel
        else:
            self._become_worker(channel, board)
        os.close(board)
        return True

    def _become_worker(self, channel: Channel, board: int) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        parent = os.getppid()
        die_with(parent)
        for end in (self._control, self._ended, self._wake, *(each.socket for each in self._channels.values())):
            end.close()  # or they would stay open after the death of whose they are
        worker.run(channel, board)

    def _bury(self) -> None:
        """Tell the parent of every worker that has ended."""
        for process in list(self._channels):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                channel = self._channels.pop(process)
                _say_last(channel, {"kind": "ended", "code": _exit_code(status)})
                channel.close()


def _say_last(channel: Channel, message: Any) -> None:
    """Send a message unless the parent is gone, or has stopped reading."""
    channel.socket.setblocking(False)
    with contextlib.suppress(OSError):
        channel.send(message)


def _exit_code(status: int) -> int:
    """Return an exit code as `subprocess` has it: that of a signal is negative."""
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
