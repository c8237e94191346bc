"""Measure env steps per second of LIBERO's tasks beside the benchmark's own loop; write `docs/benchmarks/libero.md`.

`--python` names the interpreter that has LIBERO. What is finished is not measured again while its JSON is among the
page's data; `--out FOLDER` keeps page and data of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from asyncflow.config.interpreters import remembered
from asyncflow.config.libero import LIBERO_SUITES
from tools.bench.common.parts import FindingParts
from tools.bench.common.records import PartSettings, choose_place
from tools.bench.common.report import Finding, Part

TIMEOUT_S = 3600
TASKS = tuple(f"{name}/0" for name in LIBERO_SUITES)
NOTE = """\
Own is the benchmark's `ControlEnv` without a renderer, and its `OffScreenRenderEnv` with one, which renders two cameras
of 256 by 256 pixels at every env step. asyncflow renders the same two after each chunk of 10 env steps, and computes
once in a substep what stays the same (`env.fast_step`). One process, one simulator of each, the same random actions
from the same starts, blocks of both ways in turns. Medians over blocks, in brackets their range. Both ways end every
block in the same state, bit for bit, or the measurement stops."""


@dataclass(frozen=True)
class Settings(PartSettings):
    """How much is measured."""

    python: str = ""
    tasks: tuple[str, ...] = TASKS
    blocks: int = 5
    chunks: int = 4

    DEPENDS: ClassVar[Mapping[str, Iterable[str]]] = {"tasks": ("tasks", "blocks", "chunks")}


def bench_tasks(settings: Settings) -> Part:
    """Measure every task, each in a process of its own."""
    return Part([found for task in settings.tasks for found in measure(task, settings)], [])


def measure(task: str, settings: Settings) -> list[Finding]:
    """Measure one task; return how many times as fast asyncflow's simulator is, without a renderer and with one."""
    words = [str(Path(__file__).with_name("inside.py")), task, str(settings.blocks), str(settings.chunks)]
    answer = subprocess.run([settings.python, *words], stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=True)
    block_ms: dict[str, list[float]] = json.loads(answer.stdout)
    return [
        judge(f"{task} {words}", block_ms[f"own_{label}"], block_ms[f"asyncflow_{label}"], target)
        for label, words, target in (("blind", "without a renderer", 1.1), ("seeing", "with a renderer", 2.0))
    ]


def judge(what: str, own_ms: list[float], ms: list[float], target: float) -> Finding:
    """Compare milliseconds per env step of blocks, both ways."""
    ratios = [own / fast for own, fast in zip(own_ms, ms, strict=True)]
    ratio, rates = statistics.median(ratios), [1e3 / statistics.median(each) for each in (ms, own_ms)]
    measured = (
        f"{ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f}): {rates[0]:.1f} instead of {rates[1]:.1f} env steps/s"
    )
    return Finding(f"{what}: times as fast", measured, f">= {target}", ratio >= target)


LIBERO = FindingParts("libero", "LIBERO", {"tasks": bench_tasks}, NOTE)


def main() -> int:
    """Measure, write, and say whether all tasks are fast enough."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", help=f"none means {', '.join(TASKS)}")
    parser.add_argument("--python", default=remembered("libero"), help="interpreter that has LIBERO")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page")
    parser.add_argument("--out", type=Path, help="folder for page and data, instead of the documentation's")
    parser.add_argument("--blocks", type=int, default=Settings.blocks, help="blocks of each way")
    parser.add_argument("--chunks", type=int, default=Settings.chunks, help="chunks of a block")
    options = parser.parse_args()
    if options.tasks and options.out is None:
        parser.error("some tasks alone need --out: the page in the documentation has all of them")
    if not options.python and not options.page:
        parser.error("--python is missing; or run: asyncflow envs install libero")
    settings = Settings(options.python or "", tuple(options.tasks or TASKS), options.blocks, options.chunks)
    place = choose_place(LIBERO.name, options.out or Path(), options.out is not None)
    return LIBERO.run([] if options.page else ["tasks"], settings, place)


if __name__ == "__main__":
    sys.exit(main())
