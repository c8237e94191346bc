"""What is read from the trace of a leg that was written by hand."""

import pytest
from written_leg import COLLECT_S, LOG_S, PERIOD_S, UPDATE_S, WINDOW, read, rows, standard_spans

from asyncflow.metrics.tracing import Span
from asyncflow.profile.model import StageTimes
from asyncflow.profile.read import Memory, read_leg, stage_times


def test_the_window_lies_between_the_ends_of_updates():
    leg = read()
    assert leg.seconds == 2 * PERIOD_S
    assert leg.samples["period"] == [PERIOD_S, PERIOD_S]
    assert leg.start_s == 9.5
    assert leg.decision_s == pytest.approx(20.0 / 16)


def test_the_trainers_time_is_whatever_is_no_waiting():
    leg = read()
    assert leg.samples["trainer"] == [UPDATE_S + LOG_S] * 2
    assert leg.samples["wait_data"] == [COLLECT_S] * 2
    assert leg.trainer_s == [UPDATE_S, UPDATE_S + LOG_S, UPDATE_S + LOG_S]


def test_simulators_count_from_the_first_workers_start_to_the_last_ones_end():
    leg = read()
    assert leg.samples["chunk"] == [2.0] * 4
    assert leg.samples["env"] == [4.0, 4.0]


def test_the_policys_calls_are_summed_up_by_rollout():
    leg = read()
    assert leg.samples["inference"] == [1.0] * 4
    assert leg.samples["policy"] == [2.0, 2.0]


def test_bubbles_are_the_shares_without_work():
    bubbles = read().bubbles
    assert bubbles == {
        "trainer": pytest.approx(0.6),
        "collector": pytest.approx(0.4),
        "simulators": pytest.approx(0.6),
    }


@pytest.mark.parametrize(
    ("row", "counts"),
    [
        ({}, {"fresh": 16, "reused": 0, "dropped": 0}),
        ({"decisions": 10}, {"fresh": 16, "reused": 4, "dropped": 0}),
        ({"dropped": 3}, {"fresh": 16, "reused": 0, "dropped": 6}),
    ],
)
def test_decisions_are_counted_from_counters_that_only_rise(row, counts):
    assert read(**row).counts == counts


def test_lags_are_counted_by_update():
    assert read(lag=1).lags == {1: 2}


def test_stage_times_are_those_of_a_rollout():
    leg = read()
    assert stage_times([leg], [leg]) == StageTimes(
        env_s=4.0, inference_s=2.0, group_inference_s=2.0, collect_s=6.0, update_s=4.0
    )


def test_a_rollout_cut_by_the_end_is_left_out():
    ahead = Span("collector", "collect", 29.0, 35.0, {})
    chunk = Span("worker 0", "chunk", 30.0, 31.0, {"rollout": 3, "step": 0, "group": 0})
    leg = read_leg("vla", WINDOW, [*standard_spans(3), ahead, chunk], rows(3), Memory(1, 2, 3))
    assert leg.samples["collect"] == [6.0, 6.0]
    assert leg.bubbles["collector"] == pytest.approx((8.0 - 0.5) / 20.0)
