"""The overlap benchmark's parts: what is measured again, how they are called, recording's switch, and the page."""

import json
import os
from dataclasses import replace

import pytest
from written_profile import make_profile, speedup

from asyncflow.metrics import tracing
from asyncflow.profile.slow import Emulation


@pytest.fixture(scope="module")
def settings(tools):
    return tools("bench.overlap.settings")


@pytest.fixture(scope="module")
def records(tools):
    return tools("bench.common.records")


@pytest.fixture(scope="module")
def bench(tools):
    return tools("bench.overlap.run")


@pytest.fixture
def place(records, settings, tmp_path):
    return records.choose_place(settings.NAME, tmp_path, is_tiny=True)


# What is measured again.


def test_a_finished_part_is_not_measured_again(settings, records, place):
    measured = []
    parts = {"sweep": lambda *_: measured.append("sweep") or {"profile": 1}}
    records.measure(parts, settings.TINY, place)
    records.measure(parts, settings.TINY, place)
    assert measured == ["sweep"]
    assert records.figures_of(place, "sweep") == {"profile": 1}


def test_a_part_that_fails_leaves_no_record(settings, records, place):
    def fail(*_):
        raise SystemExit("failed")

    with pytest.raises(SystemExit, match="failed"):
        records.measure({"sweep": fail}, settings.TINY, place)
    assert records.read_record(place, "sweep") is None


def test_other_settings_of_a_part_are_refused_and_those_of_another_are_not(settings, records, place):
    records.write_record(place, "train", settings.TINY, {}, 1.0)
    assert records.is_measured(place, "train", replace(settings.TINY, curve_episodes=77))
    with pytest.raises(SystemExit, match="other settings"):
        records.is_measured(place, "train", replace(settings.TINY, seeds=(7,)))


def test_what_takes_time_is_not_mixed_with_another_machines(settings, records, place):
    for part in ("train", "evaluate"):
        records.write_record(place, part, settings.TINY, {}, 1.0)
        record = records.read_record(place, part)
        place.record(part).write_text(json.dumps(record | {"machine": {"processor": "another"}}))
    assert records.is_measured(place, "evaluate", settings.TINY)
    with pytest.raises(SystemExit, match="another machine"):
        records.is_measured(place, "train", settings.TINY)


def test_every_setting_belongs_to_a_part(settings, bench):
    names = {name for part in settings.DEPENDS.values() for name in part}
    assert names == set(vars(settings.FULL))
    assert set(settings.DEPENDS) == set(bench.PARTS)


def test_what_a_part_needs_is_measured_before_it(bench):
    assert bench.with_needs(["evaluate", "sweep"]) == ["balance", "sweep", "train", "evaluate"]


def test_a_part_without_what_it_needs_names_it(settings, tools, place):
    with pytest.raises(SystemExit, match="part balance comes first"):
        tools("bench.overlap.profiles").balanced_arguments(settings.TINY, place, "Lift")


# How they are called.


def write_balance(settings, records, place):
    records.write_record(place, "balance", settings.FULL, {"Lift": {"update_latency_s": 3.2}}, 1.0)


def test_the_training_emulates_what_the_profile_emulates(settings, records, tools, place):
    write_balance(settings, records, place)
    profile = tools("bench.overlap.profiles").balanced_arguments(settings.FULL, place, "Lift")
    assert profile == ["--task", "Lift", "--inference-latency-s", "1.5", "--update-latency-s", "3.2"]
    flag, stages = tools("bench.overlap.training").emulation(settings.FULL, place)
    assert flag == "--emulate"
    config = settings.FULL.load("Lift")
    minibatches = config.algorithm.update_epochs * config.algorithm.num_minibatches
    seconds = Emulation(**json.loads(stages))
    assert seconds.inference_s == pytest.approx(1.5 / config.num_steps, abs=1e-6)
    assert seconds.update_s == pytest.approx(3.2 / minibatches, abs=1e-6)
    assert seconds.env_s == 0


def test_the_training_is_one_that_bench_learning_knows(settings, records, tools, place, monkeypatch):
    write_balance(settings, records, place)
    arguments = tools("bench.overlap.training").learning_arguments(settings.FULL, place, "eval")
    monkeypatch.setattr("sys.argv", ["bench_learning.py", *arguments])
    options = tools("bench.learning.run").parse_arguments()
    assert (options.phase, options.conditions, options.seeds) == ("eval", ["standard", "vla"], [0, 1, 2])
    assert (options.save_interval, options.curve_episodes, options.final_episodes) == (1, 100, 200)
    assert options.override == list(settings.FULL.lift_overrides)
    assert set(json.loads(options.emulate)) == {"inference_s", "update_s"}


def test_ends_of_curves_are_evaluated_again_in_tables_of_their_own(settings, records, tools, place, monkeypatch):
    write_balance(settings, records, place)
    training, learning = tools("bench.overlap.training"), tools("bench.learning.run")
    options = []
    for is_fine in (False, True):
        arguments = training.learning_arguments(settings.FULL, place, "eval", is_fine)
        monkeypatch.setattr("sys.argv", ["bench_learning.py", *arguments])
        options.append(learning.parse_arguments())
    assert (options[1].from_update, options[1].curve_episodes, options[1].final_episodes) == (24, 200, 1000)
    assert options[0].out == options[1].out
    assert options[0].override == options[1].override
    assert options[0].data != options[1].data


def test_of_two_evaluations_the_one_of_more_episodes_counts(tools, place):
    for folder, rows in (
        ("emulated", "0,0,0,60,30\n1,9,2,60,40\n2,9,4,200,190\n"),
        ("emulated_fine", "2,9,4,1000,960\n"),
    ):
        (place.data / folder).mkdir(parents=True)
        for mode in ("standard", "vla"):
            table = place.data / folder / f"learning_{mode}_seed0.csv"
            table.write_text(f"updates,env_steps,wall_s,num_episodes,num_successes\n{rows}")
    curves = tools("bench.overlap.training").read_finest(place)
    assert [(point.updates, point.num_successes) for point in curves["vla"][0]] == [(0, 30), (1, 40), (2, 960)]


# Recording's switch.


@pytest.mark.parametrize("is_second", [False, True])
def test_recording_is_on_in_every_other_pair_of_windows(settings, tools, tmp_path, monkeypatch, is_second):
    overhead = tools("bench.overlap.overhead")
    calls = []
    for name in ("open", "close"):
        original = getattr(tracing.Tracer, name)
        monkeypatch.setattr(
            tracing.Tracer, name, lambda *args, name=name, original=original: (calls.append(name), original(*args))[1]
        )
    costs = overhead.measure_run(replace(settings.TINY, toy_blocks=1, toy_window=1), "Toy", is_second)
    assert all(cost.wall_s > 0 and cost.cpu_s > 0 for cost in costs)
    off, on = ["close"], ["open", "close"]
    wanted = [on, off, off, on] if is_second else [off, on, on, off]
    assert calls == [*(call for window in wanted for call in window), "close"]  # the last one is the run's end


def test_the_overhead_is_the_ratio_of_windows_with_the_same_work(tools):
    """By hand: window k of both runs does k seconds of work, and recording adds 2 %."""
    overhead = tools("bench.overlap.overhead")
    runs = [
        [overhead.Cost(k * (1.02 if overhead.is_on(k - 1, is_second) else 1.0), 1.0, 0.0) for k in range(1, 9)]
        for is_second in (False, True)
    ]
    found = overhead.overhead(*runs, "wall_s")
    assert (found.value, found.low, found.high) == pytest.approx((0.02, 0.02, 0.02))


def test_the_clocks_of_workers_are_read(tools):
    overhead = tools("bench.overlap.overhead")
    assert overhead.worker_seconds(os.getpid()) > 0


# The page.


def test_the_page_holds_every_target_that_was_measured(settings, records, tools, bench, place):
    sweep = {
        "wanted_ratio": 1.0,
        "ratio": 1.0,
        "ceiling": 2.0,
        "predicted": 2.0,
        "measured": 1.98,
        "interval": "-",
        "error": -0.01,
    }
    overhead = {"wall_s": speedup(0.0), "cpu_s": speedup(0.0)}
    figures = {
        "balance": {},
        "two_stages": {"command": "asyncflow profile two", "profile": make_profile()},
        "three_stages": {"command": "asyncflow profile three", "profile": make_serial_profile()},
        "sweep": {"command": "asyncflow profile sweep", "profile": {"sweep": [sweep]}},
        "overhead_toy": {"Toy": overhead},
        "overhead_lift": {"Lift": overhead},
        "lift": {"command": "asyncflow profile lift", "profile": make_profile()},
        "train": {"command": "python -m tools.bench.learning"},
        "evaluate": {"command": "python -m tools.bench.learning"},
    }
    for part, found in figures.items():
        records.write_record(place, part, settings.TINY, found, 60.0)
    write_curves(tools, place.data / settings.CURVES)
    findings = tools("bench.overlap.page").write_page(place, records.read_records(place, list(bench.PARTS)))
    page = (place.pages / "overlap.md").read_text()
    assert len(findings) == 8
    assert all(f"| {found.what} | {found.measured} | {found.target} |" in page for found in findings)
    assert (place.pages / "overlap_learning.png").read_bytes().startswith(b"\x89PNG")


def write_curves(tools, folder):
    """Write the tables of both modes on two seeds: 90 % after one update, 99 % after two."""
    learning = tools("bench.learning.run")
    folder.mkdir()
    for mode, update_s in (("standard", 2.0), ("vla", 1.0)):
        rows = [
            dict.fromkeys(learning.COLUMNS, 0)
            | {"updates": k, "wall_s": k * update_s, "num_episodes": 100, "num_successes": (60, 90, 99)[k]}
            for k in range(3)
        ]
        for seed in (0, 1):
            learning.write_table(folder / f"learning_{mode}_seed{seed}.csv", rows)


def make_serial_profile():
    profile = make_profile(1.7, ("serial", "standard", "vla"))
    return profile | {"speedup": profile["speedup"] | {"serial": speedup(2.7)}}


def test_a_page_without_anything_measured_is_refused(bench, place):
    with pytest.raises(SystemExit, match="call without --page first"):
        bench.report(place)


def test_a_missed_target_ends_with_1(settings, records, bench, place, capsys):
    records.write_record(place, "lift", settings.TINY, {"command": "x", "profile": make_profile(1.2)}, 1.0)
    assert bench.report(place) == 1
    said = capsys.readouterr().out
    assert said.startswith("missed: Lift")
    assert "not measured yet: balance" in said
