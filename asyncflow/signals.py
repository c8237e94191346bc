"""What Ctrl-C and SIGTERM do: end the program at once, or first end a run with a checkpoint.

Owns the process's signal handlers and its sudden end. It must not know what is stopped.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from typing import NoReturn

EXIT_INTERRUPTED = 130
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def interrupt_on_signals() -> None:
    """Let a signal raise `KeyboardInterrupt` in the main thread."""
    for number in _SIGNALS:
        signal.signal(number, signal.default_int_handler)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Let signals wait until the block's end, so that what is made in it has an owner who frees it. Main thread.

    A mask would not do: the kernel gives a signal to any thread that does not block it, and Python then calls the
    handler in the main thread all the same.
    """
    came: list[int] = []
    handlers = {number: signal.signal(number, lambda number, _: came.append(number)) for number in _SIGNALS}
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
        for number in _SIGNALS:
            signal.signal(number, _leave_at_once)
        request_stop()
        with contextlib.suppress(OSError):  # the reader may be gone, as `tee` is after Ctrl-C
            os.write(2, b"stopping: saving what was trained; once more to quit at once\n")  # safe in a handler

    for number in _SIGNALS:
        signal.signal(number, stop)


def _leave_at_once(*_: object) -> NoReturn:
    """Kill the simulators and end the process, whatever its threads wait for. Files are whole at every moment."""
    try:
        for process in multiprocessing.active_children():
            with contextlib.suppress(ValueError, OSError):  # another thread has just closed it
                process.kill()
    finally:
        os._exit(EXIT_INTERRUPTED)
