"""Ceilings, the model of the ring, intervals and advice, against numbers computed by hand."""

from dataclasses import replace

import pytest

from asyncflow.profile.model import (
    Ceilings,
    Interval,
    Situation,
    StageTimes,
    advise,
    ceilings,
    log_ratio_interval,
    predict_speedup,
    ring_seconds,
)

EQUAL = StageTimes(env_s=1.0, inference_s=1.0, group_inference_s=1.0, collect_s=2.0, update_s=1.0)


def test_the_ideal_ceilings_are_those_of_the_formulas():
    assert ceilings(EQUAL) == Ceilings(two_stage=1.5, three_stage=3.0)
    assert ceilings(replace(EQUAL, collect_s=1.0)).two_stage == 2.0


def test_groups_pay_for_smaller_batches():
    assert ceilings(replace(EQUAL, group_inference_s=1.5)).three_stage == 2.0


def test_the_contended_ceiling_is_the_undisturbed_sum_over_the_disturbed_longest():
    at_work = StageTimes(env_s=1.25, inference_s=1.0, group_inference_s=1.0, collect_s=2.4, update_s=1.2)
    assert ceilings(EQUAL, at_work) == Ceilings(two_stage=1.25, three_stage=2.4)


@pytest.mark.parametrize(
    ("lag", "ends"),
    [
        (0, [3.0, 6.0, 9.0]),  # collect, update, collect, update
        (1, [3.0, 5.0, 7.0]),  # collecting hides behind nothing but the first update
        (2, [3.0, 5.0, 7.0]),  # more lag gains nothing without spread
    ],
)
def test_the_ring_under_lag_l(lag, ends):
    assert ring_seconds([2.0] * 3, [1.0] * 3, lag) == ends


def test_a_long_update_holds_the_collector_at_lag_one_and_not_at_lag_two():
    collect_s, update_s = [1.0, 1.0, 1.0, 3.0, 1.0], [1.0, 3.0, 1.0, 1.0, 1.0]
    assert ring_seconds(collect_s, update_s, 1)[-1] > ring_seconds(collect_s, update_s, 2)[-1]


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0, 2.0, 4.0])
def test_without_spread_the_model_gives_the_two_stage_ceiling(ratio):
    predicted = predict_speedup([1.0] * 50, [ratio] * 50, max_policy_lag=1, skip=3)
    assert predicted == pytest.approx((1 + ratio) / max(1, ratio))


def test_nothing_overlaps_at_lag_zero():
    assert predict_speedup([1.0] * 9, [1.0] * 9, max_policy_lag=0, skip=2) == pytest.approx(1.0)


def test_the_interval_of_known_ratios():
    found = log_ratio_interval([2.0, 8.0], [1.0, 1.0])  # logs ln 2 and ln 8: mean ln 4, standard error ln 2
    assert found.value == pytest.approx(4.0)
    assert found.high == pytest.approx(4.0 * 2**12.706)
    assert found.low == pytest.approx(4.0 / 2**12.706)


def test_one_block_has_no_interval():
    assert log_ratio_interval([3.0], [2.0]) == Interval(pytest.approx(1.5), None, None)


SLOW_SIMULATORS = Situation(
    alone=StageTimes(env_s=3.3, inference_s=0.8, group_inference_s=0.8, collect_s=4.1, update_s=1.0),
    ideal=Ceilings(1.24, 1.55),
    contended=Ceilings(1.2, 1.5),
    speedup=1.2,
    variation=0.0,
    num_env_groups=1,
    max_policy_lag=1,
    num_workers=1,
    num_cores=4,
)


def balanced(**changes):
    alone = StageTimes(env_s=0.5, inference_s=0.5, group_inference_s=0.5, collect_s=1.0, update_s=1.0)
    situation = replace(SLOW_SIMULATORS, alone=alone, ideal=Ceilings(2.0, 2.0), contended=Ceilings(2.0, 2.0))
    return replace(situation, **changes)


def test_slow_simulators_are_named_and_what_helps():
    assert advise(SLOW_SIMULATORS) == (
        "collecting takes 4.1 times as long as training: overlap can give at most 1.24; "
        "step time is 80 % simulator: add workers, or two environment groups"
    )


def test_no_more_workers_than_cores_are_advised():
    assert "give the simulators more cores" in advise(replace(SLOW_SIMULATORS, num_workers=4))


def test_groups_that_are_there_are_not_advised():
    assert "groups" not in advise(replace(SLOW_SIMULATORS, num_env_groups=2))


def test_slow_inference_is_named():
    alone = replace(SLOW_SIMULATORS.alone, env_s=0.8, inference_s=3.3)
    assert "80 % inference" in advise(replace(SLOW_SIMULATORS, alone=alone))


def test_slow_training_needs_no_lag():
    alone = replace(SLOW_SIMULATORS.alone, update_s=8.2)
    assert advise(replace(SLOW_SIMULATORS, alone=alone)).startswith("training takes 2.0 times as long as collecting")


def test_without_lag_nothing_overlaps():
    assert "set it to 1" in advise(replace(SLOW_SIMULATORS, max_policy_lag=0))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"contended": Ceilings(1.4, 1.4), "speedup": 1.39}, "slow each other down"),
        ({"variation": 0.4, "speedup": 1.7}, "max_policy_lag = 2"),
        ({"speedup": 1.5}, "hand-over"),
        ({"speedup": 1.97}, "only making both faster"),
    ],
)
def test_balanced_stages_are_told_where_the_rest_goes(changes, words):
    assert words in advise(balanced(**changes))
