"""A disk that is full."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def full_disk(folder: Path, num_bytes: int = 10) -> Iterator[None]:
    """Let files grow by no more than `num_bytes` over the shortest in `folder`, which may end within a record."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = min(path.stat().st_size for path in folder.iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
