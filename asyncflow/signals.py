"""Handle signals that ask a program to end: end it at once, or first end a run with a checkpoint.

Besides Ctrl-C and SIGTERM these are a closed terminal's and those that batch systems send some time before the end.

This file sets the signal handlers of the process; workers ignore these signals.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

EXIT_INTERRUPTED = 130
# A second one of these means "at once". The others may come twice for one event: a closed terminal tells the shell's
# jobs, and the kernel tells them again.
_INSISTENT = (signal.SIGINT, signal.SIGTERM)
ENDING_SIGNALS = (*_INSISTENT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


def interrupt_on_signals() -> None:
    """Let a signal raise `KeyboardInterrupt` in the main thread."""
    for number in _heard():
        signal.signal(number, signal.default_int_handler)


def _heard() -> list[signal.Signals]:
    """Return the signals to handle: `nohup` and its like have a program ignore some, and it must go on doing so."""
    return [each for each in ENDING_SIGNALS if each in _INSISTENT or signal.getsignal(each) is not signal.SIG_IGN]


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Let signals wait until the block's end, so that what is made in it has an owner who frees it. Main thread.

    A mask would not do: the kernel gives a signal to any thread that does not block it, and Python then calls the
    handler in the main thread all the same.
    """
    came: list[int] = []
    handlers = {number: signal.signal(number, lambda number, _: came.append(number)) for number in _heard()}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def stop_on_signals(request_stop: Callable[[], None]) -> None:
    """Let the first signal call `request_stop`, which must not wait, and the second end the process at once."""

    def stop(*_: object) -> None:
        for number in _heard():
            signal.signal(number, _leave_at_once if number in _INSISTENT else lambda *_: None)
        request_stop()
        with contextlib.suppress(OSError):  # the reader may be gone, as `tee` is after Ctrl-C
            os.write(2, b"stopping: saving what was trained; once more to quit at once\n")  # safe in a handler

    for number in _heard():
        signal.signal(number, stop)


@contextlib.contextmanager
def ctrl_c_calls(request_stop: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C call `request_stop`, which must not wait, within a block; a second one is Python's own.

    Yields a function that tells whether Ctrl-C came. Outside the main thread, and where a program handles Ctrl-C by
    itself, nothing changes.
    """
    interrupts: list[int] = []

    def stop(number: int, _: object) -> None:
        interrupts.append(number)
        signal.signal(number, signal.default_int_handler)
        request_stop()

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    signal.signal(signal.SIGINT, stop)
    try:
        yield lambda: bool(interrupts)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave_at_once(*_: object) -> NoReturn:
    """End the process, whatever its threads wait for; simulators end with it. Files are whole at every moment."""
    os._exit(EXIT_INTERRUPTED)
