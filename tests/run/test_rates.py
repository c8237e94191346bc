"""Rates come from monotonic counters, and time spent elsewhere is left out, on a clock that the test sets."""

import pytest

from asyncflow.metrics import timing
from asyncflow.metrics.timing import OverlapClock
from asyncflow.rollout.ring import Rollout, RolloutInfo
from asyncflow.run import rates
from asyncflow.run.rates import RateMeter, rollout_metrics


@pytest.fixture
def now(monkeypatch):
    current = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: current[0])
    monkeypatch.setattr(rates.time, "perf_counter", lambda: current[0])
    return current


def test_rates_count_what_is_new_since_the_last_call(now):
    meter = RateMeter(OverlapClock())
    now[0] = 2.0
    assert meter.measure(100, 20, 1, 0.0)["throughput/env_steps_per_s"] == 50.0
    now[0] = 6.0
    row = meter.measure(140, 30, 2, 0.0)
    assert row["throughput/env_steps_per_s"] == 10.0
    assert row["throughput/decisions_per_s"] == 2.5
    assert row["wall_s"] == 6.0


def test_a_resumed_run_counts_on_from_where_it_was_cut(now):
    meter = RateMeter(OverlapClock(), wall_s=100.0, counters=(1000, 200, 10))
    now[0] = 2.0
    row = meter.measure(1100, 220, 11, 0.0)
    assert row["wall_s"] == 102.0
    assert row["throughput/env_steps_per_s"] == 50.0
    assert row["throughput/updates_per_s"] == 0.5


def test_an_evaluation_is_left_out_of_wall_time_rates_and_busy_shares(now):
    clock = OverlapClock()
    meter = RateMeter(clock)
    with clock.busy("trainer"):
        now[0] = 1.0
    with meter.paused():
        now[0] = 11.0
    now[0] = 12.0
    row = meter.measure(20, 4, 1, 5.0)
    assert row["wall_s"] == 2.0
    assert row["throughput/env_steps_per_s"] == 10.0
    assert row["async/trainer_busy"] == 0.5
    assert row["async/collector_busy"] == 0.0


def test_rollouts_collected_during_an_evaluation_count_with_the_time_that_they_took(now):
    """Two of 4 s each in an evaluation of 20 s, then one beside the updates, each of which takes 1 s."""
    clock = OverlapClock()
    meter = RateMeter(clock)
    with meter.paused():
        with clock.busy("collector"):
            now[0] = 8.0
        now[0] = 20.0
    rows = []
    for updates, ends in ((1, 21.0), (2, 22.0), (3, 26.0)):
        with clock.busy("collector"):
            with clock.busy("trainer"):
                now[0] += 1.0
            now[0] = ends
        rows.append(meter.measure(400 * updates, 80 * updates, updates, 4.0))
    assert [row["wall_s"] for row in rows] == [4.0, 8.0, 12.0]
    assert [row["throughput/env_steps_per_s"] for row in rows] == [100.0] * 3
    assert [row["async/trainer_busy"] for row in rows] == [0.25] * 3
    assert [row["async/collector_busy"] for row in rows] == [1.0] * 3


def test_without_an_evaluation_a_rollout_collected_ahead_adds_no_time(now):
    meter = RateMeter(OverlapClock())
    now[0] = 1.0
    assert meter.measure(400, 80, 1, 4.0)["throughput/env_steps_per_s"] == 400.0


def test_seconds_and_lag_of_a_rollout():
    row = rollout_metrics(Rollout(0, 0, RolloutInfo(3, (), {"collect_s": 2.0}), None, None, None), 2, {"update_s": 1.0})
    assert row["staleness/policy_lag_max"] == 2.0
    assert (row["time/collect_s"], row["time/update_s"]) == (2.0, 1.0)
