"""Commands that are shown to be copied: whatever a path or a value holds, a shell reads them as they were meant."""

from __future__ import annotations

import shlex
from pathlib import Path


def command(*words: str | Path, program: str = "asyncflow") -> str:
    """Return a command line, quoted where a shell needs it; a path is never taken for a flag or a home folder."""
    return shlex.join([program, *(_as_word(word) for word in words)])


def _as_word(word: str | Path) -> str:
    return f"./{word}" if isinstance(word, Path) and str(word).startswith(("-", "~")) else str(word)
