"""Stages that take longer: their distribution and keys, the queue of simulators, and who wears them."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from counting_env import CHUNK, NUM_ENVS, NUM_STEPS, CountingEnv, build, finish_update
from silent import TOY, Silent

from asyncflow.config.presets import load_config
from asyncflow.envs.base import ChunkSpan
from asyncflow.errors import ConfigError
from asyncflow.metrics.tracing import read_spans
from asyncflow.profile import slow
from asyncflow.profile.slow import Emulation, Latency, RolloutCount, SlowPolicy, SlowVecEnv
from asyncflow.run.launch import train

NUM_ROLLOUTS = 4000


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(slow.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(slow.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return now


@pytest.mark.parametrize(
    ("spread", "coefficient", "expected"),
    [("constant", 0.5, 0.0), ("uniform", 0.5, 0.5), ("exponential", 0.5, 1.0), ("lognormal", 0.5, 0.5)],
)
def test_mean_and_variation_are_those_asked_for(spread, coefficient, expected):
    stage = Latency(2.0, spread, coefficient, seed=1, purpose="env")
    samples = [stage.seconds(rollout) for rollout in range(NUM_ROLLOUTS)]
    mean = sum(samples) / NUM_ROLLOUTS
    std = math.sqrt(sum((x - mean) ** 2 for x in samples) / NUM_ROLLOUTS)
    assert min(samples) >= 0
    assert mean == pytest.approx(2.0, rel=0.06)
    assert std / mean == pytest.approx(expected, abs=0.06)


def test_a_latency_depends_on_seed_stage_and_rollout_alone():
    def seconds(seed=0, purpose="env", rollout=0):
        return Latency(1.0, "lognormal", 0.5, seed, purpose).seconds(rollout)

    assert seconds() == seconds()
    assert len({seconds(), seconds(seed=1), seconds(purpose="update"), seconds(rollout=1)}) == 4


def test_fewer_environments_take_their_share(clock):
    Latency(0.4).wait(rollout=0, share=0.25)
    assert clock == [pytest.approx(0.1)]


def simulated(env, env_ids):
    """When a chunk was simulated, as the wrapper tells."""
    env.step_async(torch.zeros(len(env_ids), CHUNK, 2), env_ids)
    span = env.step_wait(env_ids).spans[-1]
    assert span.lane == "emulated"
    return span.start_s, span.end_s


def test_slow_simulators_take_one_chunk_after_another(clock):
    env = SlowVecEnv(CountingEnv(), Latency(2.0), RolloutCount(NUM_ENVS))
    clock[0] = 10.0
    assert simulated(env, range(0, NUM_ENVS, 2)) == (10.0, 11.0)
    assert clock == [11.0]
    clock[0] = 10.5  # as if the second group's chunk had ended before that
    assert simulated(env, range(1, NUM_ENVS, 2)) == (11.0, 12.0)
    assert clock == [12.0]


def test_slow_simulators_do_not_wait_for_a_chunk_that_would_be_done(clock):
    class Early(CountingEnv):
        def step_wait(self, env_ids):
            return replace(super().step_wait(env_ids), spans=(ChunkSpan("worker 0", 9.0, 10.0),))

    env = SlowVecEnv(Early(), Latency(2.0), RolloutCount(NUM_ENVS))
    clock[0] = 20.0
    assert simulated(env, range(NUM_ENVS)) == (10.0, 12.0)
    assert clock == [20.0]


def test_what_slow_simulators_yield_is_what_they_would_without():
    fast, slowed = CountingEnv(), SlowVecEnv(CountingEnv(), Latency(0.0), RolloutCount(NUM_ENVS))
    for env in (fast, slowed):
        env.reset(0)
        env.step_async(torch.zeros(NUM_ENVS, CHUNK, 2), range(NUM_ENVS))
    expected, found = (env.step_wait(range(NUM_ENVS)) for env in (fast, slowed))
    assert torch.equal(expected.obs["state"], found.obs["state"])
    assert torch.equal(expected.rewards, found.rewards)
    assert slowed.journal().episodes == fast.journal().episodes


@pytest.mark.parametrize("first", [0, 5])
def test_calls_belong_to_the_rollout_whose_decisions_they_are(first):
    count = RolloutCount(size=8, first=first)
    assert [count.add(2) - first for _ in range(9)] == [0] * 4 + [1] * 4 + [2]


@pytest.mark.parametrize("groups", [1, 2])
def test_every_decision_and_chunk_of_a_rollout_has_its_factor_and_share(clock, groups):
    _, channel, collector = build(CountingEnv(), groups=groups)
    inference, env = Latency(1.0, "lognormal", 0.5, 0, "inference"), Latency(4.0, "lognormal", 0.5, 0, "env")
    writer, size = collector.writer, NUM_STEPS * NUM_ENVS
    writer.env = SlowVecEnv(writer.env, env, RolloutCount(size))
    writer.sample = SlowPolicy(writer.sample, inference, RolloutCount(size), NUM_ENVS)
    for rollout in range(2):
        begun = clock[0]
        finish_update(channel, collector.next_rollout())
        inferring, simulating = NUM_STEPS * inference.factor(rollout), NUM_STEPS * 4.0 * env.factor(rollout)
        assert clock[0] - begun == pytest.approx(inferring + simulating)  # a chunk of the fake ends when waited for


def test_slow_simulators_work_on_one_group_while_the_policy_infers_for_another(monkeypatch, tmp_path):
    _, channel, collector = build(CountingEnv(), groups=2)
    collector.writer.env = SlowVecEnv(collector.writer.env, Latency(2.0), RolloutCount(NUM_STEPS * NUM_ENVS))
    slept = []
    monkeypatch.setattr(slow.time, "sleep", slept.append)
    channel.tracer.open(tmp_path / "trace.json")
    collector.next_rollout()
    channel.tracer.close()
    chunks = [span for span in read_spans(tmp_path / "trace.json") if span.lane == "emulated"]
    assert len(slept) == len(chunks) == 2 * NUM_STEPS
    for before, after in pairwise(chunks):
        assert after.start_s >= before.end_s - 1e-5  # they share the simulators, to the file's microseconds
        assert after.duration_s == pytest.approx(1.0, abs=1e-5)  # half of the environments


@pytest.mark.parametrize("mode", ["standard", "vla"])
def test_a_run_with_slow_stages_waits_in_each_of_them_and_trains_alike(tmp_path, monkeypatch, mode):
    def run(emulation):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        keys = TOY | {"trainer.total_updates": 2, "trainer.buffer_type": mode, "logging.out": str(out)}
        done = train(load_config("toy", keys), Silent(), lambda run: emulation.put_on(run.trainer))
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return done.config, [row["train/policy_loss"] for row in rows]

    waits = []
    monkeypatch.setattr(Latency, "wait", lambda self, rollout, share=1.0: self.seconds(rollout, share))
    monkeypatch.setattr(
        Latency, "seconds", lambda self, rollout, share=1.0: waits.append((self.purpose, rollout, share)) or 0.0
    )
    config, plain = run(Emulation())
    assert waits == []
    _, slowed = run(Emulation(inference_s=1e-3, env_s=1e-3, update_s=1e-3))
    assert slowed == plain
    minibatches = config.algorithm.update_epochs * config.algorithm.num_minibatches
    for rollout in range(2):
        assert waits.count(("inference", rollout, 1.0)) == config.num_steps
        assert waits.count(("env", rollout, 1.0)) == config.num_steps
        assert waits.count(("update", rollout, 1.0)) == minibatches


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"inference_s": -1.0}, r"inference_s = -1.0: must be 0 to 1e\+06"),
        ({"update_s": math.nan}, "update_s = nan"),
        ({"spread": "gauss"}, "--spread gauss: must be one of constant"),
        ({"spread": "uniform", "variation": 0.6}, "--variation 0.6: must be 0 to 0.58"),
    ],
)
def test_stages_that_cannot_be_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        Emulation(**options).check()
