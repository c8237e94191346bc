"""Tells something once on standard error: asyncflow goes on, but not as it usually does."""

from __future__ import annotations

import contextlib
import sys

_told: set[str] = set()


def tell_once(topic: str, text: str) -> None:
    """Show a line about a topic, unless this process has shown one about it before."""
    if topic in _told:
        return
    _told.add(topic)
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(f"asyncflow: note: {' '.join(text.split())}", file=sys.stderr, flush=True)
