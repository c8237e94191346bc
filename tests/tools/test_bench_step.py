"""What the benchmarks of the workers and of the fast step count, compare and conclude."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hand_clock import HandClock

from asyncflow.config.task_table import MEASURED
from tools.bench.core.settings import Settings

STEP_S, RESET_S = 0.25, 0.5  # exact in binary, so that sums are


class TimedSimulator:
    """A simulator whose steps and resets move a clock."""

    def __init__(self, clock):
        self.clock, self.timestep, self.num_resets = clock, 0, 0

    def step(self, action):
        self.timestep += 1
        self.clock.move(STEP_S)

    def reset(self):
        self.timestep, self.num_resets = 0, self.num_resets + 1
        self.clock.move(RESET_S)


class TimedWorkers:
    """A vector environment: a chunk moves a clock by a second; every other environment ends after 2 of its steps."""

    num_envs = 4

    def __init__(self, clock):
        self.clock = clock

    def step_async(self, chunk, env_ids):
        self.clock.move(1.0)

    def step_wait(self, env_ids):
        return SimpleNamespace(executed=torch.tensor([4, 2, 4, 2]))


@pytest.fixture
def clock():
    return HandClock()


@pytest.fixture
def workers(tools, clock, monkeypatch):
    module = tools("bench.core.workers")
    monkeypatch.setattr(module, "time", clock)
    return module


@pytest.fixture(scope="module")
def fast_step(tools):
    return tools("bench.core.fast_step")


# Turns.


def test_turns_go_there_and_back_and_the_first_of_all_is_warm_up(tools):
    """By hand: a is called as number 0 (warm-up), 2 and 5; b as 1 (warm-up), 3 and 4."""
    calls = []
    turns = {name: lambda block_s, name=name: calls.append((name, block_s)) or len(calls) - 1.0 for name in "ab"}
    rates = tools("bench.common.report").take_turns(turns, 1, 8.0)
    assert calls == [("a", 2.0), ("b", 2.0), ("a", 8.0), ("b", 8.0), ("b", 8.0), ("a", 8.0)]
    assert rates == {"a": [3.5], "b": [3.5]}  # a machine that changes steadily favours neither


def test_every_repeat_has_a_rate_of_its_own(tools):
    found = iter([100.0, 1.0, 3.0, 5.0, 7.0])
    rates = tools("bench.common.report").take_turns({"a": lambda _: next(found)}, 2, 8.0)
    assert rates == {"a": [2.0, 6.0]}


# The workers.


@pytest.mark.parametrize("num_processes", [1, 2, 3, 5, 16])
def test_processes_share_all_environments_evenly(workers, num_processes):
    blocks = workers.split_envs(num_processes)
    assert [env for block in blocks for env in block] == list(range(16))
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1
    assert len(blocks[-1]) == max(map(len, blocks))


@pytest.mark.parametrize(("cores", "num_workers"), [(2, 2), (16, 16), (64, 16)])
def test_no_process_is_without_a_simulator(workers, monkeypatch, cores, num_workers):
    monkeypatch.setattr(workers, "count_cores", lambda: cores)
    assert workers.count_workers() == num_workers


def test_bare_rates_are_env_steps_over_seconds_with_the_resets_that_are_due(workers, clock):
    """By hand: 30 chunks of 4 steps of 0.25 s, a reset of 0.5 s before the 31st: 124 steps in 31.5 s."""
    simulator = TimedSimulator(clock)
    assert workers.step_bare([simulator], np.zeros((7, 1, 4, 2)), 31.5) == 124 / 31.5
    assert simulator.num_resets == 1


def test_a_bare_turn_goes_on_where_the_last_one_ended(workers, clock):
    """Else each turn pays for resets that the workers, whose episodes go on, do not pay for."""
    simulators = [TimedSimulator(clock), TimedSimulator(clock)]
    rates = [workers.step_bare(simulators, np.zeros((7, 1, 4, 2)), 10.0) for _ in range(5)]
    assert rates == [4.0] * 5  # 10 chunks of 4 steps of 0.25 s each time, no reset before the horizon
    assert [simulator.timestep for simulator in simulators] == [100, 100]


def test_bare_simulators_take_a_chunk_each_in_turn(workers, clock):
    simulators = [TimedSimulator(clock) for _ in range(3)]
    workers.step_bare(simulators, np.zeros((7, 1, 4, 2)), 5.0)
    assert [simulator.timestep for simulator in simulators] == [8, 8, 4]


def test_a_process_is_ready_when_all_its_simulators_were_reset_outside_of_any_turn(workers, clock, monkeypatch):
    made, said = [], []
    orders = iter([(2, 5.0), (1, 5.0)])

    def make_bare(seed):
        made.append(TimedSimulator(clock))
        made[-1].action_dim = 7
        return made[-1]

    def receive():
        if not said[1:]:
            assert [simulator.num_resets for simulator in made] == [1, 1]
        order = next(orders, None)
        if order is None:
            raise EOFError
        return order

    monkeypatch.setattr(workers, "make_bare", make_bare)
    workers.serve_bare(SimpleNamespace(recv=receive, send=said.append), range(8, 10), 0)
    assert said == ["ready", 4.0, 4.0]
    assert [simulator.timestep for simulator in made] == [12 + 20, 8]  # 3 and 2 chunks, then 5 of the first alone


def test_workers_rates_count_the_steps_that_were_executed(workers, clock):
    """By hand: 4 + 2 + 4 + 2 steps a second, though chunks of 4 environments have 16."""
    assert workers.step_workers(TimedWorkers(clock), torch.zeros(5, 4, 4, 2), 3.0) == 12.0


def test_chunks_are_random_small_actions_and_those_of_their_seed(workers):
    chunks = workers.draw_chunks(3, 0, 7, num_envs=16)
    assert chunks.shape == (500, 16, 4, 7)
    assert np.abs(chunks).max() <= 0.5
    assert np.array_equal(chunks, workers.draw_chunks(3, 0, 7, num_envs=16))


@pytest.mark.parametrize(("ours", "is_met"), [([95.0, 95.0], True), ([94.0, 95.9], False), ([90.0, 100.0], True)])
def test_the_mean_of_the_ratios_turn_by_turn_is_held_against_the_target(workers, ours, is_met):
    found = workers.compare({"workers": ours, "bare": [100.0, 100.0]}, "workers", "bare", "as many")
    assert (found.target, found.is_met) == (">= 0.95", is_met)


def test_workers_that_are_faster_have_a_ratio_above_1(workers):
    """By hand: 200 / 100 and 150 / 50 have the mean 2.5; that of the means would be 2.33."""
    found = workers.compare({"fast": [200.0, 150.0], "bare": [100.0, 50.0]}, "fast", "bare", "as many")
    assert found.measured == "2.50 (2.000 to 3.000 in 2 repeats)"


def test_the_part_compares_like_with_like_and_names_each_rate(workers, monkeypatch):
    rates = {"workers": [96.0], "fast": [240.0], "elsewhere": [228.0], "bare": [100.0], "single": [120.0]}
    monkeypatch.setattr(workers, "isolated", lambda *_: rates)
    part = workers.bench_workers(Settings(repeats=1, block_s=6.0))
    assert [(row.measured, row.target, row.is_met) for row in part.findings] == [
        ("0.96", ">= 0.95", True),
        ("0.80", ">= 0.95", False),
        ("2.40", "reported", True),
        ("0.95", ">= 0.98", False),
    ]
    (note,) = part.notes
    assert "96 env steps/s with `env.fast_step` off, 240 with it" in note
    assert "taken in turn as the workers do: 100 env steps/s" in note
    assert "With one simulator each: 120 env steps/s" in note
    assert "Turns of 6 s" in note


# The fast step.


class PlayedEnv:
    """The environment of `measure`: bare steps take 4 ms, fast ones 2, both a hundredfold in the first block."""

    def __init__(self, clock, is_equal):
        self.clock, self.is_equal, self.order, self.block = clock, is_equal, [], None
        self.spec = SimpleNamespace(action_dim=2)
        self.env = SimpleNamespace(step=lambda action: self.play("bare", 0.004, action))
        self.is_closed = False

    def play(self, name, seconds, action):
        self.actions.append(action)
        self.name = name
        self.clock.move(seconds * (100 if self.block == 0 else 1))

    def reset(self, block):
        self.block, self.actions = block, []

    def simulator_state(self):
        self.order.append((self.block, self.name))
        bias = 0.0 if self.is_equal or self.name == "bare" else 1e-16
        return np.array([bias, *np.concatenate(self.actions)])

    def close(self):
        self.is_closed = True


@pytest.fixture
def play(fast_step, clock, monkeypatch):
    """Return a function that measures Lift on an environment of the test."""
    monkeypatch.setattr(fast_step, "time", clock)

    def run(is_equal=True):
        env = PlayedEnv(clock, is_equal)
        fast = SimpleNamespace(step=lambda action: env.play("fast", 0.002, action))
        monkeypatch.setitem(
            sys.modules, "asyncflow.simulators.robosuite.fast_step", SimpleNamespace(FastStep=lambda _: fast)
        )
        monkeypatch.setattr(fast_step, "RobosuiteSimulator", lambda *_: env)
        return env, fast_step.measure("Lift", 3, 5, 0)

    return run


def test_milliseconds_are_those_of_a_step_without_the_first_block(play):
    env, timing = play()
    assert timing.bare_ms == pytest.approx([4.0] * 3)
    assert timing.fast_ms == pytest.approx([2.0] * 3)
    assert timing.ratio == pytest.approx(2.0)
    assert env.is_closed


def test_the_two_ways_take_turns_in_going_first_from_the_same_start(play):
    env, _ = play()
    assert env.order == [
        *((0, name) for name in ("bare", "fast")),
        *((1, name) for name in ("fast", "bare")),
        *((2, name) for name in ("bare", "fast")),
        *((3, name) for name in ("fast", "bare")),
    ]


def test_states_that_differ_at_all_are_refused(play):
    with pytest.raises(SystemExit, match="Lift: the two ways ended block 0 in different states"):
        play(is_equal=False)


def test_the_ratio_is_the_median_of_the_blocks_and_above_1_where_fast_is_faster(fast_step):
    """By hand: 2, 3 and 2 times as fast; the ratio of the medians would be 6 / 2."""
    timing = fast_step.Timing("Lift", [4.0, 6.0, 60.0], [2.0, 2.0, 30.0])
    assert timing.ratios == [2.0, 3.0, 2.0]
    assert timing.ratio == 2.0


@pytest.mark.parametrize(("bare_ms", "verdict"), [(3.0, "yes"), (2.998, "**no**")])
def test_half_as_fast_again_is_what_is_asked_for(fast_step, bare_ms, verdict):
    found = fast_step.judge(fast_step.Timing("Lift", [bare_ms], [2.0]))
    assert (found.target, found.verdict) == (">= 1.5", verdict)


def test_a_finding_tells_which_way_took_how_long(fast_step):
    found = fast_step.judge(fast_step.Timing("Can", [6.0, 8.0, 9.0], [3.0, 2.0, 4.0]))
    assert (found.what, found.measured) == ("Can: times as fast", "2.25 (2.00 to 4.00): 3.00 instead of 8.00 ms a step")


@pytest.fixture
def call(fast_step, monkeypatch, tmp_path):
    """Return a function that calls the tool on figures of the test; it returns the exit code and the page."""

    def run(fast_ms, *arguments):
        monkeypatch.setattr(sys, "argv", ["fast_step", "--out", str(tmp_path), *arguments])
        timing = lambda _, task, *__: fast_step.Timing(task, [3.0], [fast_ms.get(task, 1.0)])  # noqa: E731
        monkeypatch.setattr(fast_step, "isolated", timing)
        return fast_step.main(), (tmp_path / "pages" / "fast_step.md").read_text()

    return run


def test_one_task_that_is_too_slow_ends_with_1_and_is_on_the_page(call):
    code, page = call({"Door": 2.5})
    assert code == 1
    rows = [line for line in page.splitlines() if line.startswith("| ") and ">=" in line]
    assert [row.split(":")[0].removeprefix("| ") for row in rows] == list(MEASURED)
    assert [row for row in rows if "**no**" in row] == [row for row in rows if row.startswith("| Door:")]


def test_some_tasks_alone_do_not_become_the_documentations_page(fast_step, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fast_step", "Lift"])
    with pytest.raises(SystemExit):
        fast_step.main()
    assert "some tasks alone need --out" in capsys.readouterr().err
