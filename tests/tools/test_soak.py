"""A soak's slopes are those of the data, their intervals Student's, and the verdict hides no growth."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HOUR = 3600.0


@pytest.fixture(scope="module")
def report(tools):
    return tools("soak.report")


@pytest.fixture(scope="module")
def soak(tools):
    return tools("soak.run")


def test_blocks_are_means_of_consecutive_samples(report):
    assert report.block_means([1.0, 3.0, 5.0, 7.0, 9.0, 11.0], 3) == [2.0, 6.0, 10.0]


def test_no_sample_is_left_out_of_the_blocks(report):
    assert report.block_means([1.0, 2.0, 3.0, 4.0, 5.0], 2) == [1.5, 4.0]


def test_a_line_has_its_slope_per_hour_and_no_interval(report):
    seconds = [5.0 * i for i in range(720)]
    slope = report.fit_slope(seconds, [100 + 3 * second / HOUR for second in seconds])
    assert slope.value == pytest.approx(3)
    assert slope.half_width == pytest.approx(0, abs=1e-9)


def test_a_constant_has_exactly_no_slope(report):
    slope = report.fit_slope([5.0 * i for i in range(720)], [300.1] * 720)
    assert (slope.value, slope.half_width, slope.correlation) == (0, 0, 0)


def test_the_interval_is_students(report):
    """By hand: y = x + e, x = 0..19 hours, e = +1, -1, -1, +1 repeated, which no line explains: sum e = sum x e = 0.

    The squared residuals sum to 20 and those of x to 665, so the error is sqrt(20 / 18 / 665) = 0.040876.
    """
    errors = [1.0, -1.0, -1.0, 1.0] * 5
    slope = report.fit_slope([HOUR * i for i in range(20)], [i + error for i, error in enumerate(errors)])
    assert slope.value == pytest.approx(1)
    assert slope.half_width == pytest.approx(2.100922 * 0.040876, rel=1e-4)
    assert slope.correlation == pytest.approx(-1 / 20)  # of 19 products of neighbours, ten are -1 and nine +1


def test_repeated_samples_narrow_no_interval(report):
    values = [float(i * i % 7) for i in range(20)]
    once = report.fit_slope([HOUR * i for i in range(20)], values)
    tenfold = report.fit_slope([HOUR * (i // 10) for i in range(200)], [values[i // 10] for i in range(200)])
    assert tenfold == once


def test_too_few_samples_are_refused(report):
    with pytest.raises(ValueError, match="19 samples after the warm-up: a slope needs 20"):
        report.fit_slope([float(i) for i in range(19)], [0.0] * 19)


@pytest.mark.parametrize(
    ("value", "half_width", "grows"),
    [(5.0, 6.0, False), (0.5, 0.1, False), (-0.5, 0.1, False), (1.0, 0.1, True), (5.0, 1.0, True), (-5.0, 1.0, False)],
)
def test_the_verdict_hides_no_growth(report, value, half_width, grows):
    assert report.Slope(value, half_width, 0.0).grows(resolution=1.0) is grows


def test_the_warm_up_is_left_out(report):
    series = {"seconds": [0.0, 299.0, 300.0, 301.0], "threads": [1.0, 2.0, 3.0, 4.0]}
    assert report.after(series, 5) == {"seconds": [300.0, 301.0], "threads": [3.0, 4.0]}


def test_a_sample_has_every_column(soak, report):
    row = soak.take_sample(os.getpid(), soak.count_shared_memory())
    assert {"seconds", *row} == set(report.COLUMNS)


def test_a_folder_that_stands_where_a_run_will_write_is_renamed_however_often(tools, tmp_path):
    folder, set_aside = tmp_path / "toy", tools("bench.common.report").set_aside
    for name in ("mine", "yours"):
        folder.mkdir()
        (folder / name).touch()
        set_aside(folder)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*s")) == ["toy_set_aside_2/yours"]
    assert (tmp_path / "toy_set_aside_1" / "mine").exists()
    set_aside(folder)  # nothing is there


def test_a_process_is_found_until_it_has_ended(soak):
    command = [sys.executable, "-c", "input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as process:
        assert [folder.name for folder in soak.session_processes(process.pid)] == [str(process.pid)]
        assert soak.take_sample(process.pid, soak.count_shared_memory())["processes"] == 1
        assert f"process {process.pid}" in soak.find_left(process.pid, soak.count_shared_memory())
    assert list(soak.session_processes(process.pid)) == []


def test_resident_memory_contains_what_is_allocated(soak):
    folder = Path("/proc/self")
    before, _ = soak.read_memory(folder)
    held = b"\1" * (64 << 20)
    resident, proportional = soak.read_memory(folder)
    assert resident - before == pytest.approx(len(held), rel=0.1)
    assert proportional <= resident


def test_a_row_of_the_page_has_the_unit_of_its_quantity(report):
    seconds = [36.0 * i for i in range(101)]
    quantity = report.Quantity("memory, MiB", report.MIB, 1.0)
    found = report.judge_quantity(quantity, seconds, [report.MIB * (10 + second / HOUR) for second in seconds])
    assert (found.what, found.verdict) == ("memory, MiB", "**no**")
    assert found.measured.startswith("10.50 (10.00 to 11.00); +1.000 (+1.000 to +1.000); ")


def test_a_quantity_that_strangers_move_is_not_judged(report):
    quantity = report.Quantity("shared memory, MiB", report.MIB, None)
    found = report.judge_quantity(quantity, [36.0 * i for i in range(101)], [report.MIB * i for i in range(101)])
    assert (found.target, found.verdict) == ("reported", "")
