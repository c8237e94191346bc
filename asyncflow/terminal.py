r"""The terminal: commands to copy, notices, how a command ends, and standard streams as they come.

Streams may be closed, full, gone, or of another encoding: none of that ends a command. Whatever a path or a value in a
shown command holds, a shell reads it as it was meant.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shlex
import sys
import traceback
from pathlib import Path
from typing import Any, TextIO, cast

from asyncflow.errors import AsyncflowError

EXIT_CRASH, EXIT_USAGE = 1, 2
_REFUSALS = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR,
    errno.EISDIR, errno.EFBIG, errno.ENFILE,
}  # fmt: skip
_told: set[str] = set()


def command(*words: str | Path, program: str = "asyncflow") -> str:
    """Return a command line, quoted where a shell needs it; a path is never taken for a flag or a home folder."""
    return shlex.join([program, *(_as_word(word) for word in words)])


def _as_word(word: str | Path) -> str:
    return f"./{word}" if isinstance(word, Path) and str(word).startswith(("-", "~")) else str(word)


def tell_once(topic: str, text: str) -> None:
    """Show a line about a topic, unless this process has shown one about it before."""
    if topic in _told:
        return
    _told.add(topic)
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(f"asyncflow: note: {' '.join(text.split())}", file=sys.stderr, flush=True)


def complain(message: str) -> int:
    """Print a user's mistake in one line."""
    print(f"asyncflow: error: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_USAGE


def explain_usage(error: Any) -> str:
    """Return what was wrong with a command line, by an error of click's."""
    missing = getattr(error, "param", None) if type(error).__name__ == "MissingParameter" else None
    if missing is not None:
        return f"the {missing.name} is missing: {missing.help[0].lower()}{missing.help[1:]}"
    possibilities = getattr(error, "possibilities", None)
    if "Did you mean" in error.message:
        return str(error.message)
    if not possibilities:
        return str(error.format_message())
    return f"{error.message.rstrip('.')}; did you mean {' or '.join(possibilities)}?"


def find_refusal(error: BaseException) -> str | None:
    """Return in one line what the operating system refused, where that is the user's to change; None elsewhere."""
    links: BaseException | None = error
    while links is not None:
        if os.strerror(errno.EMFILE) in str(links):
            limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            return f"too many open files: this process may have {limit}; raise the limit with `ulimit -n`"
        links = links.__cause__ or links.__context__
    if isinstance(error, OSError) and error.errno in _REFUSALS and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return None


def crash(error: BaseException) -> int:
    """Print an exception with its traceback, and what it says in one last line."""
    if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):
        error = error.__context__  # click makes an exit of it, without a word
    traceback.print_exception(error)
    if isinstance(error, SystemExit):
        error = AsyncflowError(f"code that was called ended the program: sys.exit({error.code!r})")
    kind = "" if isinstance(error, AsyncflowError) else f"{type(error).__name__}: "
    print(f"asyncflow: crashed: {kind}{' '.join(str(error).split())[:300]}", file=sys.stderr)
    return EXIT_CRASH


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
