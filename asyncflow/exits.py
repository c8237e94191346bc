"""How a command ends: the exit code, and what is said on standard error about a mistake or a crash."""

from __future__ import annotations

import sys
import traceback
from typing import Any

from asyncflow.errors import AsyncflowError

EXIT_CRASH, EXIT_USAGE = 1, 2


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
