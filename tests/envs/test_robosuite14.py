"""robosuite 1.4 itself, in an interpreter that has it: `asyncflow envs install robosuite14`, or the variable below."""

import json
import os
import subprocess
from ctypes.util import find_library

import numpy as np
import pytest
import torch
from worker_cases import tensors

from asyncflow.config.interpreters import remembered
from asyncflow.config.sections import EnvConfig
from asyncflow.envs import make_vec_env
from asyncflow.envs.workers import WorkerVecEnv
from asyncflow.errors import ConfigError
from asyncflow.seeding import derive_seed

VARIABLE = "ASYNCFLOW_ROBOSUITE14_PYTHON"
pytestmark = pytest.mark.sim
OSC_POSITION = {
    "type": "OSC_POSITION", "input_max": 1, "input_min": -1, "output_max": [0.05] * 3, "output_min": [-0.05] * 3,
    "kp": 150, "damping_ratio": 1, "impedance_mode": "fixed", "kp_limits": [0, 300], "damping_ratio_limits": [0, 10],
    "position_limits": None, "orientation_limits": None, "uncouple_pos_ori": True, "control_delta": True,
    "interpolation": None, "ramp_ratio": 0.2,
}  # fmt: skip
OWN = """
import json, sys
import numpy as np
import robosuite
kwargs, seeds, actions = json.load(sys.stdin)
np.random.seed(seeds[0])
env = robosuite.make(has_renderer=False, has_offscreen_renderer=False, use_camera_obs=False, ignore_done=True,
                     hard_reset=False, **kwargs)
np.random.seed(seeds[1])
env.reset()
obs = [env.step(np.array(action))[0] for action in actions]
keys = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object-state")
print(json.dumps([np.concatenate([each[key] for key in keys]).tolist() for each in obs]))
"""


@pytest.fixture(scope="module")
def python() -> str:
    found = os.environ.get(VARIABLE) or remembered("robosuite14")
    if found is None:
        pytest.skip(f"needs an interpreter that has robosuite 1.4: asyncflow envs install robosuite14, or {VARIABLE}")
    return found


def describe(**kwargs):
    meta = {"robots": ["Panda"], "control_freq": 20, "reward_shaping": False, **kwargs}
    return {"env_name": "Lift", "type": 1, "env_version": "1.4.1", "env_kwargs": meta}


def make(python, num_envs=1, chunk_length=4, seed=0, **keys) -> WorkerVecEnv:
    env = make_vec_env(EnvConfig(python=python, num_workers=1, **keys), chunk_length, num_envs, seed)
    assert isinstance(env, WorkerVecEnv)
    return env


def play(env, num_chunks, seed):
    generator = torch.Generator().manual_seed(seed)
    everything = range(env.num_envs)
    results = []
    for _ in range(num_chunks):
        env.step_async(torch.rand(env.num_envs, 4, env.spec.action_dim, generator=generator) * 2 - 1, everything)
        results.append(tensors(env.step_wait(everything)))
    return results


def test_an_episode_is_a_function_of_its_seed_and_its_actions(python):
    """Whatever came before it, and whatever other simulators of its process draw meanwhile."""
    with make(python, num_envs=2, horizon=12) as env:
        first = env.reset(5)["state"]
        fresh = play(env, 6, 1)  # two episodes of three chunks
        again = env.reset(5)["state"]
        assert torch.equal(first, again)
        for one, other in zip(fresh, play(env, 6, 1), strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)
        assert not torch.equal(first[0], first[1])
        assert "env.fast_step = true: robosuite's own step is taken, because robosuite is 1.4" in env.notices


def test_controllers_are_taken_as_they_are(python):
    """Equal to robosuite's own environment bit for bit, with a controller that 1.5 follows 12 mm apart."""
    kwargs = describe(controller_configs=OSC_POSITION)["env_kwargs"]
    with make(python, chunk_length=1, env_meta=describe(controller_configs=OSC_POSITION)) as env:
        env.reset(3)
        construction, episode = derive_seed(0, "simulator", 0), derive_seed(3, "episode", 0, 0)
        actions = np.random.default_rng(0).uniform(-1, 1, (30, 1, 1, env.spec.action_dim))
        states = []
        for action in actions:
            env.step_async(torch.from_numpy(action).float(), range(1))
            states.append(env.step_wait(range(1)).obs["state"][0].tolist())
        assert env.spec.action_dim == 4
        assert env.spec.env_meta["env_kwargs"]["controller_configs"] == OSC_POSITION
    seeds = [construction % 2**32, episode % 2**32]
    task = [{"env_name": "Lift", **kwargs}, seeds, np.float32(actions)[:, 0, 0].tolist()]
    done = subprocess.run([python, "-c", OWN], input=json.dumps(task), capture_output=True, text=True, check=True)
    expected = json.loads(done.stdout.splitlines()[-1])
    assert np.array_equal(np.float32(states), np.float32(expected))


def test_absolute_targets_have_no_limits(python):
    controller = {**OSC_POSITION, "control_delta": False}
    with make(python, env_meta=describe(controller_configs=controller)) as env:
        assert env.spec.action_low == (-np.inf,) * 3 + (-1.0,)


def test_a_description_of_another_robosuite_is_refused_in_one_line(python):
    controller = {"type": "BASIC", "body_parts": {"right": {"type": "OSC_POSE"}}}
    with pytest.raises(ConfigError, match=r"controller_configs: of robosuite 1.5, and this interpreter has 1.4"):
        make(python, env_meta=describe(controller_configs=controller))


def test_two_arms_act_together(python):
    with make(python, task="TwoArmLift") as env:
        assert env.spec.action_dim == 14
        env.reset(0)
        assert not play(env, 1, 0)[0]["broken"].any()


@pytest.mark.skipif(not (find_library("EGL") or find_library("OSMesa")), reason="needs EGL or OSMesa")
def test_cameras_see_the_scene(python):
    with make(python, cameras=["agentview"], camera_size=[64, 64]) as env:
        image = env.reset(0)["images", "agentview"][0]
        assert image.shape == (3, 64, 64)
        assert image.float().std() > 10
        first = play(env, 1, 0)
        env.reset(0)
        assert all(
            torch.equal(one, other) for one, other in zip(first[0].values(), play(env, 1, 0)[0].values(), strict=True)
        )
