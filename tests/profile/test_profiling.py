"""The order of legs, emulated stages, sweeps, and what the command refuses, on legs written by hand."""

from dataclasses import replace

import pytest
from silent import TOY
from written_leg import read

from asyncflow import cli
from asyncflow.config.presets import load_config
from asyncflow.errors import ConfigError
from asyncflow.profile import measure as profiling
from asyncflow.profile.measure import RATIOS, Block, Profile, ProfileOptions, emulate, measure_profile, prepare, sweep
from asyncflow.profile.slow import NOTHING


def toy(**changes):
    return load_config("toy", TOY | changes)


def silent(line):
    pass


@pytest.fixture
def legs(monkeypatch):
    """Let legs be written by hand; return the modes, emulated stages and windows that were asked for."""
    asked = []

    def run_leg(config, mode, window, emulation=NOTHING):
        asked.append((mode, emulation, window))
        return replace(read(mode), window=window)

    monkeypatch.setattr(profiling, "run_leg", run_leg)
    return asked


def test_legs_take_turns_three_times(legs):
    measure_profile(toy(), ProfileOptions(num_updates=2), silent)
    assert [mode for mode, *_ in legs] == ["standard", "vla", "vla", "standard"] * 3


def test_with_groups_a_serial_leg_stands_at_both_ends(legs):
    config = load_config("toy", TOY | {"collector.num_env_groups": 2})
    profile = measure_profile(config, ProfileOptions(num_updates=2, num_repeats=1), silent)
    assert [mode for mode, *_ in legs] == ["serial", "standard", "vla", "vla", "standard", "serial"]
    assert profile.serial_mode == "serial"


def test_all_legs_measure_the_same_updates(legs):
    measure_profile(toy(), ProfileOptions(num_repeats=1), silent)
    assert len({window for *_, window in legs[1:]}) == 1


def test_a_slow_run_is_measured_over_few_updates(legs):
    measure_profile(toy(), ProfileOptions(num_repeats=1), silent)  # the hand-written period is 10 s
    assert legs[-1][2].num_updates == profiling.MIN_UPDATES


def test_emulated_seconds_of_a_rollout_are_spread_over_its_calls():
    config = toy()
    options = ProfileOptions(inference_latency_s=0.8, env_latency_s=1.6, update_latency_s=6.4, spread="uniform")
    emulation = emulate(config, options)
    assert config.num_steps == 8
    assert emulation.inference_s == pytest.approx(0.1)
    assert emulation.env_s == pytest.approx(0.2)
    minibatches = config.algorithm.update_epochs * config.algorithm.num_minibatches
    assert emulation.update_s * minibatches == pytest.approx(6.4)
    assert (emulation.spread, emulation.variation) == ("uniform", 0.5)


def test_a_sweep_makes_every_ratio_by_the_updates_latency(legs):
    points = list(sweep(toy(), ProfileOptions(num_repeats=1, inference_latency_s=4.0), silent))
    config = points[0].profile.config
    minibatches = config.algorithm.update_epochs * config.algorithm.num_minibatches
    asked = [emulation.update_s * minibatches for _, emulation, _ in legs]
    added = asked[1:]  # the first leg, without latencies, tells how long the stages are
    assert asked[0] == 0
    assert added[::4] == added[3::4]  # the four legs of a ratio
    assert [point.wanted for point in points] == list(RATIOS)
    # By hand: 6 s and 4 s.
    assert added[::4] == pytest.approx([max(0.0, ratio * (6.0 + 4.0) - 4.0) for ratio in RATIOS])


def test_equal_stages_overlap_in_a_real_profile():
    options = ProfileOptions(inference_latency_s=0.15, update_latency_s=0.15, num_repeats=1, num_updates=3)
    assert measure_profile(toy(), options, silent).speedup().value > 1.2


def test_a_speed_up_is_that_of_seconds_per_fresh_decision():
    slow, fast = read("standard"), replace(read("vla"), seconds=16.0)
    blocks = [Block([slow, fast, fast, slow])] * 2
    profile = Profile(toy(), ProfileOptions(), blocks, span_s=1e-6)
    assert profile.speedup().value == pytest.approx(20.0 / 16.0)
    assert profile.ideal.two_stage == pytest.approx(10.0 / 6.0)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"inference_latency_s": -1.0}, "--inference-latency-s -1.0"),
        ({"env_latency_s": float("nan")}, "--env-latency-s nan"),
        ({"num_repeats": 0}, "--num-repeats 0"),
        ({"num_updates": 0}, "--num-updates 0"),
    ],
)
def test_options_that_cannot_be_are_refused_before_a_folder_is_made(tmp_path, options, named):
    with pytest.raises(ConfigError, match=named):
        prepare(toy(), ProfileOptions(**options), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_folder_with_a_profile_is_refused(tmp_path):
    (tmp_path / "profile.json").write_text("{}")
    with pytest.raises(ConfigError, match="already holds profile"):
        prepare(toy(), ProfileOptions(), str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--inference-latency-s", "x"], "'x' is not a number"),
        (["--spread", "gauss"], "--spread gauss: must be one of constant, uniform, exponential, lognormal"),
        (["--spread", "uniform", "--variation", "0.9"], "--variation 0.9: must be 0 to 0.58 for a uniform spread"),
        (["--variation", "-1"], "--variation -1.0: must be 0 to 1e+02 for a constant spread"),
        (["trainer.emulated_spread=uniform"], "`asyncflow profile --spread` has them"),
        (["--task", "Tyo"], "did you mean Toy"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(capsys, arguments, named):
    assert cli.run(["profile", "--task", "Toy", *arguments]) == 2
    said = capsys.readouterr().err
    assert named in said
    assert len(said.splitlines()) == 1
