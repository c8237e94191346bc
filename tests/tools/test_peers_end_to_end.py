"""The comparison of whole runs: the same chunks and env steps for everyone, and the faster peer is the one compared."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from asyncflow.simulators.spec import EnvSpec
from tools.bench.peers.settings import Settings

OPTIONS = Settings(rollout=480, updates=4, repeats=2)


@pytest.fixture(scope="module")
def runs(peers):
    return peers("bench.peers.end_to_end")


@pytest.fixture(scope="module")
def plan(peers):
    return peers("bench.peers.env").EnvPlan(fast_step=True, seed=5)


# The environment.


class CountedSimulator:
    """Pays 1 a step; the step at `success` solves the task."""

    spec = EnvSpec({"state": (19,)}, 7, 120)

    def __init__(self, settings, seed):
        self.settings, self.num_steps, self.success, self.actions, self.seeds = settings, 0, None, [], []

    def reset(self, seed):
        self.num_steps = 0
        self.seeds.append(seed)

    def step(self, action):
        self.num_steps += 1
        self.actions.append(action)
        return 1.0, self.num_steps == self.success

    def observe(self):
        return np.full(19, self.num_steps, np.float32)


@pytest.fixture
def env(peers, plan, monkeypatch):
    """Return an environment whose simulator is a `CountedSimulator`."""
    module = peers("bench.peers.env")
    monkeypatch.setattr(module, "RobosuiteSimulator", CountedSimulator)
    made = module.ChunkEnv(plan, 3)
    made.reset()
    return made


def test_one_action_of_the_peers_is_a_chunk_of_four_steps(env):
    """By hand: 1 + 0.995 + 0.990025 + 0.985074875."""
    obs, reward, terminated, truncated, info = env.step(np.arange(28, dtype=np.float32))
    assert np.array_equal(env._simulator.actions, np.arange(28).reshape(4, 7))
    assert reward == pytest.approx(3.970099875)
    assert (obs[0], terminated, truncated, info["executed"]) == (4.0, False, False, 4)


def test_a_chunk_ends_with_success_and_counts_what_was_executed(env):
    env._simulator.success = 2
    _, reward, terminated, truncated, info = env.step(np.zeros(28, np.float32))
    assert reward == pytest.approx(1.995)
    assert (terminated, truncated, info["executed"]) == (True, False, 2)


@pytest.mark.parametrize(("success", "ends"), [(None, (False, True)), (120, (True, False))])
def test_an_episode_ends_after_120_env_steps(env, success, ends):
    env._simulator.success = success
    found = [env.step(np.zeros(28, np.float32)) for _ in range(30)]
    assert [each[2:4] for each in found] == [(False, False)] * 29 + [ends]
    env.reset()
    assert env.step(np.zeros(28, np.float32))[2:4] == (False, False)


@pytest.mark.parametrize("fast_step", [False, True])
def test_the_simulator_is_the_one_of_the_plan(peers, monkeypatch, fast_step):
    module = peers("bench.peers.env")
    monkeypatch.setattr(module, "RobosuiteSimulator", CountedSimulator)
    settings = module.ChunkEnv(module.EnvPlan(fast_step, 5), 0)._simulator.settings
    assert (settings.fast_step, settings.task.env_name, settings.horizon) == (fast_step, "Lift", 120)


def test_no_two_episodes_have_the_same_start(peers, plan, monkeypatch):
    module = peers("bench.peers.env")
    monkeypatch.setattr(module, "RobosuiteSimulator", CountedSimulator)
    envs = [module.ChunkEnv(plan, index) for index in range(2)]
    for each in envs * 2:
        each.reset()
    assert len({seed for each in envs for seed in each._simulator.seeds}) == 4


# The contenders.


@pytest.mark.parametrize("fast_step", [False, True])
def test_asyncflow_runs_as_the_note_says(runs, monkeypatch, tmp_path, fast_step):
    monkeypatch.setattr(runs, "count_workers", lambda: 2)
    config = runs.make_config(runs.EnvPlan(fast_step, 5), 480, 6, tmp_path)
    algorithm, policy, env = config.algorithm, config.policy, config.env
    assert (config.trainer.buffer_type, config.max_policy_lag, config.buffer.lag_mode) == ("vla", 1, "fixed")
    assert (env.task, env.num_envs, env.num_workers, env.horizon, env.fast_step) == ("Lift", 16, 2, 120, fast_step)
    assert (policy.kind, policy.hidden_sizes, policy.critic_hidden_sizes) == ("gaussian", [256, 256], [256, 256])
    assert (policy.horizon, policy.n_action_steps, policy.initial_std, policy.checkpoint) == (4, 4, 0.5, None)
    assert (config.buffer.buffer_size, algorithm.update_epochs, algorithm.num_minibatches) == (480, 8, 4)
    assert (algorithm.target_kl, algorithm.critic_warmup_updates) == (None, 0)  # no epoch is left out
    assert config.trainer.total_updates > 6  # so that the collector works on until the last one measured
    assert config.trainer.save_interval > config.trainer.total_updates
    assert config.trainer.eval_interval == 0


def test_asyncflows_marks_are_the_clocks_of_its_updates(runs, plan, monkeypatch):
    stopped = []

    def train(config, watcher, watch):
        watch(SimpleNamespace(request_stop=lambda: stopped.append(len(watcher.rows))))
        for updates in (1, 2, 3):
            watcher.update({"wall_s": 1.5 * updates, "env_steps": 1900.0 * updates})

    monkeypatch.setattr(runs.launch, "train", train)
    assert runs.run_asyncflow(plan, 480, 3) == [(1.5, 1900), (3.0, 3800), (4.5, 5700)]
    assert stopped == [3]


@pytest.mark.parametrize(("num_envs", "num_steps"), [(16, 30), (2, 240)])
def test_stable_baselines3_has_rollouts_of_the_same_size(runs, plan, monkeypatch, num_envs, num_steps):
    learned = []

    class Env:
        def __init__(self, makers, start_method):
            self.num_envs, self.args = len(makers), (makers,)

        def close(self):
            pass

    class Learner:
        def learn(self, total, clock):
            learned.append(total)
            for second in range(4):  # the first mark is the start's, the others those of the updates
                clock.marks.append((float(second), 1000 * second))

    asked = []
    monkeypatch.setattr(runs, "SubprocVecEnv", Env)
    monkeypatch.setattr(runs, "import_simulator", lambda _: None)
    monkeypatch.setattr(runs, "make_sb3", lambda env, steps: asked.append((env.num_envs, steps)) or Learner())
    assert runs.run_sb3(plan, num_envs, 480, 3) == [(1.0, 1000), (2.0, 2000), (3.0, 3000)]
    assert (asked, learned) == ([(num_envs, num_steps)], [3 * 480])


def test_stable_baselines3s_clock_counts_executed_steps_until_each_update_ends(runs, monkeypatch):
    seconds = iter([10.0, 13.0, 17.0])
    monkeypatch.setattr(runs, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    clock = runs.UpdateClock()
    for executed in ([4, 4], [4, 1]):
        clock._on_rollout_start()
        clock.locals = {"infos": [{"executed": np.int64(each)} for each in executed]}
        assert clock._on_step()
    clock._on_training_end()
    assert clock.marks == [(10.0, 0), (13.0, 8), (17.0, 13)]


@pytest.mark.parametrize("num_workers", [2, 3, 5, 16])
def test_torchrls_workers_share_all_16_environments(peers, plan, monkeypatch, num_workers):
    """Three collected batches of 3 executed steps each are trained on, and a new policy is sent after each."""
    module, made = peers("bench.peers.torchrl"), []

    class Collector:
        def __init__(self, makers, actor, **kwargs):
            self.blocks, self.kwargs, self.num_sent, self.is_shut = [each.args[1] for each in makers], kwargs, 0, False
            made.append(self)

        def __iter__(self):
            return iter([TensorDict({("next", "executed"): torch.tensor([[2], [1]])}, [2])] * 9)

        def update_policy_weights_(self):
            self.num_sent += 1

        def shutdown(self, timeout):
            self.is_shut = True

    monkeypatch.setattr(module, "MultiAsyncCollector", Collector)
    monkeypatch.setattr(module, "TorchRLPPO", lambda size: SimpleNamespace(actor=None, update=lambda _: None))
    marks = module.run_torchrl(plan, num_workers, 480, 3)
    (collector,) = made
    assert [env for block in collector.blocks for env in block] == list(range(16))
    assert len(collector.blocks) == num_workers
    assert collector.kwargs["frames_per_batch"] == 480
    assert [env_steps for _, env_steps in marks] == [3, 6, 9]
    assert (collector.num_sent, collector.is_shut) == (2 + 1, True)


# The comparison.


def test_a_rate_is_that_of_the_updates_after_two(runs):
    """By hand: (900 - 200) env steps in 7 s; with the second update, 850 in 17 s."""
    marks = [(91.0, 50), (101.0, 200), (103.0, 500), (108.0, 900)]
    assert runs.measure_run(lambda _: marks, fast_step=True, seed=0) == 100.0


def test_a_run_is_told_its_step_and_its_seed(runs):
    plans = []
    runs.measure_run(lambda plan: plans.append(plan) or [(0.0, 0), (1.0, 1), (2.0, 2)], fast_step=False, seed=7)
    assert [(plan.fast_step, plan.seed) for plan in plans] == [(False, 7)]


def test_everyone_runs_with_both_steps_in_turn_there_and_back(runs, monkeypatch):
    calls = []

    def measure(_, run, fast_step, seed):
        calls.append((run, fast_step, seed))
        return float(len(calls))

    monkeypatch.setattr(runs, "isolated", measure)
    monkeypatch.setattr(runs, "make_runs", lambda size, num_updates: {"a": (size, num_updates), "b": "b"})
    rates = runs.measure_all(OPTIONS)
    there = [((480, 6), False), ("b", False), ((480, 6), True), ("b", True)]
    assert calls == [*((*turn, 0) for turn in there), *((*turn, 1) for turn in reversed(there))]
    assert rates == {
        ("a", False): [1.0, 8.0],
        ("b", False): [2.0, 7.0],
        ("a", True): [3.0, 6.0],
        ("b", True): [4.0, 5.0],
    }


def test_everyone_has_the_same_rollouts_and_updates(runs, monkeypatch):
    monkeypatch.setattr(runs, "count_workers", lambda: 2)
    told = {name: run.keywords for name, run in runs.make_runs(480, 6).items()}
    size = {"rollout_size": 480, "num_updates": 6}
    assert told == {
        "asyncflow (asynchronous)": size,
        "stable-baselines3": size | {"num_envs": 16},
        "stable-baselines3, few environments": size | {"num_envs": 2},
        "TorchRL": size | {"num_workers": 2},
    }


def make_rates(ours, sb3, few, torchrl):
    """Return rates of each as (with robosuite's step, with the fast one), thrice, the median in the middle."""
    names = ("asyncflow (asynchronous)", "stable-baselines3", "stable-baselines3, few environments", "TorchRL")
    pairs = zip(names, (ours, sb3, few, torchrl), strict=True)
    return {(name, fast): [pair[fast] - 90.0, pair[fast], 9e9] for name, pair in pairs for fast in (False, True)}


def test_the_faster_peer_is_chosen_for_each_step_and_faster_is_above_1(runs):
    """By hand: 600 / 400 of the few environments, 300 / 400, and 600 / 500 of TorchRL with the fast step."""
    part = runs.describe_end_to_end(make_rates((300.0, 600.0), (200.0, 450.0), (400.0, 410.0), (390.0, 500.0)), OPTIONS)
    assert [(row.measured, row.target, row.is_met) for row in part.findings] == [
        ("1.50", ">= 1.5", True),
        ("0.75", "reported", True),
        ("1.20", "reported", True),
    ]
    fast, robosuite = "`fast_step`", "robosuite's step"
    few = "stable-baselines3, few environments"
    pairs = [(fast, few, robosuite), (robosuite, few, robosuite), (fast, "TorchRL", fast)]
    for row, (ours, peer, theirs) in zip(part.findings, pairs, strict=True):
        assert row.what.endswith(f": asyncflow (asynchronous) with {ours} over {peer} with {theirs}, the faster peer")
    assert part.notes[1] == (
        "Env steps/s with robosuite's step, median and range: asyncflow (asynchronous) 300 (210 to 9000000000), "
        "stable-baselines3 200 (110 to 9000000000), stable-baselines3, few environments 400 (310 to "
        "9000000000), TorchRL 390 (300 to 9000000000)."
    )


@pytest.mark.parametrize(("ours", "is_met"), [(600.0, True), (599.0, False)])
def test_half_as_fast_again_as_the_faster_peer_is_the_target(runs, ours, is_met):
    rates = make_rates((300.0, ours), (200.0, 450.0), (400.0, 410.0), (390.0, 500.0))
    assert runs.describe_end_to_end(rates, OPTIONS).findings[0].is_met is is_met


# The call.


@pytest.fixture
def call(peers, monkeypatch, tmp_path):
    """Return a function that calls the tool on findings of the test; it returns the exit code and the page."""
    bench, report = peers("bench.peers.run"), peers("bench.common.report")
    monkeypatch.setattr(bench, "enter_environment", lambda: None)
    monkeypatch.setattr(bench, "describe_peers", lambda: "torchrl 0.14")

    def run(is_met, *arguments):
        part = report.Part([report.Finding("update", "1.19", ">= 1.2", is_met)], ["How."])
        whole = SimpleNamespace(bench_end_to_end=lambda _: report.Part([], ["Runs."]))
        monkeypatch.setitem(sys.modules, "tools.bench.peers.update", SimpleNamespace(bench_update=lambda _: part))
        monkeypatch.setitem(sys.modules, "tools.bench.peers.end_to_end", whole)
        monkeypatch.setattr(sys, "argv", ["peers", "--out", str(tmp_path), *arguments])
        return bench.main(), (tmp_path / "pages" / "peers.md").read_text()

    return run


def test_a_missed_target_is_on_the_page_and_ends_with_1(call, capsys):
    code, page = call(False)
    assert code == 1
    assert "| update | 1.19 | >= 1.2 | **no** |" in page
    assert "- Peers: torchrl 0.14\n" in page
    assert "\n- How.\n- Runs.\n" in page
    assert capsys.readouterr().out.endswith("missed: update: 1.19; target >= 1.2\n")


def test_the_page_of_a_part_alone_says_what_is_missing(call, capsys):
    code, page = call(True, "--part", "update")
    assert code == 0
    assert "Runs." not in page
    assert "not measured yet: end_to_end" in capsys.readouterr().out


def test_a_page_is_made_again_from_what_was_measured(call):
    _, page = call(True)
    assert call(False, "--page") == (0, page)  # nothing is measured: the findings are those of the first call


def test_peers_of_these_versions_are_installed_once_and_others_anew(peers, monkeypatch, tmp_path):
    setup, commands = peers("bench.peers.setup"), []
    folder = tmp_path / "peers"
    monkeypatch.setattr(setup, "FOLDER", folder)

    def pretend(command, **_):
        folder.mkdir(exist_ok=True)
        commands.append([str(part) for part in command])
        return SimpleNamespace(stdout=str(folder))

    monkeypatch.setattr(subprocess, "run", pretend)
    setup.install()
    (first,) = [command for command in commands if "pip" in command]
    assert set(setup.PACKAGES) <= set(first)
    num_commands = len(commands)
    setup.install()
    assert len(commands) == num_commands
    monkeypatch.setattr(setup, "PACKAGES", (*setup.PACKAGES[1:], "stable-baselines3==0"))
    setup.install()
    assert "stable-baselines3==0" in commands[-1]
