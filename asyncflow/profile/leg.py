"""One leg of a profile: a run that is traced, ends itself after its window and leaves nothing behind.

Evaluations, checkpoints and curves are left out, and the memory that was needed is measured.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from asyncflow.config.presets import apply_overrides
from asyncflow.config.sections import Config, validate
from asyncflow.envs.server import running_servers, running_workers
from asyncflow.metrics.tracing import Tracer, read_spans
from asyncflow.profile.read import Leg, Memory, Mode, Window, read_leg
from asyncflow.profile.slow import NOTHING, Emulation
from asyncflow.run import launch
from asyncflow.run.evaluate import EvalResult
from asyncflow.run.recorded import RecordedRun
from asyncflow.signals import signals_held


def change(config: Config, overrides: dict[str, Any]) -> Config:
    """Return a configuration with keys replaced."""
    return validate(apply_overrides(config.model_dump(), overrides))


def vla_lag(config: Config) -> int:
    """Return L of the vla legs."""
    return 1 if config.buffer.max_policy_lag is None else config.buffer.max_policy_lag


def num_warmup(config: Config) -> int:
    """Return how many updates are left out: the critic's own, and until the ring is in step."""
    return max(2, config.algorithm.critic_warmup_updates + 1, vla_lag(config) + 1)


@dataclass
class Watcher:
    """The reporter of a leg: ends it after its last measured update. Main thread only."""

    last: int
    rows: list[dict[str, float]] = field(default_factory=list)
    memory: Memory | None = None
    _run: RecordedRun | None = None

    def watch(self, run: RecordedRun) -> None:
        """Take the run that is to be stopped."""
        self._run = run

    def start(self, config: Config, run_dir: Path, ring_bytes: int, device: str) -> None:
        """Nothing to do."""

    def update(self, row: dict[str, float]) -> None:
        """Keep the row, and stop after the last one."""
        self.rows.append(dict(row))
        if len(self.rows) == self.last:
            self.memory = peak_memory()
            assert self._run is not None  # it was built
            self._run.request_stop()

    def evaluation(self, updates: int, result: EvalResult) -> None:
        """Nothing is evaluated."""

    def notice(self, text: str) -> None:
        """Faults are counted in the rows."""

    def end(self, run_dir: Path, checkpoint: Path, row: dict[str, float], is_stopped: bool) -> None:
        """Nothing to do."""


def run_leg(config: Config, mode: Mode, window: Window, emulation: Emulation = NOTHING) -> Leg:
    """Run one leg in a folder that is removed, and return what it showed; its end is not measured."""
    with contextlib.ExitStack() as stack:
        with signals_held():
            parent = stack.enter_context(tempfile.TemporaryDirectory(prefix="asyncflow_profile_"))
        folder, watcher = Path(parent) / "leg", Watcher(window.last)
        reset_peak_memory()

        def on_built(run: RecordedRun) -> None:
            emulation.put_on(run.trainer)
            watcher.watch(run)

        launch.train(leg_config(config, mode, window, folder), watcher, on_built)
        assert watcher.memory is not None  # it was measured at the window's end
        return read_leg(mode, window, read_spans(folder / "trace.json"), watcher.rows, watcher.memory)


def leg_config(config: Config, mode: Mode, window: Window, folder: Path) -> Config:
    """Return the configuration of a leg: without evaluation, checkpoints and curves, and longer than its window."""
    total = window.last + vla_lag(config) + 2  # the collector works on to the end of the window
    changes: dict[str, Any] = {
        "trainer.buffer_type": "vla" if mode == "vla" else "standard",
        "trainer.eval_interval": 0,
        "trainer.save_interval": total + 1,
        "trainer.total_updates": total,
        "trainer.total_env_steps": None,
        "logging.logger": "none",
        "logging.trace": True,
        "logging.out": str(folder),
    }
    if mode != "vla":
        changes |= {"buffer.max_policy_lag": None, "buffer.on_full": "block"}  # as users have it
    if mode == "serial":
        changes["collector.num_env_groups"] = 1
    return change(config, changes)


def reset_peak_memory() -> None:
    """Let `peak_memory` begin anew, as far as the system allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> Memory:
    """Return the most memory that this process and the GPU needed, and what its simulators' processes hold now.

    Those share what they have imported, of which each counts its part (proportional set size).
    """
    workers = running_workers()
    simulating = sum(map(_proportional, [*running_servers(), *workers])) if workers else 0
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
    return Memory(_peak_resident("self"), simulating, gpu)


def _proportional(process: int) -> int:
    try:
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:
        return 0
    found = re.search(r"^Pss:\s*(\d+) kB", rollup, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0


def _peak_resident(process: str) -> int:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    return int(found.group(1)) * 1024 if found else 0


def measure_span_cost(num_spans: int = 5000) -> float:
    """Return the seconds that keeping one span takes."""
    tracer = Tracer()
    with tempfile.TemporaryDirectory() as folder:
        tracer.open(Path(folder) / "trace.json")
        record = tracer.recorder("lane")
        start = time.perf_counter()
        for _ in range(num_spans):
            record("name_s", time.perf_counter(), time.perf_counter())
        return (time.perf_counter() - start) / num_spans
