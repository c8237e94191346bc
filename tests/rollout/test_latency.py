"""Emulated latencies: their distribution, their keys, and the queue of emulated simulators, on a clock of the test."""

import math

import pytest

from asyncflow.config.sections import TrainerConfig
from asyncflow.rollout import latency
from asyncflow.rollout.latency import EmulatedLatency, EmulatedSimulators

NUM_ROLLOUTS = 4000


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(latency.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return now


@pytest.mark.parametrize(
    ("spread", "coefficient", "expected"),
    [("constant", 0.5, 0.0), ("uniform", 0.5, 0.5), ("exponential", 0.5, 1.0), ("lognormal", 0.5, 0.5)],
)
def test_mean_and_variation_are_those_asked_for(spread, coefficient, expected):
    stage = EmulatedLatency(2.0, spread, coefficient, seed=1, purpose="env")
    samples = [stage.seconds(rollout) for rollout in range(NUM_ROLLOUTS)]
    mean = sum(samples) / NUM_ROLLOUTS
    std = math.sqrt(sum((x - mean) ** 2 for x in samples) / NUM_ROLLOUTS)
    assert min(samples) >= 0
    assert mean == pytest.approx(2.0, rel=0.06)
    assert std / mean == pytest.approx(expected, abs=0.06)


def test_a_latency_depends_on_seed_stage_and_rollout_alone():
    def seconds(seed=0, purpose="env", rollout=0):
        return EmulatedLatency(1.0, "lognormal", 0.5, seed, purpose).seconds(rollout)

    assert seconds() == seconds()
    assert len({seconds(), seconds(seed=1), seconds(purpose="update"), seconds(rollout=1)}) == 4


def test_fewer_environments_take_their_share(clock):
    EmulatedLatency(0.4).wait(rollout=0, share=0.25)
    assert clock == [pytest.approx(0.1)]


def test_nothing_emulated_is_no_wait(monkeypatch):
    slept = []
    monkeypatch.setattr(latency.time, "sleep", slept.append)
    EmulatedLatency().wait(rollout=0)
    assert slept == []


def test_emulated_simulators_take_one_chunk_after_another(clock):
    simulators = EmulatedSimulators(EmulatedLatency(2.0))
    clock[0] = 10.5
    assert simulators.wait(ended_s=10.0, rollout=0, share=0.5) == (10.0, 11.0)
    assert clock == [11.0]
    assert simulators.wait(ended_s=10.5, rollout=0, share=0.5) == (11.0, 12.0)
    assert clock == [12.0]


def test_emulated_simulators_do_not_wait_for_a_chunk_that_would_be_done(clock):
    simulators = EmulatedSimulators(EmulatedLatency(2.0))
    clock[0] = 20.0
    assert simulators.wait(ended_s=10.0, rollout=0, share=1.0) == (10.0, 12.0)
    assert clock == [20.0]


def test_a_run_s_latencies_differ_in_their_stage_and_mean_alone():
    config = TrainerConfig(seed=3, emulated_spread="lognormal", emulated_variation=0.3)
    assert EmulatedLatency.from_config(config, "env", 0.5) == EmulatedLatency(0.5, "lognormal", 0.3, 3, "env")
