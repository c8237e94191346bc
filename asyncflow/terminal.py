"""Standard streams as they come: closed, full, gone, or of another encoding. None of that ends a command."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any, TextIO, cast


class LossyFile:
    """A file whose reader may leave: what cannot be written is lost, and ends nothing."""

    def __init__(self, file: Any) -> None:
        """Wrap a file of texts or bytes."""
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    @property
    def buffer(self) -> LossyFile:
        """The stream for bytes, as forgiving as this one."""
        return LossyFile(self._file.buffer)

    def write(self, text: str | bytes) -> int:
        """Write, or lose what was to be written."""
        with contextlib.suppress(OSError, ValueError):  # a ValueError: code from elsewhere has closed it
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        with contextlib.suppress(OSError, ValueError):
            self._file.flush()


def prepare_streams() -> None:
    r"""Let this process write to standard output and error whatever they are.

    The numbers 0, 1 and 2 of closed ones are taken: the next file that is opened would get them, and with them what
    libraries and other processes print. Characters that an encoding lacks are written as `\xe9`.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # the lowest that is free
        pass
    os.close(number)
    sys.stdout = _prepare(sys.stdout, 1)
    sys.stderr = _prepare(sys.stderr, 2)


def _prepare(stream: Any, number: int) -> TextIO:
    """Return what to write to; Python has None in place of a stream that was closed when it started."""
    if stream is None:
        stream = open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  for the whole process
    stream.reconfigure(errors="backslashreplace")
    return cast(TextIO, LossyFile(stream))


def finish_streams() -> None:
    """Write what waits; where nobody reads it any more, let it go nowhere, or Python would complain at its exit."""
    _finish(sys.__stdout__, 1)
    _finish(sys.__stderr__, 2)


def _finish(stream: TextIO | None, number: int) -> None:
    try:
        if stream is not None and not stream.closed:
            stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
