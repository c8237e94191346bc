"""Compare `FastStep` with bare robosuite's `step`, task by task; write `docs/benchmarks/fast_step.md`.

One process and one simulator a task. Both ways play the same random actions from the same starts, in small blocks that
take turns, so that what else the machine does meets both; the states they end in must be equal bit for bit. What is
finished is not measured again while its JSON is among the page's data; `--out FOLDER` keeps page and data of its own,
for a look at another machine. A missed target exits with 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asyncflow.config.sections import EnvConfig
from asyncflow.config.task_table import MEASURED, TASKS
from asyncflow.config.tasks import resolve_task
from asyncflow.simulators.robosuite.simulator import RobosuiteSimulator
from tools.bench.common.parts import FindingParts
from tools.bench.common.records import choose_place
from tools.bench.common.report import Finding, Part, isolated
from tools.bench.core.settings import Settings

MIN_RATIO = 1.5


@dataclass(frozen=True)
class Timing:
    """Milliseconds a step of each block, both ways."""

    task: str
    bare_ms: list[float]
    fast_ms: list[float]

    @property
    def ratios(self) -> list[float]:
        """How many times as fast each block was."""
        return [bare / fast for bare, fast in zip(self.bare_ms, self.fast_ms, strict=True)]

    @property
    def ratio(self) -> float:
        """The median of the blocks' ratios, which is compared with the target."""
        return statistics.median(self.ratios)


def measure(task: str, num_blocks: int, num_steps: int, seed: int) -> Timing:
    """Time one task, the first block of both left out; the two ways take turns in going first."""
    env = RobosuiteSimulator(resolve_task(EnvConfig(task=task)), seed)  # imports robosuite, and keeps it quiet
    from asyncflow.simulators.robosuite.fast_step import FastStep  # noqa: PLC0415  seconds, and only the measuring processes need it

    steps = {"bare": env.env.step, "fast": FastStep(env.env).step}
    block_ms: dict[str, list[float]] = {name: [] for name in steps}
    for block in range(num_blocks + 1):
        actions = np.random.default_rng(block).uniform(-0.5, 0.5, (num_steps, env.spec.action_dim))
        ends = {}
        for name in sorted(steps, reverse=bool(block % 2)):
            env.reset(block)
            block_ms[name].append(play(steps[name], actions))
            ends[name] = env.simulator_state()
        if not np.array_equal(ends["bare"], ends["fast"]):
            raise SystemExit(f"{task}: the two ways ended block {block} in different states")
    env.close()
    return Timing(task, block_ms["bare"][1:], block_ms["fast"][1:])


def play(step: Callable[[NDArray[np.float64]], Any], actions: NDArray[np.float64]) -> float:
    """Execute actions, [T, A]; return milliseconds per step."""
    start = time.perf_counter()
    for action in actions:
        step(action)
    return 1e3 * (time.perf_counter() - start) / len(actions)


NOTE = """\
Bare is robosuite's own `step`, fast is `env.fast_step`: one process, one simulator, the same random actions from
the same starts, blocks of both ways in turns. Medians over blocks, in brackets their range. Both ways end every block
in the same state, bit for bit, or the measurement stops. Whole
episodes of every task and controller are compared by `make test-all ARGS=tests/envs/test_fast_step.py`.

Equality was seen on AMD EPYC, Intel Ice Lake and, by telling OpenBLAS which processor to take this one for
(`OPENBLAS_CORETYPE`), with its kernels for Prescott, Haswell, SkylakeX and Zen; `tests/run/test_processors.py` repeats
that. Kernels for Prescott, which numpy 1.26 also takes on Emerald Rapids, round by where a matrix begins in memory:
the fast step lays its matrices where robosuite's lie."""


def judge(timing: Timing) -> Finding:
    """Compare a task's ratio with the target."""
    low, high = min(timing.ratios), max(timing.ratios)
    fast, bare = statistics.median(timing.fast_ms), statistics.median(timing.bare_ms)
    measured = f"{timing.ratio:.2f} ({low:.2f} to {high:.2f}): {fast:.2f} instead of {bare:.2f} ms a step"
    return Finding(f"{timing.task}: times as fast", measured, f">= {MIN_RATIO}", timing.ratio >= MIN_RATIO)


def bench_tasks(settings: Settings) -> Part:
    """Compare the steps of every task, each in a process of its own."""
    sizes = (settings.blocks, settings.steps, settings.seed)
    return Part([judge(isolated(measure, task, *sizes)) for task in settings.tasks], [])


FAST_STEP = FindingParts("fast_step", "The fast step", {"tasks": bench_tasks}, NOTE)


def main() -> int:
    """Measure, write, and say whether all tasks are fast enough."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", help=f"of {', '.join(TASKS)}; none means {', '.join(MEASURED)}")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page")
    parser.add_argument("--out", type=Path, help="folder for page and data, instead of the documentation's")
    parser.add_argument("--blocks", type=int, default=Settings.blocks, help="blocks of each way")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="environment steps of a block")
    parser.add_argument("--seed", type=int, default=Settings.seed, help="decides the simulators' constants")
    options = parser.parse_args()
    if options.tasks and options.out is None:
        parser.error("some tasks alone need --out: the page in the documentation has all of them")
    tasks = tuple(options.tasks or MEASURED)
    settings = Settings(tasks=tasks, blocks=options.blocks, steps=options.steps, seed=options.seed)
    place = choose_place(FAST_STEP.name, options.out or Path(), options.out is not None)
    return FAST_STEP.run([] if options.page else ["tasks"], settings, place)


if __name__ == "__main__":
    sys.exit(main())
