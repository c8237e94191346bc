"""Environments of gymnasium: spaces, seeds, ends and successes as they say; refused in one line where it cannot be."""

import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from inline_worker import work_inline
from silent import assert_equal, go_on, outcome, record, start

import asyncflow as af
from asyncflow.config.presets import load_config
from asyncflow.envs import make_vec_env
from asyncflow.envs.simulators import GymVecEnv, SimulatorVecEnv
from asyncflow.errors import ConfigError, EnvError
from asyncflow.run.evaluate_file import evaluate_checkpoint
from asyncflow.run.folder import name_run_folder
from asyncflow.seeding import derive_seed
from asyncflow.simulators.base import StepResult
from asyncflow.simulators.gym import GymSettings, GymSimulator, find_env

gymnasium = pytest.importorskip("gymnasium")

from gym_envs import CUT, DIE, END, SUCCEED, Buttons, Clock, OldFashioned, Pictures, Words  # noqa: E402

N, H, SEED, HORIZON = 3, 2, 5, 7


def simulate(make_env=Clock, horizon=HORIZON, **settings) -> GymSimulator:
    return GymSimulator(GymSettings(make_env, horizon, **settings), seed=0)


def make(num_workers=1, make_env=Clock, **arguments) -> GymVecEnv:
    return GymVecEnv(make_env, N, H, num_workers=num_workers, **{"horizon": HORIZON} | arguments)


def act(**flags) -> np.ndarray:
    names = {"end": END, "cut": CUT, "succeed": SUCCEED}
    action = np.zeros(4, np.float32)
    action[[names[name] for name in flags]] = 1.0
    return action


def step(env, actions=None, env_ids=range(N)):
    env.step_async(torch.zeros(len(env_ids), H, 4) if actions is None else actions, env_ids)
    return env.step_wait(env_ids)


def draws(seed: int) -> list[float]:
    """Return what the clock's seed draws, in the order of its observations: a, then b."""
    b0, b1, a = np.random.Generator(np.random.PCG64(seed)).uniform(size=3)
    return [float(np.float32(x)) for x in (a, b0, b1)]


def test_a_dict_is_flattened_by_name_and_its_parts_can_be_chosen():
    spec = simulate().spec
    assert (spec.obs_keys, spec.obs_widths) == (("draw.a", "draw.b", "time"), (1, 2, 1))
    assert spec.shapes("vector") == {"state": (4,)}
    assert spec.name_number(2) == "state[2] (draw.b)"
    simulator = simulate(obs_keys=["time", "draw.a"])
    simulator.reset(3)
    assert simulator.observe().tolist() == [0.0, draws(3)[0]]
    with pytest.raises(ConfigError, match=r"^obs_keys: <Clock.* observes no 'tim'; it observes draw.a, draw.b, time$"):
        simulate(obs_keys=["tim"])


def test_limits_and_horizon_are_the_environments():
    spec = simulate(horizon=None, make_env=lambda: gymnasium.wrappers.TimeLimit(Clock(), 9)).spec
    assert spec.horizon == 9
    assert (spec.action_low, spec.action_high) == ((-1.0,) * 4, (1.0, 1.0, 2.0, 1.0))
    assert simulate(make_env=lambda: gymnasium.wrappers.TimeLimit(Clock(), 9)).spec.horizon == HORIZON


def test_ends_are_gymnasiums_and_a_success_is_what_info_says():
    simulator = simulate(partial(Clock, "is_success"))
    assert simulator.spec.has_success
    simulator.reset(0)
    assert simulator.step(act()) == StepResult(0.5, False, False, False)
    assert simulator.step(act(end=True)) == StepResult(1.0, True, False, False)
    assert simulator.step(act(cut=True, succeed=True)) == StepResult(1.5, False, True, True)


def test_an_end_is_no_success_where_info_says_nothing_of_it():
    simulator = simulate()
    assert not simulator.spec.has_success
    simulator.reset(0)
    assert simulator.step(act(end=True, succeed=True)) == StepResult(0.5, True, False, False)
    named = simulate(partial(Clock, "lifted"), success_key="lifted")
    named.reset(0)
    assert named.step(act(succeed=True)).is_success


@pytest.mark.parametrize(
    ("make_env", "message"),
    [
        (Buttons, r"action_space = Discrete\(3\): expected continuous actions \(gymnasium.spaces.Box\)$"),
        (Pictures, r"observation_space = Box\(0, 255, \(8, 8, 3\), uint8\) is a picture; write a Simulator"),
        (Words, r"observation_space 'word' = Discrete\(5\): expected vectors, or a Dict of them"),
        (lambda: 3, r"^make_env returned 3; expected a gymnasium.Env, one environment and not several$"),
        (OldFashioned, r"step returned a tuple of 4: .*; expected \(obs, reward, terminated, truncated, info\)$"),
    ],
)
def test_what_cannot_be_used_is_refused_by_its_name(make_env, message):
    with pytest.raises(ConfigError, match=message) as caught:
        simulate(make_env)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("horizon", [0, -1])
def test_a_horizon_without_a_step_is_refused(horizon):
    with pytest.raises(ConfigError, match=rf"horizon has {horizon}; expected a whole number of at least 1"):
        make(make_env=lambda: gymnasium.wrappers.TimeLimit(Clock(), 9), horizon=horizon)


def test_an_environment_without_a_time_limit_needs_a_horizon():
    with pytest.raises(ConfigError, match=r"^horizon = None: <Clock.* has no time limit; set the env steps"):
        simulate(horizon=None)


def test_without_gymnasium_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ConfigError, match=r"cannot import gymnasium \(.*\); run: pip install .asyncflow\[gym\].$"):
        GymVecEnv("Pendulum-v1")


def test_an_environment_in_place_of_a_function_is_refused_in_one_line():
    with pytest.raises(ConfigError, match="expected an id, or a function that returns one environment"):
        GymVecEnv(Clock(), num_envs=1)


def test_an_id_of_gymnasium_as_a_task_is_told_its_prefix():
    with pytest.raises(ConfigError, match="did you mean gym:Pendulum-v1\\?"):
        af.make_env("Pendulum-v1")


def test_the_prefix_of_the_command_line_is_taken_too():
    with GymVecEnv("gym:Pendulum-v1", num_envs=1, n_action_steps=1) as env:
        assert env.spec.task == "gym:Pendulum-v1"


def test_an_unknown_id_is_refused_before_a_worker_starts():
    with pytest.raises(ConfigError, match=r"^gymnasium has no environment 'Pendulm-v1': .*Did you mean: `Pendulum`"):
        GymVecEnv("Pendulm-v1")
    with pytest.raises(ConfigError, match=r"^gymnasium has no environment 'no_such_package:It-v0': No module named"):
        find_env("no_such_package:It-v0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_envs": 0}, "^num_envs = 0: expected a whole number of at least 1$"),
        ({"n_action_steps": 2.5}, "^n_action_steps = 2.5: expected a whole number of at least 1$"),
        ({"num_workers": 0}, "^env.num_workers = 0: input should be greater than or equal to 1$"),
    ],
)
def test_an_argument_out_of_its_range_is_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        SimulatorVecEnv(partial(GymSimulator, GymSettings(Clock, HORIZON)), **arguments)


@pytest.fixture(scope="module")
def env():
    limit = HORIZON  # a closure, which only cloudpickle sends
    with make(2, lambda: gymnasium.wrappers.TimeLimit(Clock(), limit), horizon=None, max_restarts=3) as env:
        yield env


def test_episodes_start_from_the_seeds_of_environment_and_episode(env):
    obs = env.reset(SEED)
    for i in range(N):
        assert obs["state"][i].tolist() == [*draws(derive_seed(SEED, "episode", i, 0)), 0.0]
    actions = torch.zeros(N, H, 4)
    actions[1, 0, END] = actions[2, 1, CUT] = 1.0
    result = step(env, actions)
    assert result.obs["state"][0].tolist() == [*draws(derive_seed(SEED, "episode", 0, 0)), 2.0]
    for i in (1, 2):
        assert result.obs["state"][i].tolist() == [*draws(derive_seed(SEED, "episode", i, 1)), 0.0]


def test_the_final_observation_is_the_true_one_and_an_end_is_told_from_a_cut(env):
    env.reset(SEED)
    actions = torch.zeros(N, H, 4)
    actions[1, 0, END] = actions[2, 1, CUT] = 1.0
    result = step(env, actions)
    assert result.final_obs["state"][:, -1].tolist() == [2.0, 1.0, 2.0]
    assert result.executed.tolist() == [2, 1, 2]
    assert result.rewards.tolist() == [[0.5, 1.0], [0.5, 0.0], [0.5, 1.0]]
    assert (result.terminated.tolist(), result.truncated.tolist()) == ([False, True, False], [False, False, True])
    assert not result.is_success.any()
    for _ in range(2):
        assert not step(env).truncated[0]
    result = step(env)
    assert (result.truncated[0], result.episode_length[0], result.final_obs["state"][0, -1]) == (True, HORIZON, 7.0)


def test_a_journal_rebuilds_open_episodes(env):
    env.reset(SEED)
    actions = torch.zeros(N, H, 4)
    actions[1, 0, END] = 1.0
    result = step(env, actions)
    journal, expected = env.journal(), step(env).obs["state"]
    assert torch.equal(env.reset(SEED, journal)["state"], result.obs["state"])
    assert torch.equal(step(env).obs["state"], expected)


def test_an_environment_that_dies_costs_its_episodes_alone(env):
    env.reset(SEED)
    actions = torch.zeros(N, H, 4)
    actions[0, 0, DIE] = 1.0
    result = step(env, actions)
    assert result.broken.tolist() == [True, False, False]  # two workers: environment 0, and the other two
    assert [fault.kind for fault in result.faults] == ["died"]
    assert result.obs["state"][0].tolist() == [*draws(derive_seed(SEED, "episode", 0, 1)), 0.0]
    assert result.obs["state"][1, -1] == 2.0


def test_a_script_needs_no_guard_and_its_own_classes_reach_the_workers(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import gymnasium, torch\n"
        "from gym_envs import Clock\n"
        "from asyncflow.envs.simulators import GymVecEnv\n"
        "print('begins')\n"
        "class Mine(Clock):\n"
        "    def step(self, action):\n"
        "        return *super().step(action)[:1], 42.0, False, False, {}\n"
        "env = GymVecEnv(lambda: Mine(), num_envs=2, n_action_steps=1, num_workers=1, horizon=5)\n"
        "env.reset(0)\n"
        "env.step_async(torch.zeros(2, 1, 4), range(2))\n"
        "print(env.step_wait(range(2)).rewards.tolist())\n"
        "env.close()\n"
    )
    paths = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=paths, timeout=120, check=False)
    assert done.stdout == "begins\n[[42.0], [42.0]]\n", done.stderr  # once: no worker runs the script


def test_an_environment_that_cannot_be_made_is_an_error():
    with pytest.raises(EnvError, match="ZeroDivisionError"):
        make(1, lambda: 1 / 0)


PENDULUM = {
    "env.task": "gym:Pendulum-v1",
    "env.num_envs": 4,
    "env.horizon": 20,
    "buffer.buffer_size": 64,
    "algorithm.num_minibatches": 2,
    "algorithm.update_epochs": 2,
    "trainer.device": "cpu",
    "trainer.total_env_steps": None,
    "trainer.total_updates": 4,
    "trainer.save_interval": 2,
    "trainer.eval_interval": 2,
    "trainer.eval_episodes": 4,
    "logging.logger": "none",
}


@pytest.fixture
def inline(monkeypatch):
    work_inline(monkeypatch)


@pytest.mark.usefixtures("inline")
def test_both_modes_end_equal(tmp_path):
    changes = PENDULUM | {"buffer.max_policy_lag": 1}
    first, second = (
        record(tmp_path / kind, "gym", changes | {"trainer.buffer_type": kind}) for kind in ("vla", "standard")
    )
    for mine, theirs in zip(first[0], second[0], strict=True):
        assert torch.equal(mine, theirs)
    assert first[2] == second[2]
    assert first[2][-1]["rollout/episode_return"] < 0  # which the pendulum pays
    assert "eval/episode_return" in first[2][-1]
    assert not any("success" in name for name in first[2][-1])


@pytest.mark.usefixtures("inline")
def test_a_cut_and_resumed_run_equals_the_uncut_one_on_the_pendulum(tmp_path):
    changes = PENDULUM | {"trainer.buffer_type": "vla"}
    start(tmp_path / "uncut", "gym", changes)
    start(tmp_path / "cut", "gym", changes, stop_at=2)
    go_on(tmp_path / "cut")
    assert_equal(outcome(tmp_path / "uncut"), outcome(tmp_path / "cut"))
    assert (tmp_path / "cut" / "checkpoints" / "best").exists()  # by its return


@pytest.mark.usefixtures("inline")
def test_a_checkpoint_names_its_task_and_is_evaluated_there(tmp_path):
    start(tmp_path / "run", "gym", PENDULUM | {"trainer.total_updates": 1, "trainer.eval_interval": 0})
    result = evaluate_checkpoint(str(tmp_path / "run"), load_config("toy", {"env.num_envs": 2}), 3)
    assert (result.num_episodes, result.episode_length, result.has_success) == (3, 20.0, False)
    assert result.episode_return < 0


def test_actions_without_limits_are_decided_in_the_environments_units():
    class Free(Clock):
        action_space = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float32)

    policy = af.make_policy("gaussian", simulate(Free).spec, log_prob="joint_sum")
    assert policy.action_normalizer.scale.tolist() == [1.0] * 4
    assert policy.action_normalizer.offset.tolist() == [0.0] * 4


def test_a_module_in_a_task_of_a_file_is_not_imported():
    config = load_config("gym", {"env.task": "gym:this:It-v0"})
    with pytest.raises(ConfigError, match=r"^env.task = gym:this:It-v0: expected an id that an installed package"):
        make_vec_env(config.env, 1, 1, 0)
    assert "this" not in sys.modules


def test_an_id_is_no_folder():
    assert name_run_folder(load_config("gym", {"env.task": "gym:A/B-v0"})).parts[1].startswith("gym-A-B-v0_vla_seed0_")


@pytest.mark.parametrize("key", ["env.cameras", "env.point_clouds"])
def test_cameras_are_refused(key, tmp_path):
    with pytest.raises(ConfigError, match=r"env.task = gym:Pendulum-v1 is observed as a vector$"):
        start(tmp_path / "run", "gym", PENDULUM | {key: ["agentview"]})


def test_a_description_of_another_environment_is_refused(tmp_path):
    meta = {"env_name": "Lift", "type": 1, "env_kwargs": {"robots": ["Panda"]}}
    with pytest.raises(ConfigError, match=r"env\.task = gym:Pendulum-v1; leave one of them out"):
        start(tmp_path / "run", "gym", PENDULUM | {"env.env_meta": meta})
