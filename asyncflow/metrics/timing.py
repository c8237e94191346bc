"""Clocks that add up the busy time of the collector, of the trainer, and of both at once.

They compute busy, waiting and overlapping time of two lanes, whatever the lanes do.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

Lane = Literal["collector", "trainer"]


class OverlapClock:
    """Integrates, over wall time, how long each lane was busy and how long both were. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_busy: dict[str, bool] = {"collector": False, "trainer": False}
        self._seconds = {"collector": 0.0, "trainer": 0.0, "overlap": 0.0, "wall": 0.0}
        self._last = time.perf_counter()

    @contextmanager
    def busy(self, lane: Lane) -> Iterator[None]:
        """Count the block as work of `lane`. Never waits."""
        self._set(lane, True)
        try:
            yield
        finally:
            self._set(lane, False)

    @contextmanager
    def waiting(self, lane: Lane) -> Iterator[None]:
        """Count the block, inside a `busy` one, as not working."""
        self._set(lane, False)
        try:
            yield
        finally:
            self._set(lane, True)

    def read(self) -> dict[str, float]:
        """Return the seconds since construction: `collector`, `trainer`, `overlap`, `wall`."""
        with self._lock:
            self._integrate()
            return dict(self._seconds)

    def _set(self, lane: Lane, is_busy: bool) -> None:
        with self._lock:
            self._integrate()
            self._is_busy[lane] = is_busy

    def _integrate(self) -> None:
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        self._seconds["wall"] += elapsed
        for lane, is_busy in self._is_busy.items():
            self._seconds[lane] += elapsed * is_busy
        self._seconds["overlap"] += elapsed * all(self._is_busy.values())


class Stopwatch:
    """Adds up named seconds. One thread uses an instance."""

    def __init__(self, on_span: Callable[[str, float, float], None] | None = None) -> None:
        """Start at zero; `on_span` is given the name, start and end of everything that is measured."""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._on_span = on_span

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the block's duration to `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            end = time.perf_counter()
            self.seconds[name] += end - start
            if self._on_span is not None:
                self._on_span(name, start, end)

    def take(self) -> dict[str, float]:
        """Return the sums since the last call and start again."""
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds
