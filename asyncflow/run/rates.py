"""Turn counters into the part of a row that is not the update's: seconds, lag, rates, busy shares, memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from asyncflow.metrics.timing import OverlapClock
from asyncflow.rollout.ring import Rollout


def rollout_metrics(rollout: Rollout, policy_lag: int, trainer_seconds: dict[str, float]) -> dict[str, float]:
    """Return seconds by stage and the policy lag of one trained rollout.

    Args:
        rollout: The rollout.
        policy_lag: Version that trained minus version that acted.
        trainer_seconds: Seconds of the trainer's stages, by name.
    """
    seconds = {f"time/{name}": value for name, value in (rollout.info.seconds | trainer_seconds).items()}
    lag = {"staleness/policy_lag_mean": float(policy_lag), "staleness/policy_lag_max": float(policy_lag)}
    return seconds | lag


def memory_metrics() -> dict[str, float]:
    """Return the peak resident bytes of this process and the peak bytes allocated on the GPU."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts kilobytes everywhere else
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
    return {"health/rss_bytes": float(rss), "health/gpu_bytes": float(gpu)}


class RateMeter:
    """Turns monotonic counters into rates between two calls, leaving paused time out. Main thread only."""

    def __init__(self, clock: OverlapClock, wall_s: float = 0.0, counters: tuple[int, int, int] = (0, 0, 0)) -> None:
        """Start to measure.

        Args:
            clock: Who is busy when.
            wall_s: Seconds that the run had taken before it was cut.
            counters: Env steps, decisions and updates at that moment.
        """
        self._clock = clock
        self._paused_s = 0.0
        self._collected_s = 0.0  # in pauses, and not counted yet
        self._last = time.perf_counter()
        self._wall_s = wall_s
        self._counters = counters
        self._seconds = clock.read()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the block out of wall time, busy shares and rates, but for what is collected in it."""
        start, before = time.perf_counter(), self._clock.read()
        try:
            yield
        finally:
            after = self._clock.read()
            self._paused_s += time.perf_counter() - start
            self._collected_s += after["collector"] - before["collector"]
            self._seconds = {name: value + after[name] - before[name] for name, value in self._seconds.items()}

    def measure(self, env_steps: int, decisions: int, updates: int, collect_s: float) -> dict[str, float]:
        """Return `wall_s`, `throughput/` and `async/` since the last call.

        A rollout that was collected in a pause takes as long as any other: its time is counted with its steps.

        Args:
            env_steps: So far.
            decisions: So far.
            updates: So far.
            collect_s: What collecting the rollout took that was trained on since the last call.
        """
        now, seconds = time.perf_counter(), self._clock.read()
        unpaused = max(now - self._last - self._paused_s, 1e-9)
        in_pauses = min(self._collected_s, max(0.0, collect_s - unpaused))
        elapsed = unpaused + in_pauses
        self._collected_s -= in_pauses
        self._wall_s += elapsed
        fresh = [new - old for new, old in zip((env_steps, decisions, updates), self._counters, strict=True)]
        seconds_since = {name: value - self._seconds[name] for name, value in seconds.items()}
        seconds_since["collector"] += in_pauses
        busy = {name: value / elapsed for name, value in seconds_since.items()}
        self._last, self._paused_s, self._seconds = now, 0.0, seconds
        self._counters = (env_steps, decisions, updates)
        return {
            "wall_s": self._wall_s,
            "throughput/env_steps_per_s": fresh[0] / elapsed,
            "throughput/decisions_per_s": fresh[1] / elapsed,
            "throughput/updates_per_s": fresh[2] / elapsed,
            "async/collector_busy": busy["collector"],
            "async/trainer_busy": busy["trainer"],
            "async/overlap": busy["overlap"],
        }
