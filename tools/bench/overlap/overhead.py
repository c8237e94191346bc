"""Measure the cost of recording: two equal runs, in which it is switched on and off between updates.

Owns the switch and the clocks. The windows of the first run take turns off, on, on, off, those of the second one on,
off, off, on. With fixed lag both do the same work in the same window, bit for bit, so that neither the work nor drift
stands between what is compared. What is recorded is also written within its window, which a run does in larger pieces.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from asyncflow.config.sections import Config
from asyncflow.envs.server import running_workers
from asyncflow.profile.model import Interval, log_ratio_interval, mean
from asyncflow.run.evaluate import EvalResult
from asyncflow.run.launch import train
from asyncflow.run.recorded import RecordedRun
from tools.bench.common.records import Place
from tools.bench.common.report import isolated
from tools.bench.overlap.settings import Settings

IS_ON = (False, True, True, False)  # within a block of the first run; the second one's are the others
NUM_WARMUP_UPDATES = 3  # critic warm-up, Adam's state, both lanes in step
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Cost:
    """What a window took: seconds, and CPU seconds of all threads of this process and of all workers."""

    wall_s: float
    process_s: float
    workers_s: float

    @property
    def cpu_s(self) -> float:
        """CPU seconds of all processes."""
        return self.process_s + self.workers_s

    def __sub__(self, other: Cost) -> Cost:
        return Cost(*(mine - its for mine, its in zip(asdict(self).values(), asdict(other).values(), strict=True)))


def read_clocks() -> Cost:
    """Return the clocks as they stand."""
    workers = sum(worker_seconds(process) for process in running_workers())
    return Cost(time.perf_counter(), time.process_time(), workers)


def worker_seconds(process: int | None) -> float:
    """Return the CPU seconds of a process so far (proc(5): user and system time), to a hundredth."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS


def is_on(window: int, is_second: bool) -> bool:
    """Tell whether a window of the first or the second run is recorded."""
    return IS_ON[window % len(IS_ON)] is not is_second


@dataclass
class Switch:
    """The reporter of the run, in the main thread: ends every window, and the run after the last one.

    Attributes:
        is_second: Of the two runs.
        window: Updates of a window.
        num_windows: How many are measured.
        trace: File that is written to.
        costs: Of the windows that are over.
    """

    is_second: bool
    window: int
    num_windows: int
    trace: Path
    costs: list[Cost] = field(default_factory=list)
    _run: RecordedRun | None = None
    _start: Cost | None = None

    def watch(self, run: RecordedRun) -> None:
        """Take the run that is measured."""
        self._run = run

    def update(self, row: dict[str, float]) -> None:
        """Begin or end a window, when due."""
        windows, rest = divmod(int(row["updates"]) - NUM_WARMUP_UPDATES, self.window)
        if rest or windows < 0 or len(self.costs) == self.num_windows:
            return
        assert self._run is not None  # it was built
        tracer = self._run.trainer.channel.tracer
        if self._start is not None:
            tracer.close()  # writes; does nothing where nothing was recorded
            self.costs.append(read_clocks() - self._start)
        if len(self.costs) == self.num_windows:
            self._run.request_stop()
            return
        self._start = read_clocks()
        if is_on(len(self.costs), self.is_second):
            tracer.open(self.trace)

    def start(self, config: Config, run_dir: Path, ring_bytes: int, device: str) -> None:
        """Nothing to do."""

    def evaluation(self, updates: int, result: EvalResult) -> None:
        """Nothing is evaluated."""

    def notice(self, text: str) -> None:
        """Show it: a fault would spoil the measurement."""
        print(text, flush=True)

    def end(self, run_dir: Path, checkpoint: Path, row: dict[str, float], is_stopped: bool) -> None:
        """Nothing to do."""


def measure_run(settings: Settings, task: str, is_second: bool) -> list[Cost]:
    """Train with both lanes at work, without emulated latency; return the cost of every window."""
    is_toy = task == "Toy"
    window = settings.toy_window if is_toy else settings.lift_window
    num_windows = (settings.toy_blocks if is_toy else settings.lift_blocks) * len(IS_ON)
    size = {"buffer.buffer_size": settings.overhead_rollout} if task == "Lift" else {}
    with tempfile.TemporaryDirectory() as folder:
        total = NUM_WARMUP_UPDATES + window * num_windows + 3  # the collector works on to the end of the last window
        changes = {
            "trainer.buffer_type": "vla",
            "trainer.total_updates": total,
            "trainer.eval_interval": 0,
            "trainer.save_interval": total,
            "logging.logger": "none",
            "logging.out": str(Path(folder) / "run"),
        }
        switch = Switch(is_second, window, num_windows, Path(folder) / "trace.json")
        train(settings.load(task, size | changes), switch, switch.watch)
    return switch.costs


def overhead(first: list[Cost], second: list[Cost], name: str) -> Interval:
    """Return by which share a clock runs longer with recording than without, with its 95 % interval over blocks.

    Args:
        first: Windows of the first run.
        second: Of the second one, which did the same work.
        name: Of the clock.
    """
    blocks = range(0, len(first), len(IS_ON))
    on, off = ([_block_mean((first, second), start, state, name) for start in blocks] for state in (True, False))
    ratio = log_ratio_interval(on, off)
    low, high = (None if end is None else end - 1 for end in (ratio.low, ratio.high))
    return Interval(ratio.value - 1, low, high)


def _block_mean(runs: tuple[list[Cost], list[Cost]], start: int, is_wanted: bool, name: str) -> float:
    """Return the mean of a clock over the windows of a block, of both runs, that are recorded, or are not."""
    return mean(
        [
            getattr(run[window], name)
            for is_second, run in enumerate(runs)
            for window in range(start, start + len(IS_ON))
            if is_on(window, bool(is_second)) is is_wanted
        ]
    )


def measure_overhead(task: str, settings: Settings, place: Place) -> dict[str, Any]:
    """Measure one task."""
    first, second = (isolated(measure_run, settings, task, is_second) for is_second in (False, True))
    shares = {name: asdict(overhead(first, second, name)) for name in ("wall_s", "cpu_s", "process_s")}
    print(f"{task}: {100 * shares['wall_s']['value']:+.2f} % seconds", flush=True)
    return {task: shares | {"windows": [[asdict(cost) for cost in costs] for costs in (first, second)]}}
