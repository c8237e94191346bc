"""The benchmarks' common parts: rows of a table, fresh processes, turns, and the setting that a page names."""

from __future__ import annotations

import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from asyncflow.run.folder import describe_versions

REPOSITORY = Path(__file__).parents[3]
MODE_NAMES = {  # as pages name the modes: values of `--buffer-type`, and the profile's leg with one group
    "serial": "synchronous, one group",
    "standard": "synchronous",
    "vla": "asynchronous",
}
REPORTED = "reported"  # the target of a finding that has none

T = TypeVar("T")
Turns = dict[str, Callable[[float], float]]


@dataclass(frozen=True)
class Finding:
    """A figure beside its target, and whether it meets it; the one notion of a verdict here.

    Attributes:
        what: What was measured.
        measured: The figure, with its interval or spread.
        target: What it had to be; `REPORTED` where nothing was asked for.
        is_met: Whether it is that; true where nothing was asked for.
    """

    what: str
    measured: str
    target: str
    is_met: bool

    @property
    def verdict(self) -> str:
        """What a page says: yes, no, or nothing where no target was set."""
        return "**no**" if not self.is_met else "" if self.target == REPORTED else "yes"


@dataclass(frozen=True)
class Part:
    """What one part found.

    Attributes:
        findings: Rows of the page's table.
        notes: How they were measured.
        setting: What belongs to hardware and versions, a line each.
    """

    findings: list[Finding]
    notes: list[str]
    setting: list[str] = field(default_factory=list)


def isolated(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a fresh process: nothing that ran before has warmed it up or left memory to it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def set_aside(folder: Path) -> None:
    """Rename what stands where a run is about to write, and say so; nothing of it is removed."""
    if folder.exists() or folder.is_symlink():
        names = (folder.with_name(f"{folder.name}_set_aside_{number}") for number in itertools.count(1))
        free = next(path for path in names if not path.exists() and not path.is_symlink())
        folder.rename(free)
        print(f"{folder}: what was there is now {free}", flush=True)


def run_profile(arguments: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run `asyncflow profile` in a process of its own, on one thread; return what it found and how it was called.

    Args:
        arguments: Of the command.
        folder: What it writes; what was there is set aside.

    Raises:
        SystemExit: It failed.
    """
    set_aside(folder)  # what an interrupted call left
    command = [sys.executable, "-m", "asyncflow", "profile", *arguments, "--out", str(folder)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)}: exit code {done.returncode}")
    found = json.loads((folder / "profile.json").read_text(encoding="utf-8"))
    return {"command": shlex.join(["asyncflow", "profile", *arguments]), "profile": found}


def with_range(values: list[float]) -> str:
    """Return a mean and, of several values, the range."""
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ({min(values):.3f} to {max(values):.3f} in {len(values)} repeats)" if len(values) > 1 else mean


def take_turns(turns: Turns, repeats: int, block_s: float) -> dict[str, list[float]]:
    """Return the rates of each, measured there and back in every repeat; a short turn of each first is warm-up."""
    for turn in turns.values():
        turn(block_s / 4)
    rates: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(repeats):
        there_and_back = [(name, turns[name](block_s)) for name in [*turns, *reversed(turns)]]
        for name in turns:
            rates[name].append(statistics.mean(rate for other, rate in there_and_back if other == name))
    return rates


def count_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0))


def describe_machine() -> dict[str, str]:
    """Return processor, cores and memory."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": str(count_cores()),
        "memory": f"{memory / 2**30:.0f} GiB",
    }


def describe_software() -> dict[str, str]:
    """Return versions and the commit; it counts as dirty if what is measured was changed, not if a page was."""
    measured = ["git", "-C", str(REPOSITORY), "diff", "--quiet", "HEAD", "--", "asyncflow", "configs", "tools"]
    versions = describe_versions()
    commit = versions.pop("git_commit").removesuffix("-dirty")
    del versions["processor"]  # which `describe_machine` names
    is_dirty = subprocess.run(measured, check=False).returncode != 0
    return {"commit": f"{commit}-dirty" if is_dirty else commit, **versions}


def describe_command() -> str:
    """Return this process's command line without the folders of this machine."""
    arguments = [Path(each).name if each.startswith("/") else each for each in sys.argv[1:]]
    spec = sys.modules["__main__"].__spec__
    module = spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).stem
    return shlex.join(["python", "-m", module, *arguments])


def describe_setting(machine: dict[str, str], software: dict[str, str]) -> str:
    """Return hardware, commit and versions as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in software.items() if name != "commit")
    return (
        f"- Hardware: {machine['processor']}, {machine['cores']} cores, {machine['memory']}\n"
        f"- Commit: `{software['commit']}`\n- Versions: {versions}\n"
    )


def to_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; a bar within a cell would end it, and becomes a stroke."""
    lines = [head, ["---"] * len(head), *([cell.replace("|", "/") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def conclude(findings: Sequence[Finding], missing: Sequence[str] = ()) -> int:
    """Print every verdict and what is not measured yet, and return the exit code: 1 if a target was missed."""
    for found in findings:
        word = "missed" if not found.is_met else REPORTED if found.target == REPORTED else "met"
        print(f"{word}: {found.what}: {found.measured}; target {found.target}")
    if missing:
        print(f"not measured yet: {', '.join(missing)}")
    return 0 if all(found.is_met for found in findings) else 1
