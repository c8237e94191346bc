"""The wrapper of robosuite that robomimic 0.3 has, to compare with; it imports one name of the dead `mujoco_py`."""

import sys
import types
from typing import Any

from asyncflow.simulators.robosuite.simulator import quiet


def register_mujoco_py() -> None:
    """Register a stand-in with the one exception's name."""
    if "mujoco_py" not in sys.modules:
        module, builder = types.ModuleType("mujoco_py"), types.ModuleType("mujoco_py.builder")
        builder.MujocoException = type("MujocoException", (Exception,), {})
        module.builder = builder
        sys.modules |= {"mujoco_py": module, "mujoco_py.builder": builder}


def wrap(env_meta: dict[str, Any], obs_keys: tuple[str, ...]) -> Any:
    """Build robomimic's `EnvRobosuite` from a description."""
    register_mujoco_py()
    with quiet():
        from robomimic.utils import env_utils, obs_utils  # noqa: PLC0415  seconds

        obs_utils.initialize_obs_utils_with_obs_specs({"obs": {"low_dim": list(obs_keys), "rgb": []}})
        return env_utils.create_env_from_metadata(env_meta)
