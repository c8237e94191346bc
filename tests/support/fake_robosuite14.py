"""Packages that stand for robosuite 1.4 and MimicGen, as far as asyncflow calls them: what they draw, no physics."""

from pathlib import Path

FILES = {
    "robosuite/__init__.py": """
__version__ = "{version}"
from robosuite.environments.base import REGISTERED_ENVS

def make(env_name, **kwargs):
    return REGISTERED_ENVS[env_name](**kwargs)
""",
    "robosuite/macros.py": "MUJOCO_GPU_RENDERING = True",
    "robosuite/controllers/__init__.py": """
def load_controller_config(default_controller):
    return {"type": default_controller}
""",
    "robosuite/robots/__init__.py": 'ROBOT_CLASS_MAPPING = {"Panda": None}',
    "robosuite/environments/__init__.py": "",
    "robosuite/environments/base.py": '''
import random
import types
import numpy as np

REGISTERED_ENVS = {}


class MujocoEnv:
    """Its `state` is what was drawn at its construction, what was drawn at the reset, and the sum of the actions."""

    observation_names = ()
    action_spec = (-np.ones(7), np.ones(7))

    def __init_subclass__(cls):
        REGISTERED_ENVS[cls.__name__] = cls

    def __init__(self, robots, controller_configs=None, control_freq=20, reward_shaping=False, has_renderer=False,
                 has_offscreen_renderer=False, use_camera_obs=False, camera_depths=False, use_object_obs=True,
                 ignore_done=False, hard_reset=True):
        assert controller_configs == {"type": "OSC_POSE"}, controller_configs
        controller = types.SimpleNamespace(control_limits=(-np.ones(6),) * 2, input_min=-np.ones(6), use_delta=True)
        model = types.SimpleNamespace(naming_prefix="robot0_")
        self.robots = [types.SimpleNamespace(controller=controller, has_gripper=True, robot_model=model,
                                             gripper=types.SimpleNamespace(dof=1, current_action=np.zeros(1)))]
        self.sim, self.size = None, np.random.rand()

    def reset(self):
        self.place = [self.size, np.random.rand(), random.random(), 0.0]
        return self.observe()

    def step(self, action):
        (gripper,) = [robot.gripper for robot in self.robots]
        self.place[3] += float(np.sum(action) + gripper.current_action[0])
        gripper.current_action = np.array(action[-1:])  # which a soft reset keeps, as that of 1.4.0 does
        return self.observe(), 0.0, False, {}

    def observe(self):
        obs = {"robot0_eef_pos": np.zeros(3), "robot0_eef_quat": np.zeros(4), "robot0_gripper_qpos": np.zeros(2)}
        return {**obs, "object-state": np.array(self.place)}

    def _check_success(self):
        return self.place[3] > 100.0

    def close(self):
        pass


class Lift(MujocoEnv):
    pass
''',
    "mimicgen/__init__.py": """
print("WARNING: robosuite task zoo environments not imported")
try:
    import mimicgen.envs.robosuite.stack
except ImportError as error:
    print("Got error", error)
""",
    "mimicgen/envs/__init__.py": "",
    "mimicgen/envs/robosuite/__init__.py": "",
    "mimicgen/envs/robosuite/stack.py": """
from robosuite.environments.base import MujocoEnv

class Stack_D0(MujocoEnv):
    pass
""",
}


def write(folder: Path, *, version: str = "1.4.1", **changes: str | None) -> None:
    """Write the packages; `changes` replace files by their path, None removes one."""
    for name, text in {**FILES, **changes}.items():
        if text is None:
            continue
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("{version}", version))
    info = folder / f"robosuite-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: robosuite\nVersion: {version}\n")
