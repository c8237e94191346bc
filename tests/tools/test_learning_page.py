"""The page on learning says what its tables say: intervals, verdicts, pooled rates, speed-ups, curves."""

import argparse
import sys
from types import SimpleNamespace

import pytest
import yaml
from written_curves import write_curve, write_meta

from asyncflow.config.presets import load_config


@pytest.fixture(scope="module")
def page(tools):
    module = tools("bench.learning.page")
    module.plt.switch_backend("Agg")
    return module


@pytest.fixture
def curve(page):
    """Return a function from final successes of 200 episodes to a curve of two points."""

    def make(successes, episodes=200, env_steps=60_000, wall_s=100.0):
        return [page.Point(0, 0, 0.0, 50, 30), page.Point(16, env_steps, wall_s, episodes, successes)]

    return make


# Intervals.


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((56, 70), (48, 80), (0.0524, 0.3339)),
        ((9, 10), (3, 10), (0.1705, 0.8090)),
        ((6, 7), (2, 7), (0.0582, 0.8062)),
        ((5, 56), (0, 29), (-0.0381, 0.1926)),
        ((0, 10), (0, 20), (-0.1611, 0.2775)),
        ((0, 10), (0, 10), (-0.2775, 0.2775)),
        ((10, 10), (0, 20), (0.6791, 1.0)),
        ((10, 10), (0, 10), (0.6075, 1.0)),
    ],
)
def test_differences_have_the_intervals_of_newcombes_table(page, first, second, expected):
    """Statistics in Medicine 17 (1998), pages 873 to 890, table II, method 10."""
    difference, low, high = page.difference_interval(first, second)
    assert difference == pytest.approx(first[0] / first[1] - second[0] / second[1])
    assert (low, high) == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize(
    ("successes", "episodes", "expected"),
    [(81, 263, "30.8 % (25.5 to 36.6)"), (15, 148, "10.1 % (6.2 to 16.0)"), (0, 20, "0.0 % (0.0 to 16.1)")],
)
def test_rates_have_the_intervals_of_newcombes_examples(page, successes, episodes, expected):
    """Statistics in Medicine 17 (1998), pages 857 to 872, table I, Wilson's score without a correction."""
    assert page.describe_rate(successes, episodes) == expected


# Verdicts.


@pytest.mark.parametrize(
    ("successes", "verdict"),
    [
        ((190, 190, 190), "yes"),  # 570 of 600 are 95 %
        ((190, 190, 189), "**no**"),
        ((184, 193, 193), "yes"),  # 184 of 200 are 92 %
        ((183, 200, 200), "**no**"),
    ],
)
def test_the_verdict_flips_at_either_target(page, curve, successes, verdict):
    judged = page.judge("vla", {seed: curve(k) for seed, k in enumerate(successes)})
    assert (judged.what.split(":")[0], judged.verdict) == ("asynchronous", verdict)
    worst = min(range(3), key=lambda seed: successes[seed])
    pooled = f"{sum(successes) / 6:.1f} % pooled"
    assert judged.measured.startswith(f"{pooled}, worst seed ({worst}) {min(successes) / 2:.1f} %")


@pytest.mark.parametrize(("env_steps", "verdict"), [(100_000, "yes"), (100_001, "**no**")])
def test_more_env_steps_than_allowed_in_one_run_miss_the_target(page, curve, env_steps, verdict):
    judged = page.judge("vla", {0: curve(198), 1: curve(198, env_steps=env_steps), 2: curve(198)})
    assert judged.verdict == verdict
    assert judged.measured.endswith(f"{env_steps:,} env steps at most")


def test_a_seed_or_an_episode_fewer_is_not_measured(page, curve):
    two = {0: curve(200), 1: curve(200)}
    for seeds in (two, two | {2: curve(199, episodes=199)}):
        found = page.judge("vla", seeds)
        assert (found.measured, found.verdict) == ("not measured", "**no**")
    assert page.judge("vla", two | {2: curve(199)}).is_met


# What is read.


def test_a_table_is_read_as_it_was_written(page, tmp_path):
    write_curve(tmp_path, "plain_lag2", 1, [(0, 0, 0.0, 50, 32), (4, 15215, 30.5524, 200, 195)])
    assert page.read_curves(tmp_path) == {
        "plain_lag2": {1: [page.Point(0, 0, 0.0, 50, 32), page.Point(4, 15215, 30.5524, 200, 195)]}
    }


def test_seeds_rise_as_numbers_do(page, tmp_path):
    for seed in (10, 2, 1):
        write_curve(tmp_path, "vla", seed, [(4, 100, 1.0, 200, seed)])
    assert list(page.read_curves(tmp_path)["vla"]) == [1, 2, 10]


def test_pooled_are_the_last_checkpoints_of_all_seeds(page, curve):
    """By hand: 1 of 100 and 199 of 300 are 50 %, though the mean of both rates is 34 %."""
    assert page.pool_final({0: curve(1, episodes=100), 1: curve(199, episodes=300)}) == (200, 400)


def test_the_mean_curve_has_the_checkpoints_that_all_seeds_have(page):
    """By hand: at update 4, 50 % and 100 % after 10 s and 30 s; at update 8, 90 % and 70 % after 20 s and 60 s."""
    first = [page.Point(4, 100, 10.0, 50, 25), page.Point(8, 200, 20.0, 200, 180)]
    second = [page.Point(4, 300, 30.0, 50, 50), page.Point(6, 0, 0.0, 50, 0), page.Point(8, 400, 60.0, 200, 140)]
    seconds, success = page.mean_curve({0: first, 1: second}, lambda point: point.wall_s)
    assert seconds == [20.0, 40.0]
    assert success == pytest.approx([75.0, 80.0])


# Speed-up.


def test_vla_in_half_the_seconds_is_twice_as_fast(page, curve):
    curves = {"standard": {0: curve(190, wall_s=120.0)}, "vla": {0: curve(190, wall_s=60.0)}}
    assert page.describe_speedup(curves, "vla", [0]) == "2.00"
    assert page.describe_speedup(curves, "standard", [0]) == ""


def test_speed_ups_are_means_over_the_seeds_that_both_have(page, curve):
    """By hand: 120 / 60 and 90 / 90 have the mean 1.5; seed 2 was not run with standard."""
    curves = {
        "standard": {0: curve(190, wall_s=120.0), 1: curve(190, wall_s=90.0)},
        "vla": {0: curve(190, wall_s=60.0), 1: curve(190, wall_s=90.0), 2: curve(190, wall_s=1.0)},
    }
    assert page.describe_speedup(curves, "vla", [0, 1, 2]) == "1.50"
    assert page.describe_speedup(curves, "vla", [2]) == ""


# Lags.


def test_every_condition_runs_with_the_lag_and_the_objective_that_it_is_shown_with(page, tools):
    conditions = tools("bench.learning.run").CONDITIONS
    for objective, by_lag in page.LAGS.items():
        for lag, name in by_lag.items():
            flag, mode, *overrides = conditions[name]
            assert flag == "--buffer-type"
            changes = {key: yaml.safe_load(value) for key, value in (each.split("=") for each in overrides)}
            config = load_config("lift", {"trainer.buffer_type": mode} | changes)
            assert (config.max_policy_lag, config.buffer.lag_mode) == (lag, "fixed")
            assert lag == 0 or config.algorithm.decoupled is (objective == "decoupled")


def test_a_row_of_lags_has_decoupled_first_and_what_it_gains(page, curve):
    """By hand: 195 and 185 of 200 differ by 5 points, less hypot(3.22, 2.90) of Wilson's or more hypot(1.43, 4.51)."""
    curves = {"decoupled_lag2": {0: curve(195)}, "plain_lag2": {0: curve(185)}, "vla": {0: curve(190)}}
    rows = page.lag_table(curves).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| 0", "| 1", "| 2", "| 4"]
    assert rows[1].startswith("| 1 | 95.0 | 95.0 % (91.0 to 97.3) | - | - | - |")
    assert rows[2].startswith("| 2 | 97.5 | 97.5 % (94.3 to 98.9) | 92.5 | 92.5 % (88.0 to 95.4) | +5.0 (+0.7 to +9.7)")
    assert rows[3] == "| 4 | - | - | - | - | - |"


# The page and its picture.


@pytest.fixture
def write(page, tmp_path, monkeypatch):
    """Return a function that calls the tool on the tables of the test's folder, and returns the page."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["page", "--data", str(tmp_path), "--out", str(tmp_path), *arguments])
        page.main()
        return (tmp_path / "learning.md").read_text()

    return run


def test_each_run_stands_in_the_row_of_its_mode_and_seed(write, tmp_path, monkeypatch, page):
    drawn = []
    monkeypatch.setattr(page, "draw_picture", lambda path, *_: drawn.append(path))
    start = (0, 0, 0.0, 50, 32)
    write_curve(tmp_path, "standard", 0, [start, (16, 60438, 120.4, 200, 192)])
    write_curve(tmp_path, "standard", 1, [(16, 60533, 124.4, 200, 188)])
    write_curve(tmp_path, "vla", 0, [start, (16, 60579, 60.2, 200, 195)])
    write_curve(tmp_path, "vla", 1, [(16, 60609, 62.2, 200, 193)])
    write_meta(tmp_path)
    text = write()
    assert "| synchronous | 0 | 64.0 % (50.1 to 75.9) | 96.0 % (92.3 to 98.0) | 200 | 60,438 | 120 |  |" in text
    assert "| synchronous | 1 | - | 94.0 % (89.8 to 96.5) | 200 | 60,533 | 124 |  |" in text
    assert "| **synchronous** | **all** |  | 95.0 % (92.4 to 96.7) | 400 |  | 122 (mean) |  |" in text
    assert "| asynchronous | 0 | 64.0 % (50.1 to 75.9) | 97.5 % (94.3 to 98.9) | 200 | 60,579 | 60 | 2.00 |" in text
    assert "| asynchronous | 1 | - | 96.5 % (93.0 to 98.3) | 200 | 60,609 | 62 | 2.00 |" in text
    assert "| **asynchronous** | **all** |  | 97.0 % (94.8 to 98.3) | 400 |  | 61 (mean) | 2.00 |" in text
    assert "| asynchronous: success after the last update, seeds 0, 1 and 2, 200 episodes each | not measured |" in text
    assert "- Hardware: Abacus, 2 cores, 3 GiB\n- Commit: `beef`, `c0ffee`\n- Versions: python 3.11, torch 2.9" in text
    assert "What stale data cost" not in text
    assert drawn == [tmp_path / "learning.png"]


def test_another_tasks_page_has_no_targets_and_seconds_may_be_left_out(write, tmp_path, monkeypatch, page):
    monkeypatch.setattr(page, "draw_picture", lambda *_: None)
    write_curve(tmp_path, "vla", 0, [(16, 60579, 60.2, 200, 195)])
    write_meta(tmp_path)
    assert "| training, s | speed-up |" in write("--task", "Toy")
    text = write("--task", "Toy", "--no-seconds", "--note", "Read this.")
    assert "| target |" not in text
    assert "training, s" not in text
    assert "Speed-up" not in text
    assert "- Note: Read this.\n" in text


def test_an_empty_folder_is_refused_in_a_line(write, tmp_path):
    with pytest.raises(SystemExit, match=r"holds no learning_\*_seed\*.csv"):
        write()


def lines_of(axes):
    """Return the lines that were drawn, as (colour, width, points)."""
    return [
        (line.get_color(), line.get_linewidth(), list(zip(*map(list, line.get_data()), strict=True)))
        for line in axes.get_lines()
    ]


def test_each_mode_is_drawn_in_its_colour_with_its_mean_thick(page, curve):
    _, axes = page.plt.subplots()
    curves = {"vla": {0: curve(200), 1: curve(190)}, "standard": {0: curve(180)}}
    page.draw_curves(axes, curves, lambda point: point.env_steps / 1000)
    page.plt.close("all")
    blue, vermilion = "#0072B2", "#D55E00"
    assert lines_of(axes) == [
        (blue, 0.7, [(0, 60), (60, 90)]),
        (blue, 2.4, [(0, 60), (60, 90)]),
        (vermilion, 0.7, [(0, 60), (60, 100)]),
        (vermilion, 0.7, [(0, 60), (60, 95)]),
        (vermilion, 2.4, [(0, 60), (60, 97.5)]),
    ]


def test_bars_are_the_intervals_of_the_lags_that_were_measured(page, curve):
    """By hand: 0 of 20 has Wilson's interval 0 to 16.1 %."""
    drawn = []
    axes = SimpleNamespace(errorbar=lambda xs, ys, errors, **style: drawn.append((style["color"], xs, ys, errors)))
    page.draw_lags(axes, {"plain_lag4": {0: curve(0, episodes=20)}})
    _, (colour, xs, ys, errors) = drawn
    assert (colour, xs, ys) == (page.COLOURS["plain"], [4.05], [0.0])
    assert [end for (end,) in errors] == pytest.approx([0.0, 16.11], abs=0.01)


@pytest.mark.parametrize(
    ("has_seconds", "conditions", "panels"),
    [
        (True, ("vla",), [" over env steps", " over wall time"]),
        (False, ("vla", "standard"), [" over env steps"]),
        (True, ("vla", "plain_lag4"), [" over env steps", " over wall time", " by policy lag"]),
    ],
)
def test_the_picture_has_the_panels_that_were_measured(page, has_seconds, conditions, panels):
    assert (
        page.describe_panels(argparse.Namespace(has_seconds=has_seconds), {name: {} for name in conditions}) == panels
    )
