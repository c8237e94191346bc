"""Busy, waiting and overlap, on a clock that the test sets."""

import pytest

from asyncflow.metrics import timing
from asyncflow.metrics.timing import OverlapClock, Stopwatch


@pytest.fixture
def now(monkeypatch):
    current = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: current[0])
    return current


def test_overlap_counts_only_what_both_lanes_share(now):
    clock = OverlapClock()
    with clock.busy("collector"):
        now[0] = 2.0
        with clock.busy("trainer"):
            now[0] = 5.0
        now[0] = 6.0
    now[0] = 10.0
    assert clock.read() == {"collector": 6.0, "trainer": 3.0, "overlap": 3.0, "wall": 10.0}


def test_waiting_is_not_work(now):
    clock = OverlapClock()
    with clock.busy("collector"):
        now[0] = 1.0
        with clock.waiting("collector"):
            now[0] = 4.0
        now[0] = 6.0
    assert clock.read()["collector"] == 3.0


def test_a_stopwatch_tells_when_something_began_and_ended(now):
    spans = []
    watch = Stopwatch(lambda *span: spans.append(span))
    now[0] = 1.0
    with watch.measure("step_s"):
        now[0] = 3.0
    assert spans == [("step_s", 1.0, 3.0)]


def test_a_stopwatch_adds_up_and_starts_again(now):
    watch = Stopwatch()
    for _ in range(2):
        with watch.measure("step_s"):
            now[0] += 1.5
    assert watch.take() == {"step_s": 3.0}
    assert watch.take() == {}
