"""What the overlap benchmark concludes: time to a success rate, non-inferiority, and verdicts on its targets."""

import math

import pytest
from written_profile import make_profile, speedup

from asyncflow.profile.model import Interval


@pytest.fixture(scope="module")
def training(tools):
    return tools("bench.overlap.training")


@pytest.fixture(scope="module")
def judge(tools):
    return tools("bench.overlap.judge")


@pytest.fixture(scope="module")
def curve(tools):
    """Return a function from successes of 100 episodes, update by update, and seconds of an update, to a curve."""
    point = tools("bench.learning.curves").Point

    def make(successes, update_s=1.0):
        return [point(updates, 100 * updates, update_s * updates, 100, k) for updates, k in enumerate(successes)]

    return make


# Time to a success rate.


def test_a_rate_lasts_from_where_nothing_is_below_it_any_more(training):
    assert training.find_lasting([0.6, 0.96, 0.94, 0.95, 0.99], 0.95) == 3


def test_a_rate_that_is_lost_at_the_end_does_not_last(training):
    assert training.find_lasting([0.99, 0.99, 0.94], 0.95) is None


def test_the_first_time_counts_whatever_follows(training):
    assert training.find_first([0.6, 0.96, 0.94, 0.95, 0.99], 0.95) == 1
    assert training.find_first([0.6, 0.7], 0.95) is None


def test_a_curve_that_never_falls_is_fitted_to_the_rates(training):
    assert training.find_fitted([0.6, 0.96, 0.92, 0.94, 0.97], 0.95) == 4  # 0.94 is the mean of three
    assert training.find_fitted([0.6, 0.97, 0.94, 0.96, 0.94], 0.95) == 1  # 0.9525 that of four
    assert training.find_fitted([0.6, 0.97, 0.8], 0.95) is None


def test_rates_of_more_episodes_weigh_more_in_the_fit(training):
    rates = [0.6, 0.96, 0.93, 0.97]
    assert training.find_fitted(rates, 0.95, [60, 60, 60, 60]) == 3
    assert training.find_fitted(rates, 0.95, [60, 600, 60, 60]) == 1  # (10 * 0.96 + 0.93) / 11 = 0.957


def test_curves_are_pooled_by_update_without_the_start(training, curve):
    pooled = training.pool([curve([50, 60, 90], 2.0), curve([50, 80, 100, 100], 4.0)])
    assert [(point.updates, point.num_successes, point.num_episodes, point.wall_s) for point in pooled] == [
        (1, 140, 200, 3.0),
        (2, 190, 200, 6.0),
    ]


def test_the_ratio_is_that_of_wall_times_and_not_of_updates(training, curve):
    vla, standard = training.pool([curve([50, 80, 90, 97], 1.0)]), training.pool([curve([50, 80, 97, 97], 2.0)])
    assert training.time_ratio(vla, standard) == pytest.approx(3 * 1.0 / (2 * 2.0))


def test_there_is_no_ratio_unless_both_modes_get_there(training, curve):
    good, bad = training.pool([curve([50, 97])]), training.pool([curve([50, 60])])
    assert training.time_ratio(bad, good) is None
    assert training.time_ratio(good, bad) is None
    assert training.ratio_interval(bad, good) is None


def test_certain_rates_leave_no_doubt_about_the_ratio(training, tools):
    point = tools("bench.learning.curves").Point
    sure = [point(updates, 0, 1.0 * updates, 10**6, k) for updates, k in ((1, 0), (2, 10**6), (3, 10**6))]
    interval = training.ratio_interval(sure, sure)
    assert (interval.value, interval.low, interval.high) == (1.0, 1.0, 1.0)


def test_few_episodes_leave_doubt_about_the_ratio(training, curve):
    noisy = training.pool([curve([50, 90, 95, 95, 96, 99])])
    interval = training.ratio_interval(noisy, noisy)
    assert interval.low < interval.value < interval.high


def test_a_mode_that_hardly_ever_lasts_has_no_upper_end(training, curve):
    sure, doubtful = training.pool([curve([50, 100, 100])]), training.pool([curve([50, 95, 95])])
    assert math.isinf(training.ratio_interval(doubtful, sure).high)


# Non-inferiority.


def test_the_difference_of_final_success_is_newcombes_over_all_seeds(training, tools, curve):
    both = {0: curve([50, 97]), 1: curve([50, 99])}
    found = training.final_difference(both, {0: curve([50, 96]), 1: curve([50, 96])})
    expected = tools("bench.learning.curves").difference_interval((196, 200), (192, 200))
    assert (found.value, found.low, found.high) == pytest.approx(expected)


@pytest.mark.parametrize(("low", "verdict"), [(-0.029, True), (-0.03, False), (-0.05, False), (0.01, True)])
def test_the_whole_interval_has_to_lie_above_the_margin(training, tools, low, verdict):
    interval = Interval(low + 0.02, low, low + 0.04)
    assert training.is_non_inferior(interval, 0.03) is verdict


# Verdicts.


@pytest.mark.parametrize(("value", "verdict"), [(1.94, True), (1.93, False)])
def test_two_stages_are_held_against_two_and_not_against_their_own_ceiling(judge, value, verdict):
    (found,) = judge.judge_two_stages({"profile": make_profile(value)})
    assert found.is_met is verdict


@pytest.mark.parametrize(("value", "verdict"), [(2.6, True), (2.59, False)])
def test_three_stages_are_compared_with_the_serial_run(judge, value, verdict):
    profile = make_profile(1.7, ("serial", "standard", "vla"))
    profile["speedup"]["serial"] = speedup(value)
    (found,) = judge.judge_three_stages({"profile": profile})
    assert found.is_met is verdict


@pytest.mark.parametrize(("worst", "verdict"), [(-0.05, True), (0.051, False), (-0.051, False)])
def test_one_point_of_a_sweep_is_enough_to_miss_it(judge, worst, verdict):
    sweep = [{"ratio": ratio, "error": error} for ratio, error in ((0.1, 0.0), (1.0, worst), (4.0, 0.01))]
    (found,) = judge.judge_sweep({"profile": {"sweep": sweep}})
    assert found.is_met is verdict
    assert f"{100 * worst:+.2f} %" in found.measured


@pytest.mark.parametrize(("high", "verdict"), [(0.019, True), (0.02, False), (None, False)])
def test_overhead_is_judged_by_the_upper_end_of_its_interval(judge, high, verdict):
    wall = {"value": 0.005, "low": None if high is None else -0.01, "high": high}
    (found,) = judge.judge_overhead({"Lift": {"wall_s": wall, "cpu_s": speedup(0.0)}})
    assert found.is_met is verdict


def test_a_blocks_share_is_that_of_its_own_contended_ceiling(judge):
    shares = judge.block_shares(make_profile())
    assert len(shares) == 2
    assert shares[0] == shares[1] == pytest.approx((30 / 15.9, 10 / 5.2))


@pytest.mark.parametrize(("value", "verdict"), [(0.931 * 10 / 5.2, True), (0.929 * 10 / 5.2, False)])
def test_lift_is_held_against_its_contended_ceiling(judge, value, verdict):
    (found,) = judge.judge_lift({"profile": make_profile(value)})
    assert found.is_met is verdict


def test_learning_is_judged_by_pooled_wall_time_and_by_final_success(judge, curve):
    fast, slow = curve([50, 90, 99, 99], 1.0), curve([50, 90, 99, 99], 2.0)
    ratio, final = judge.judge_learning({"vla": {0: fast, 1: fast}, "standard": {0: slow, 1: slow}})
    assert ratio.is_met
    assert ratio.measured.startswith("0.500 ")
    assert final.is_met
    ratio, final = judge.judge_learning({"vla": {0: slow}, "standard": {0: curve([50, 90, 99, 100], 2.0)}})
    assert not ratio.is_met
    assert not final.is_met  # one of 100 episodes fewer: the interval reaches far below


def test_a_mode_that_never_gets_there_is_a_miss_and_no_crash(judge, curve):
    ratio, _ = judge.judge_learning({"vla": {0: curve([50, 90, 94])}, "standard": {0: curve([50, 90, 99])}})
    assert not ratio.is_met
    assert "does not end at 95 %" in ratio.measured
