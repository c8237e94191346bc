"""Tracing: who did what from when to when, as a file that Chrome (chrome://tracing) and Perfetto open.

Spans are collected from any thread and written in Chrome's trace format. Times are `time.perf_counter` seconds, which
all processes of a machine share; the file's are microseconds.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

FLUSH_AFTER = 20_000  # spans kept in memory; writing fewer at a time would cost the trainer as much in all


class Span(NamedTuple):
    """One thing that a lane did.

    Attributes:
        lane: A thread's or a worker's name.
        name: What it did.
        start_s: When it began.
        end_s: When it ended.
        numbers: What else is known of it, such as the rollout.
    """

    lane: str
    name: str
    start_s: float
    end_s: float
    numbers: dict[str, int]

    @property
    def duration_s(self) -> float:
        """Return the duration."""
        return self.end_s - self.start_s


class Tracer:
    """Collects spans from any thread; keeps nothing until `open`. `flush` and `close` are the main thread's."""

    def __init__(self) -> None:
        self._spans: deque[Span] = deque()
        self._path: Path | None = None
        self._lanes: dict[str, int] = {}
        self._is_empty = True

    def open(self, path: Path) -> None:
        """Keep spans from now on, for a new file at `path`."""
        self._start_s = time.perf_counter()
        self._path = path

    def add(self, lane: str, name: str, start_s: float, end_s: float, **numbers: int) -> None:
        """Keep a span. Any thread; never waits."""
        if self._path is not None:
            self._spans.append(Span(lane, name, start_s, end_s, numbers))

    def recorder(self, lane: str) -> Callable[[str, float, float], None]:
        """Return a function of (metric name, start, end) that keeps spans of one lane, as `Stopwatch` takes it."""
        return lambda name, start_s, end_s: self.add(lane, name.removesuffix("_s"), start_s, end_s)

    def flush(self, at_least: int = FLUSH_AFTER) -> str | None:
        """Write what is kept, if it is much; return a line about a file that cannot be written, after which it ends."""
        if self._path is None or len(self._spans) < at_least:
            return None
        try:
            self._append(self._path)
        except OSError as error:
            path, self._path = self._path, None
            return f"{path}: {error.strerror}; no more of the trace is written"
        return None

    def close(self) -> str | None:
        """Write the rest and complete the file; returns as `flush`. May be called twice."""
        problem = self.flush(at_least=0)
        if self._path is not None:
            self._path = None
        return problem

    def _append(self, path: Path) -> None:
        spans = [self._spans.popleft() for _ in range(len(self._spans))]  # other threads append meanwhile
        lines = [json.dumps(event) for event in chrome_events(spans, self._start_s, self._lanes)]
        with path.open("wb" if self._is_empty else "r+b") as file:
            if not self._is_empty:
                file.seek(-len(_END), 2)
            head = "[\n" if self._is_empty else ",\n" if lines else ""
            file.write((head + ",\n".join(lines)).encode() + _END)
        self._is_empty = self._is_empty and not lines


_END = b"\n]\n"  # rewritten at every flush: the file is whole at every moment


def chrome_events(
    spans: Iterable[Span], origin_s: float, lanes: dict[str, int], process: int = 1
) -> Iterator[dict[str, Any]]:
    """Yield spans as events of the Chrome trace format.

    Args:
        spans: In any order.
        origin_s: What becomes time 0.
        lanes: Lane -> number of those that were named before; lanes that appear are added.
        process: Number of the process that the lanes are shown under.
    """
    for span in spans:
        if span.lane not in lanes:
            lanes[span.lane] = len(lanes) + 1
            yield _name("thread_name", span.lane, process, lanes[span.lane])
        yield {
            "name": span.name,
            "ph": "X",
            "ts": round((span.start_s - origin_s) * 1e6, 1),
            "dur": round(span.duration_s * 1e6, 1),
            "pid": process,
            "tid": lanes[span.lane],
            "args": span.numbers,
        }


def _name(kind: str, name: str, process: int, lane: int = 0) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": lane, "args": {"name": name}}


def write_processes(path: Path, processes: dict[str, list[Span]]) -> None:
    """Write one file in which several runs stand below each other, each beginning at time 0.

    Args:
        path: The file.
        processes: Name of a run -> its spans.
    """
    events: list[dict[str, Any]] = []
    for number, (name, spans) in enumerate(processes.items(), start=1):
        events.append(_name("process_name", name, number))
        origin_s = min((span.start_s for span in spans), default=0.0)
        events += chrome_events(spans, origin_s, {}, number)
    path.write_text("[\n" + ",\n".join(map(json.dumps, events)) + _END.decode(), encoding="utf-8")


def read_spans(path: Path) -> list[Span]:
    """Return the spans of a file that a `Tracer` wrote, by their start, in seconds since its opening."""
    events = json.loads(path.read_text(encoding="utf-8"))
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    spans = [
        Span(lanes[event["tid"]], event["name"], event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6, event["args"])
        for event in events
        if event["ph"] == "X"
    ]
    return sorted(spans, key=lambda span: span.start_s)


def union_seconds(spans: Iterable[Span]) -> float:
    """Return for how long at least one of the spans was under way."""
    total, end_s = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start_s):
        total += max(0.0, span.end_s - max(span.start_s, end_s))
        end_s = max(end_s, span.end_s)
    return total
