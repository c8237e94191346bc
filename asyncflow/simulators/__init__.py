"""What runs in a simulator's process: numpy and the standard library alone, for Python 3.8 and newer.

`boot` starts an interpreter, `server` imports a simulator's packages once and forks workers, `worker` builds simulators
and obeys its parent, `runner` executes chunks and writes what they yield to the shared `board`.
"""

from __future__ import annotations

from pathlib import Path


def boot_file() -> Path:
    """Return the file that an interpreter runs to simulate."""
    return Path(__file__).parent / "boot.py"
