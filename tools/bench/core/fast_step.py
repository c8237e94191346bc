"""Compare `FastStep` with bare robosuite's `step`, task by task; write `docs/benchmarks/fast_step.md`.

One process and one simulator a task. Both ways play the same random actions from the same starts, in small blocks that
take turns, so that what else the machine does meets both; the states they end in must be equal bit for bit. A page is
written when all tasks ran; a missed target exits with 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asyncflow.config.sections import EnvConfig
from asyncflow.config.task_table import MEASURED, TASKS
from asyncflow.config.tasks import resolve_task
from asyncflow.envs.robosuite.simulator import RobomimicEnv
from tools.bench.common.report import (
    REPOSITORY,
    describe_command,
    describe_machine,
    describe_setting,
    describe_software,
    isolated,
)

PAGE = REPOSITORY / "docs" / "benchmarks" / "fast_step.md"
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
    env = RobomimicEnv(resolve_task(EnvConfig(task=task)), seed)  # imports robosuite, and keeps it quiet
    from asyncflow.envs.robosuite.fast_step import FastStep  # noqa: PLC0415  seconds, and only the measuring processes need it

    steps = {"bare": env.env.env.step, "fast": FastStep(env.env.env).step}
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


def to_page(timings: list[Timing]) -> str:
    """Return setting and table as Markdown."""
    rows = ["| task | bare, ms/step | fast, ms/step | times as fast | target | met |", "|---|---|---|---|---|---|"]
    for timing in timings:
        ratio, ratios = timing.ratio, timing.ratios
        bare, fast = statistics.median(timing.bare_ms), statistics.median(timing.fast_ms)
        rows.append(
            f"| {timing.task} | {bare:.2f} | {fast:.2f} | {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
            f"| >= {MIN_RATIO} | {'yes' if ratio >= MIN_RATIO else '**no**'} |"
        )
    setting = describe_setting(describe_machine(), describe_software())
    return "\n".join([f"# The fast step\n\n{setting}- Command: `{describe_command()}`\n", *rows, "", NOTE, ""])


def main() -> int:
    """Measure the tasks asked for, print and write, and say whether all are fast enough."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", help=f"of {', '.join(TASKS)}; none means {', '.join(MEASURED)}")
    parser.add_argument("--blocks", type=int, default=20, help="blocks of each way")
    parser.add_argument("--steps", type=int, default=100, help="environment steps of a block")
    parser.add_argument("--seed", type=int, default=0, help="decides the simulators' constants")
    options = parser.parse_args()
    tasks = options.tasks or list(MEASURED)
    timings = [isolated(measure, task, options.blocks, options.steps, options.seed) for task in tasks]
    page = to_page(timings)
    print(page)
    if set(tasks) == set(MEASURED):
        PAGE.write_text(page, encoding="utf-8")
    return 0 if all(timing.ratio >= MIN_RATIO for timing in timings) else 1


if __name__ == "__main__":
    sys.exit(main())
