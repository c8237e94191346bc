"""Commands under stress: started, watched, interrupted, and what they leave behind. Linux only."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from asyncflow.metrics.glossary import is_timing
from asyncflow.profile.slow import Emulation
from asyncflow.run.checkpoint import list_checkpoints, load_checkpoint
from tools.bench.common.report import REPOSITORY
from tools.emulated import program as program_of
from tools.stress.report import Checks

_PATH = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])  # commands run anywhere
_END_TIMEOUT_S = 180.0
_LEAVE_TIMEOUT_S = 5.0
_BOOKS = ("trained", "in_flight", "dropped", "invalid")


class Command:
    """An `asyncflow` command in a session of its own. Its output is collected by a thread, which wakes `wait_for`."""

    def __init__(self, *arguments: str, plan: dict[str, Any] | None = None, inference_s: float = 0.0) -> None:
        """Start it.

        Args:
            *arguments: Of the command line.
            plan: Run it with these faults (`stress.child`); None runs it as a user does.
            inference_s: Without a plan: seconds that every decision takes longer.
        """
        program = program_of(Emulation(inference_s=inference_s)) if inference_s else ["-m", "asyncflow"]
        if plan is not None:
            program = ["-m", "tools.stress.child", json.dumps(plan)]
        self._process = subprocess.Popen(
            [sys.executable, *program, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": _PATH},
        )
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._is_over = False
        self._reader = threading.Thread(target=self._read, name="output", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Number of the process, and of its session."""
        return self._process.pid

    @property
    def num_updates(self) -> int:
        """Updates that it has reported."""
        return sum(line.startswith("update ") for line in self.lines)

    def wait_for(self, is_true: Callable[[Command], bool], timeout_s: float) -> bool:
        """Wait until a line of output makes something true; False if the output ends or time runs out before."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or is_true(self), timeout_s)
            return is_true(self)

    def wait_for_updates(self, num_updates: int) -> bool:
        """Wait until so many updates are reported."""
        return self.wait_for(lambda command: command.num_updates >= num_updates, _END_TIMEOUT_S)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process alone."""
        self._process.send_signal(number)

    def finish(self, timeout_s: float = _END_TIMEOUT_S) -> int:
        """Wait for the end and return the exit code; kills all of its session if it does not come."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
        self._reader.join(timeout_s)
        return self._process.returncode

    @property
    def tail(self) -> str:
        """The last line of output."""
        return self.lines[-1].strip() if self.lines else "no output"

    def _read(self) -> None:
        assert self._process.stdout is not None  # a pipe was asked for
        with self._process.stdout as output:
            for line in output:
                with self._changed:
                    self.lines.append(line)
                    self._changed.notify_all()
        with self._changed:
            self._is_over = True
            self._changed.notify_all()


def find_left_behind(command: Command) -> list[int]:
    """Return the processes of a command's session that do not leave within seconds of its end."""
    end = time.monotonic() + _LEAVE_TIMEOUT_S
    while found := [pid for pid, fields in _processes() if int(fields[3]) == command.pid and fields[0] != "Z"]:
        if time.monotonic() > end:
            break
        time.sleep(0.05)
    return found


def find_workers(parent: int) -> list[int]:
    """Return the simulator processes of a command."""
    servers = {pid for pid in _children_of({parent}) if b"boot.py" in _read_bytes(Path(f"/proc/{pid}/cmdline"))}
    return sorted(_children_of(servers))


def _children_of(parents: set[int]) -> set[int]:
    return {pid for pid, fields in _processes() if int(fields[1]) in parents and fields[0] != "Z"}


def _processes() -> list[tuple[int, list[str]]]:
    """Return (process, its fields from the state on: state, parent, group, session)."""
    stats = [(path.parent.name, _read_bytes(path)) for path in Path("/proc").glob("[0-9]*/stat")]
    return [(int(pid), stat.decode(errors="replace").rpartition(")")[2].split()) for pid, stat in stats if stat]


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has just ended
        return b""


def shared_memory() -> set[str]:
    """Return the names in shared memory."""
    return set(os.listdir("/dev/shm"))


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the whole rows of a run's metrics; a row that a cut left torn is not one."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def check_rows(folder: Path, num_updates: int, checks: Checks) -> None:
    """Check that every update stands there once, every number is finite, and the books balance."""
    rows = read_rows(folder)
    found = [int(row["updates"]) for row in rows]
    checks.expect(found == list(range(1, num_updates + 1)), f"updates in metrics.jsonl: {found}")
    for row in rows:
        missing = [name for name, value in row.items() if value is None]
        checks.expect(not missing, f"update {row['updates']}: not finite: {missing}")
        total = sum(row[f"buffer/{name}"] for name in _BOOKS)
        checks.expect(row["buffer/collected"] == total, f"update {row['updates']}: the books do not balance")
        checks.expect(row["buffer/trained"] == row["decisions"], f"update {row['updates']}: decisions trained twice")


def read_faults(folder: Path) -> dict[str, int]:
    """Return how many faults of each kind a run survived."""
    faults = load_checkpoint(list_checkpoints(folder)[-1]).state.faults
    return {kind: count for kind, count in faults.items() if count}


def find_differences(first: Path, second: Path) -> list[str]:
    """Return in what two finished runs differ that must not depend on timing, bit for bit."""
    one, other = (load_checkpoint(list_checkpoints(folder)[-1]) for folder in (first, second))
    groups = {"policy": (one.policy, other.policy)}
    groups |= {name: (one.groups[name], other.groups.get(name, {})) for name in one.groups}
    found = [name for name, (a, b) in groups.items() if not _are_equal(a, b)]
    if _plain(vars(one.state)) != _plain(vars(other.state)):
        found.append("state.json")
    rows = [[_plain(row) for row in read_rows(folder)] for folder in (first, second)]
    return [*found, "metrics.jsonl"] if rows[0] != rows[1] else found


def _are_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if not is_timing(name) and name not in ("row", "books")}
