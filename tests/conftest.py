"""Fixtures that several test files share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
CommandLine = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run_cli(tmp_path: Path) -> CommandLine:
    """Return a function that runs `asyncflow` in an empty folder, as a user would, and returns what it said."""

    def run(*arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "asyncflow", *arguments]
        plain = {name: text for name, text in os.environ.items() if name not in ("FORCE_COLOR", "NO_COLOR")}
        return subprocess.run(
            command, cwd=tmp_path, env=plain, capture_output=True, text=True, timeout=timeout_s, check=False
        )

    return run
