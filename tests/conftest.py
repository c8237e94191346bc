"""Fixtures that several test files share."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from absent_peers import stand_in
from command_line import CommandLine
from silent import LIFT_VLA, record, start

from asyncflow import cli

# LeRobot holds another torch: its tests have an environment of their own, made by `make test-lerobot`.
collect_ignore = [] if any(importlib.metadata.distributions(name="lerobot")) else ["lerobot"]

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def run_cli(tmp_path: Path) -> CommandLine:
    """Return a function that runs `asyncflow` in an empty folder, as a user would, and returns what it said."""

    def run(*arguments: str, timeout_s: float = 120, module: str = "asyncflow") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", module, *arguments]
        plain = {name: text for name, text in os.environ.items() if name not in ("FORCE_COLOR", "NO_COLOR")}
        return subprocess.run(
            command, cwd=tmp_path, env=plain, capture_output=True, text=True, timeout=timeout_s, check=False
        )

    return run


@pytest.fixture
def run_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """Return `run_cli` within this process, which has paid for importing torch."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        code = cli.run(list(arguments))
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def tools() -> Callable[[str], ModuleType]:
    """Return a function that imports a tool by its name."""
    return lambda name: importlib.import_module(f"tools.{name}")


@pytest.fixture(scope="module")
def peers(tools: Callable[[str], ModuleType]) -> Iterator[Callable[[str], ModuleType]]:
    """Yield a function that imports a tool by its name while stand-ins take the peers' places."""
    with stand_in():
        yield tools


@pytest.fixture(scope="session")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], Path]:
    """Return a function that trains the toy without a cut, once for the same changes; its folder is only read."""
    folders: dict[str, Path] = {}

    def train_once(changes: dict[str, Any]) -> Path:
        key = json.dumps(changes, sort_keys=True)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("uncut") / "run"
            start(folders[key], "toy", changes)
        return folders[key]

    return train_once


@pytest.fixture(scope="session")
def lift_vla(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Return the folder, which is only read, of an uncut run with `LIFT_VLA` on real simulators, and its record."""
    folder = tmp_path_factory.mktemp("lift") / "run"
    return folder, record(folder, "lift", LIFT_VLA)
