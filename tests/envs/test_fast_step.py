"""The fast step: bit for bit robosuite's own, whatever the task, the controller and the observables; else not taken."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import mujoco
import numpy as np
import pytest
from robosuite.utils.observables import (
    Observable,
    create_deterministic_delayer,
    create_gaussian_noise_corrupter,
    sensor,
)

from asyncflow.config.sections import EnvConfig
from asyncflow.config.task_table import MEASURED, TASKS
from asyncflow.config.tasks import SimulatorSettings, resolve_task
from asyncflow.simulators.robosuite import compiled
from asyncflow.simulators.robosuite.fast_observables import ObservableClock
from asyncflow.simulators.robosuite.fast_step import FastStep
from asyncflow.simulators.robosuite.simulator import RobosuiteSimulator, build_env_meta

pytestmark = pytest.mark.sim
SEED = 3
PARTS = {
    "OSC_POSE": {},
    "OSC_POSITION": {"type": "OSC_POSITION", "output_max": [0.05] * 3, "output_min": [-0.05] * 3},
}
Policy = Callable[[int, dict[str, Any]], np.ndarray]
Seen = list[tuple[np.ndarray, dict[str, Any], float, bool]]


def build(task: str = "Lift", env_kwargs: dict[str, Any] | None = None, **part: Any) -> RobosuiteSimulator:
    """Return a simulator whose arms have a changed controller, or another one with its default arguments."""
    meta = build_env_meta(TASKS[task])
    meta["env_kwargs"] |= env_kwargs or {}
    for arm in meta["env_kwargs"]["controller_configs"]["body_parts"].values():
        if not part.get("type", "OSC").startswith("OSC"):
            arm.clear()
        arm.update({"interpolation": None, "gripper": {"type": "GRIP"}, **part})
    return RobosuiteSimulator(SimulatorSettings(TASKS[task], 400, TASKS[task].obs_keys, meta), SEED)


@pytest.fixture(scope="module")
def lift() -> Iterator[RobosuiteSimulator]:
    env = build()
    yield env
    env.close()


def random_policy(env: RobosuiteSimulator, seed: int) -> Policy:
    rng = np.random.default_rng(seed)
    return lambda _step, _obs: rng.uniform(-1, 1, env.spec.action_dim)


def reach_policy(env: RobosuiteSimulator) -> Policy:
    """Go to the first object, close the gripper, lift: it meets contacts, and in Lift it solves the task."""
    num_robots = len(env.env.robots)

    def act(step: int, obs: dict[str, Any]) -> np.ndarray:
        actions = np.zeros((num_robots, env.spec.action_dim // num_robots))
        for robot, action in enumerate(actions):
            error = obs["object-state"][:3] - obs[f"robot{robot}_eef_pos"]
            action[:3] = np.clip(10 * error, -1, 1) if step < 40 else [0, 0, 1]
            action[-1] = 1.0 if step > 30 else -1.0
        return actions.ravel()

    return act


def play(env: RobosuiteSimulator, step: Callable[..., Any], episode: int, policy: Policy, num_steps: int) -> Seen:
    """Return the simulator's state, every observation, reward and done after each step."""
    env.reset(episode)
    obs, seen = env._raw_obs, []
    for index in range(num_steps):
        obs, reward, done, _ = step(policy(index, obs))
        seen.append((env.simulator_state(), obs, reward, done))
    return seen


def assert_same(ours: Seen, theirs: Seen) -> None:
    for (our_state, our_obs, *our_rest), (their_state, their_obs, *their_rest) in zip(ours, theirs, strict=True):
        assert np.array_equal(our_state, their_state)
        assert list(our_obs) == list(their_obs)
        assert all(np.array_equal(our_obs[key], their_obs[key]) for key in their_obs)
        assert our_rest == their_rest


def assert_equal_episodes(env: RobosuiteSimulator, num_steps: int, num_episodes: int = 2) -> None:
    """Play random and scripted episodes both ways; one simulator will do, for an episode depends on its seed alone."""
    fast = FastStep(env.env)
    policies = [lambda seed=seed: random_policy(env, seed) for seed in range(num_episodes)]
    for episode, make_policy in enumerate([*policies, lambda: reach_policy(env)]):
        ours = play(env, fast.step, episode, make_policy(), num_steps)
        assert_same(ours, play(env, env.env.step, episode, make_policy(), num_steps))
        assert fast.obstacle is None


OTHERS = [pytest.param(task, marks=pytest.mark.slow) for task in TASKS if task not in MEASURED]


@pytest.mark.parametrize("task", [*MEASURED, *OTHERS])
def test_every_task_is_equal_bit_for_bit(task):
    env = build(task)
    assert_equal_episodes(env, num_steps=8, num_episodes=1)
    env.close()


@pytest.mark.parametrize(
    "part",
    [
        PARTS["OSC_POSITION"],
        {"impedance_mode": "variable"},
        {"input_type": "absolute", "input_ref_frame": "world"},
        {"kp": [150, 140, 130, 120, 110, 100]},
    ],
    ids=["OSC_POSITION", "variable impedance", "absolute", "integer gains"],
)
def test_every_covered_controller_is_equal_bit_for_bit(part):
    env = build(**part)
    assert_equal_episodes(env, num_steps=20)
    env.close()


@pytest.mark.parametrize("task", ["Lift", "Transport"])
def test_physics_that_are_not_lite_are_equal_bit_for_bit(task):
    env = build(task, {"lite_physics": False})
    assert_equal_episodes(env, num_steps=12, num_episodes=1)
    env.close()


def test_a_torque_that_is_no_number_stays_none(lift):
    """A limit in its place would hide it, and robosuite sets none."""
    commands = []
    for step in (FastStep(lift.env).step, lift.env.step):
        lift.reset(4)
        lift.env.robots[0].part_controllers["right"].kp = np.full(6, np.nan)
        step(np.zeros(7))
        commands.append(lift.env.sim.data.ctrl.copy())
    lift.reset(4)  # which builds new controllers
    assert not np.isnan(lift.env.robots[0].part_controllers["right"].kp).any()
    assert np.isnan(commands[1]).any()
    assert np.array_equal(*commands, equal_nan=True)


def test_substeps_are_compiled_where_numpy_brings_its_blas(lift):
    assert FastStep(lift.env)._compiled is not None


@pytest.mark.parametrize("missing", ["a function", "numba"])
def test_without_compiled_substeps_a_step_is_equal_bit_for_bit(missing, monkeypatch):
    changes = {"a function": ("find_functions", lambda: None), "numba": ("_run", compiled._run.py_func)}
    monkeypatch.setattr(compiled, *changes[missing])
    env = build("Transport")
    assert FastStep(env.env)._compiled is None
    assert_equal_episodes(env, num_steps=8, num_episodes=1)
    env.close()


@pytest.mark.slow
@pytest.mark.parametrize("task", MEASURED)
def test_whole_episodes_of_physics_that_are_not_lite_are_equal_bit_for_bit(task):
    env = build(task, {"lite_physics": False})
    assert_equal_episodes(env, num_steps=TASKS[task].horizon, num_episodes=1)
    env.close()


@pytest.mark.slow
@pytest.mark.parametrize("task", MEASURED)
@pytest.mark.parametrize("controller", PARTS)
def test_whole_episodes_of_every_task_and_controller_are_equal_bit_for_bit(task, controller):
    env = build(task, **PARTS[controller])
    assert_equal_episodes(env, num_steps=TASKS[task].horizon)
    env.close()


def test_a_grasp_succeeds_at_the_same_step(lift):
    fast = FastStep(lift.env)
    ours = play(lift, fast.step, 6, reach_policy(lift), 100)
    assert_same(ours, play(lift, lift.env.step, 6, reach_policy(lift), 100))
    assert any(reward == 1.0 for _, _, reward, _ in ours)


def test_steps_of_both_kinds_may_alternate(lift):
    env, turn = lift.env, iter(range(30))
    fast = FastStep(env)

    def step(action: np.ndarray) -> Any:
        return (fast.step if next(turn) % 2 else env.step)(action)

    mixed = play(lift, step, 1, random_policy(lift, 1), 30)
    assert_same(mixed, play(lift, env.step, 1, random_policy(lift, 1), 30))


def test_observations_forced_within_an_episode_leave_the_same_clock_behind(lift):
    fast = FastStep(lift.env)

    def forcing(step: Callable[..., Any]) -> Callable[..., Any]:
        def forced(action: np.ndarray) -> Any:
            lift.env._get_observations(force_update=True)
            return step(action)

        return forced

    ours = play(lift, forcing(fast.step), 2, random_policy(lift, 2), 30)
    assert_same(ours, play(lift, forcing(lift.env.step), 2, random_policy(lift, 2), 30))


def test_observables_of_different_rates_delays_and_noise_are_sampled_as_often():
    env = build()
    env.env.modify_observable("robot0_eef_pos", "sampling_rate", 50)
    env.env.modify_observable("cube_pos", "delayer", create_deterministic_delayer(0.013))
    env.env.modify_observable("cube_quat", "corrupter", create_gaussian_noise_corrupter(0.0, 0.1))
    fast, seen = FastStep(env.env), []
    for step in (fast.step, env.env.step):
        np.random.seed(0)  # robosuite's corrupters draw from the global generator
        seen.append(play(env, step, 0, random_policy(env, 0), 30))
    assert fast.obstacle is None
    assert_same(*seen)
    env.close()


@pytest.mark.parametrize("control_freq", [7, 30])
def test_a_step_may_have_another_number_of_substeps(control_freq):
    env = build(env_kwargs={"control_freq": control_freq})
    assert_equal_episodes(env, num_steps=12, num_episodes=1)
    env.close()


def test_a_hard_reset_is_noticed(lift):
    twins = [build(), build()]
    steps = [FastStep(twins[0].env).step, twins[1].env.step]
    for env in twins:
        env.env.hard_reset = True
    for _ in range(2):
        assert_same(*(play(env, step, 4, random_policy(env, 4), 5) for env, step in zip(twins, steps, strict=True)))
    for env in twins:
        env.close()


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ({"type": "JOINT_POSITION"}, "JOINT_POSITION"),
        ({"type": "IK_POSE", "ik_pos_limit": 0.02, "ik_ori_limit": 0.05}, "IK_POSE"),
        ({"interpolation": "linear"}, "OSC_POSE"),
        ({"uncouple_pos_ori": False}, "OSC_POSE"),
    ],
    ids=["joint position", "inverse kinematics", "interpolated", "coupled"],
)
def test_another_controller_takes_the_ordinary_path_and_says_so(part, name, monkeypatch):
    env = build(**part)
    fast = FastStep(env.env)
    (notice,) = env.notices
    assert re.match(
        rf"env.fast_step = true: robosuite's own step is taken, .* right arm has a controller \({name}\)", notice
    )
    monkeypatch.setattr(env.env, "step", lambda action: ("ordinary", action))
    assert fast.obstacle
    assert fast.step("action") == ("ordinary", "action")
    env.close()


def test_an_integrator_of_which_half_a_step_is_no_step_takes_the_ordinary_path(lift, monkeypatch):
    model = lift.env.sim.model._model
    monkeypatch.setattr(model.opt, "integrator", mujoco.mjtIntegrator.mjINT_RK4)
    assert FastStep(lift.env).obstacle is None
    monkeypatch.setattr(lift.env, "lite_physics", False)
    assert "RK4" in FastStep(lift.env).obstacle


def test_switching_off_a_part_takes_the_ordinary_path(lift):
    fast = FastStep(lift.env)

    def without_arm(step: Callable[..., Any]) -> Seen:
        def limp(action: np.ndarray) -> Any:
            lift.env.robots[0].enable_parts(right=False)
            return step(action)

        return play(lift, limp, 3, random_policy(lift, 3), 5)

    assert_same(without_arm(fast.step), without_arm(lift.env.step))
    assert fast.obstacle


def test_an_environment_that_has_ended_refuses_a_step(lift, monkeypatch):
    fast = FastStep(lift.env)
    monkeypatch.setattr(lift.env, "done", True)
    with pytest.raises(ValueError, match="terminated episode"):
        fast.step(np.zeros(7))


def test_nothing_of_the_environment_is_replaced(lift):
    env = lift.env
    own = {name: value for name, value in vars(env).items() if callable(value)}
    FastStep(env).step(np.zeros(7))
    assert {name: value for name, value in vars(env).items() if callable(value)} == own
    assert type(env).step.__module__ == "robosuite.environments.base"


@pytest.mark.parametrize("is_fast", [True, False])
def test_the_configuration_switches_it(is_fast):
    env = RobosuiteSimulator(resolve_task(EnvConfig(task="Lift", fast_step=is_fast)), SEED)
    assert isinstance(env._step.__self__, FastStep) == is_fast
    assert env.notices == ()
    env.close()


@pytest.mark.parametrize("sampling_rate", [20, 33, 500])
def test_a_shared_clock_samples_at_the_substeps_of_observables_that_are_asked_each_time(sampling_rate):
    samples: list[list[int]] = [[], []]
    asked, shared = (fake_env(sampling_rate, list_of_samples) for list_of_samples in samples)
    clock = ObservableClock(shared)
    clock.start()
    for substep in range(3000):
        asked.substep = shared.substep = substep
        asked._update_observables()
        clock.tick()
    clock.stop()
    assert samples[0] == samples[1]
    assert len(samples[0]) > 100
    for ours, theirs in zip(shared._observables.values(), asked._observables.values(), strict=True):
        assert ours._time_since_last_sample == theirs._time_since_last_sample
        assert ours._sampled == theirs._sampled


def fake_env(sampling_rate: float, samples: list[int]) -> SimpleNamespace:
    """Return an environment without a simulation whose two observables note when they are sampled."""
    env = SimpleNamespace(model_timestep=0.002, substep=0)

    @sensor(modality="fake")
    def note(_cache: dict[str, Any]) -> np.ndarray:
        samples.append(env.substep)
        return np.zeros(3)

    env._observables = {name: Observable(name, note, sampling_rate=sampling_rate) for name in ("first", "second")}
    samples.clear()  # observables try their sensor when they are built
    env._update_observables = lambda: [each.update(0.002, {}) for each in env._observables.values()]
    return env
