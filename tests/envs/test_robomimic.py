"""Real simulators: they build, they are quiet, they ask for success, and an episode depends on its seeds alone."""

import gc
import json
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from robomimic_wrapper import wrap
from scipy.spatial.transform import Rotation
from test_controllers import OSC
from test_journal import assert_resumes_bit_for_bit, random_chunks

from asyncflow.config.controllers import find_action_limits
from asyncflow.config.sections import EnvConfig
from asyncflow.config.task_table import MEASURED, TASKS
from asyncflow.config.tasks import resolve_task
from asyncflow.envs import make_vec_env
from asyncflow.envs.base import VecEnv
from asyncflow.errors import ConfigError
from asyncflow.seeding import derive_seed
from asyncflow.simulators.robosuite.simulator import RobosuiteSimulator

pytestmark = pytest.mark.sim
STEPS = 120


def build(task: str = "Lift", seed: int = 3, **overrides) -> RobosuiteSimulator:
    return RobosuiteSimulator(resolve_task(EnvConfig(task=task, **overrides)), seed)


@pytest.fixture(scope="module")
def in_processes() -> Iterator[VecEnv]:
    """Two environments of Lift in processes, with chunks of 4 and episodes of 10 steps; `reset` them first."""
    vec_env = make_vec_env(EnvConfig(task="Lift", horizon=10, num_workers=2), chunk_length=4, num_envs=2, seed=9)
    yield vec_env
    vec_env.close()


@pytest.fixture(scope="module")
def lift() -> Iterator[RobosuiteSimulator]:
    env = build()
    yield env
    env.close()


def grasp(env: RobosuiteSimulator, step: int) -> np.ndarray:
    """Go down to the cube, close the gripper, lift: an action that meets contacts and solves the task."""
    cube, gripper = env.observe_all()["object"][:3], env.observe_all()["robot0_eef_pos"]
    action = np.zeros(7, np.float32)
    action[:3] = np.clip(10 * (cube - gripper), -1, 1) if step < 40 else [0, 0, 1]
    action[6] = 1.0 if step > 30 else -1.0
    return action


@pytest.mark.parametrize("task", ["Lift", "TwoArmLift"])
def test_observations_and_success_are_those_of_robomimics_wrapper(task):
    ours = build(task)
    kwargs = ours.spec.env_meta["env_kwargs"] | {"seed": 3, "hard_reset": False}
    theirs = wrap(ours.spec.env_meta | {"env_kwargs": kwargs}, ours.spec.obs_keys)
    theirs.env.reset()  # as at our construction
    ours.reset(5)
    theirs.env.rng.bit_generator.state = np.random.default_rng(5).bit_generator.state
    expected = theirs.reset()
    for action in np.random.default_rng(0).uniform(-1, 1, (5, ours.spec.action_dim)):
        found = ours.observe_all()
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[key], expected[key]) for key in found)
        expected, reward, _, _ = theirs.step(action)
        assert ours.step(action) == (reward, theirs.is_success()["task"])


def play(env: RobosuiteSimulator, episode_seed: int, action_seed: int | None = 0) -> tuple[np.ndarray, list[bool]]:
    """Return everything observable and the simulator's own state after each step, and the successes."""
    rng = np.random.default_rng(action_seed)
    env.reset(episode_seed)
    seen, solved = [everything(env)], []
    for step in range(STEPS):
        random = rng.uniform(-1, 1, env.spec.action_dim).astype(np.float32)
        _, success = env.step(grasp(env, step) if action_seed is None else random)
        seen.append(everything(env))
        solved.append(success)
    return np.stack(seen), solved


def everything(env: RobosuiteSimulator) -> np.ndarray:
    obs = env.observe_all()
    return np.concatenate([env.simulator_state(), *(np.ravel(obs[key]) for key in sorted(obs))])


def test_an_episode_is_the_same_bit_for_bit_whatever_was_simulated_before(lift):
    first, _ = play(lift, 5)
    _, solved = play(lift, 6, action_seed=None)
    assert any(solved)  # the gripper held the cube, so contacts and controllers left their mark
    again, _ = play(lift, 5)
    assert np.array_equal(first, again)


def test_an_episode_is_the_same_bit_for_bit_on_a_fresh_simulator(lift):
    fresh = build()
    for action_seed in (None, 1):
        assert np.array_equal(play(lift, 8, action_seed)[0], play(fresh, 8, action_seed)[0])
    fresh.close()


def test_another_episode_seed_places_the_cube_elsewhere(lift):
    lift.reset(1)
    one = lift.observe()
    lift.reset(2)
    assert not np.array_equal(one, lift.observe())


def test_the_constructors_seed_decides_the_size_of_the_cube(lift):
    def cube_size(env: RobosuiteSimulator) -> list[float]:
        return list(env.env.cube.size)

    same, other = build(seed=3), build(seed=4)
    assert cube_size(lift) == cube_size(same) != cube_size(other)


def test_success_is_the_simulators_and_its_reward_is_sparse(lift):
    lift.reset(6)
    for step in range(STEPS):
        reward, success = lift.step(grasp(lift, step))
        assert reward == float(success)
        if success:
            return
    pytest.fail("the scripted grasp did not lift the cube")


def test_the_state_is_the_documented_concatenation(lift):
    lift.reset(0)
    obs = lift.observe_all()
    keys = ["robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object"]
    assert lift.spec.shapes("vector") == {"state": (19,)}
    assert np.array_equal(lift.observe(), np.concatenate([obs[key] for key in keys]).astype(np.float32))


def test_actions_outside_the_limits_are_clipped(lift):
    seen = []
    for scale in (1.0, 50.0):
        lift.reset(0)
        lift.step(scale * np.ones(7))
        seen.append(lift.observe())
    assert np.array_equal(*seen)


def test_an_observation_that_the_simulator_lacks_is_named():
    settings = replace(resolve_task(EnvConfig()), obs_keys=("object", "cube_colour"))
    with pytest.raises(ConfigError, match="has no cube_colour; it has object"):
        RobosuiteSimulator(settings, 3)


def test_construction_and_reset_print_nothing(capfd):
    build().reset(0)
    gc.collect()
    assert capfd.readouterr() == ("", "")


def build_described(tmp_path, controller, robots=("Panda",), env_name="Lift", **others) -> RobosuiteSimulator:
    kwargs = {"robots": list(robots), "controller_configs": controller, "control_freq": 20, **others}
    path = tmp_path / "meta.json"
    path.write_text(json.dumps({"env_name": env_name, "env_version": "1.4.1", "type": 1, "env_kwargs": kwargs}))
    return build(env_meta=str(path))


def test_a_dataset_of_robosuite_1_4_keeps_its_controller(tmp_path):
    env = build_described(tmp_path, OSC | {"damping_ratio": 0.7, "control_delta": False})
    part = env.env.robots[0].composite_controller.part_controllers["right"]
    assert env.spec.action_dim == 7
    assert (part.input_type, part.input_ref_frame) == ("absolute", "world")
    assert np.allclose(part.kd, 2 * np.sqrt(150) * 0.7)
    env.close()


def test_absolute_targets_are_executed_as_they_are(tmp_path):
    env = build_described(tmp_path, OSC | {"control_delta": False})
    env.reset(0)
    arm = env.env.robots[0].part_controllers["right"]
    arm.update(force=True)
    place, turn = arm.ref_pos.copy(), arm.ref_ori_mat.copy()
    for _ in range(20):
        env.step(np.array([*place, *Rotation.from_matrix(turn).as_rotvec(), -1.0]))
    arm.update(force=True)
    np.testing.assert_allclose(arm.ref_pos, place, atol=1e-4)
    np.testing.assert_allclose(arm.ref_ori_mat, turn, atol=1e-4)
    env.close()


def test_one_arms_description_serves_both_arms_of_a_robot(tmp_path):
    env = build_described(tmp_path, OSC | {"kp": 40}, ["Baxter"], "TwoArmLift")
    parts = env.env.robots[0].part_controllers
    assert [set(parts[arm].kp) for arm in ("right", "left")] == [{40.0}, {40.0}]
    assert env.spec.action_dim == 14
    env.close()


ABSOLUTE = OSC | {"control_delta": False}


@pytest.mark.parametrize(
    ("arms", "order"),
    [
        (ABSOLUTE, ["right", "right_gripper", "left", "left_gripper"]),
        (
            {"type": "BASIC", "body_parts": {"right": ABSOLUTE, "left": ABSOLUTE}},
            ["right", "left", "right_gripper", "left_gripper"],
        ),
    ],
)
def test_two_arms_of_a_robot_take_actions_in_the_order_of_the_robosuite_that_described_it(tmp_path, arms, order):
    env = build_described(tmp_path, arms, ["Baxter"], "TwoArmLift")
    assert list(env.env.robots[0]._action_split_indexes) == order
    assert (env.spec.action_low, env.spec.action_high) == find_action_limits(arms, ["Baxter"], 14)
    env.close()


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"robots": ["Pandaa"]}, "env.env_meta: env_kwargs.robots: robosuite has no robot 'Pandaa'; robots: Baxter"),
        ({"contrl_freq": 20}, "env_kwargs.contrl_freq: Lift takes no such keyword; did you mean control_freq"),
        ({"table_full_size": [1]}, "robosuite cannot simulate Lift with these env_kwargs: IndexError index 2"),
        ({"controller": {"type": "JOINT_POSITION", "kp": [1, 2]}}, "with these env_kwargs: ValueError operands"),
    ],
)
def test_what_robosuite_cannot_simulate_is_one_line(tmp_path, kwargs, said):
    with pytest.raises(ConfigError, match=said) as error:
        build_described(tmp_path, **{"controller": OSC} | kwargs)
    assert "\n" not in str(error.value)


PART = {key: value for key, value in OSC.items() if key != "control_delta"} | {"input_ref_frame": "base"}
DESCRIBED = {
    "wide input": OSC | {"input_max": 10, "input_min": -10},
    "gains": OSC | {"impedance_mode": "variable", "damping_ratio_limits": [0, 10]},
    "absolute part": {"type": "BASIC", "body_parts": {"right": PART | {"control_delta": False, "input_type": "delta"}}},
    "absolute joints": {"type": "BASIC", "body_parts": {"right": {"type": "JOINT_POSITION", "input_type": "absolute"}}},
    "inverse kinematics": {"type": "IK_POSE", "ik_pos_limit": 0.02, "ik_ori_limit": 0.05},
}


@pytest.mark.parametrize("controller", DESCRIBED.values(), ids=list(DESCRIBED))
def test_actions_are_limited_and_executed_as_robosuite_does(controller, tmp_path):
    env = build_described(tmp_path, controller)
    low, high = np.array(env.spec.action_low), np.array(env.spec.action_high)
    assert (env.spec.action_low, env.spec.action_high) == find_action_limits(controller, ["Panda"], env.spec.action_dim)
    is_limited, excess = np.isfinite(low), 1.0 if controller["type"] == "IK_POSE" else 1.5  # it shortens, not clips
    span = np.where(is_limited, excess * high, 0.5)
    actions = np.random.default_rng(0).uniform(np.where(is_limited, low, -0.5), span, (5, len(low)))
    states = []
    for step in (env.step, env.env.step):
        env.reset(4)
        for action in actions:
            step(action)
        states.append(env.simulator_state())
    assert np.array_equal(*states)
    env.close()


def test_every_task_of_robosuite_is_known(lift):
    from robosuite.environments.base import REGISTERED_ENVS  # noqa: PLC0415  seconds

    assert set(REGISTERED_ENVS) <= {task.env_name for task in TASKS.values()}


OTHERS = [pytest.param(task, marks=pytest.mark.slow) for task in TASKS if task not in MEASURED]


@pytest.mark.parametrize("task", [*MEASURED, *OTHERS])
def test_every_task_builds_and_steps(task):
    env = build(task)
    env.reset(0)
    reward, success = env.step(np.zeros(env.spec.action_dim))
    assert reward < 0.1  # Wipe pays for contact, the others for success alone
    assert not success
    assert np.isfinite(env.observe()).all()
    assert {key: np.size(value) for key, value in env.observe_all().items()} == TASKS[task].obs_sizes()
    assert env.spec.action_dim == TASKS[task].action_dim
    assert sum(env.spec.obs_widths) == env.spec.state_shape[0]
    env.close()


def test_make_vec_env_runs_the_same_episodes_as_a_simulator_by_itself(in_processes):
    first = in_processes.reset(5)["state"]
    actions, results = torch.full((2, 4, in_processes.spec.action_dim), 0.3), []
    for _ in range(3):
        in_processes.step_async(actions, range(2))
        results.append(in_processes.step_wait(range(2)))
    assert results[2].executed.tolist() == [2, 2]
    assert results[2].truncated.all()
    alone = build(seed=derive_seed(9, "simulator", 1))
    alone.reset(derive_seed(5, "episode", 1, 0))
    assert np.array_equal(alone.observe(), first[1].numpy())
    for _ in range(10):
        alone.step(actions[1, 0].numpy())
    assert np.array_equal(alone.observe(), results[2].final_obs["state"][1].numpy())
    alone.reset(derive_seed(5, "episode", 1, 1))
    assert np.array_equal(alone.observe(), results[2].obs["state"][1].numpy())


def test_lift_resumes_bit_for_bit_in_the_middle_of_an_episode(in_processes):
    assert_resumes_bit_for_bit(in_processes, 2 * random_chunks(7, in_processes.spec.action_dim), cut=5)
