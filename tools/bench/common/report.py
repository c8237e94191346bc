"""What the benchmarks share: rows of a table, fresh processes, turns, and the setting that a page has to name."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from asyncflow.run.folder import describe_versions

REPOSITORY = Path(__file__).parents[3]
REPORTED = "reported"  # the target of a finding that has none

T = TypeVar("T")
Turns = dict[str, Callable[[float], float]]


@dataclass(frozen=True)
class Finding:
    """One row of the table."""

    what: str
    measured: str
    target: str
    is_met: bool


@dataclass(frozen=True)
class Part:
    """What one part found, and how."""

    findings: list[Finding]
    notes: list[str]


def isolated(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a fresh process: nothing that ran before has warmed it up or left memory to it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def run_profile(arguments: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run `asyncflow profile` in a process of its own, on one thread; return what it found and how it was called.

    Args:
        arguments: Of the command.
        folder: What it writes; what was there is removed.

    Raises:
        SystemExit: It failed.
    """
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted call left
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
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def to_markdown(title: str, parts: list[Part], more_setting: str = "") -> str:
    """Return the page; `more_setting` is a line, or nothing, that belongs to hardware and versions."""
    rows = ["| what | measured | target | met |", "|---|---|---|---|"]
    for found in (found for part in parts for found in part.findings):
        met = "" if found.target == REPORTED else "yes" if found.is_met else "**no**"
        rows.append(f"| {found.what} | {found.measured} | {found.target} | {met} |")
    notes = [f"- {note}" for part in parts for note in part.notes]
    setting = describe_setting(describe_machine(), describe_software()) + more_setting
    head = f"# {title}\n\n{setting}- Command: `{describe_command()}`\n"
    return "\n".join([head, *rows, "", *notes, ""])


def finish(page: str, parts: list[Part], path: Path | None) -> int:
    """Print a page, write it if there is a path, name the targets that were missed, and return the exit code."""
    print(page)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page)
    missed = [found.what for part in parts for found in part.findings if not found.is_met]
    for what in missed:
        print(f"missed: {what}", file=sys.stderr)
    return 1 if missed else 0
