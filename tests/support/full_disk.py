"""A disk that is full."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from asyncflow.run import recorded


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


def fail_to_save(monkeypatch: pytest.MonkeyPatch, updates: int) -> None:
    """Let no checkpoint be written after so many updates; those of others are."""
    save = recorded.save_checkpoint

    def save_or_fail(run_dir: Path, source: Any, state: dict[str, Any], groups: Any) -> Path:
        if state.updates == updates:
            raise OSError(28, "No space left on device")
        return save(run_dir, source, state, groups)

    monkeypatch.setattr(recorded, "save_checkpoint", save_or_fail)
