"""How a command ends: the exit code, and what is said on standard error about a mistake or a crash."""

from __future__ import annotations

import errno
import os
import resource
import sys
import traceback
from typing import Any

from asyncflow.errors import AsyncflowError

EXIT_CRASH, EXIT_USAGE = 1, 2
_REFUSALS = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR,
    errno.EISDIR, errno.EFBIG, errno.ENFILE,
}  # fmt: skip


def complain(message: str) -> int:
    """Print a user's mistake in one line."""
    print(f"asyncflow: error: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_USAGE


def explain_usage(error: Any) -> str:
    """Return what was wrong with a command line, by an error of click's."""
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
