"""Descriptions of environments in the words of today's robosuite, whichever version or script wrote them.

Pure functions of dictionaries, which need no simulator. What an older robosuite called otherwise is renamed, what only
concerned how something was shown is left out, and what cannot be right is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asyncflow.config.controllers import convert_controllers, is_single_arm, name_robots
from asyncflow.errors import ConfigError

_RENAMED = {"mount_types": "base_types"}  # since robosuite 1.5
_UNUSED = (
    # robomimic's script writes it beside the description's own
    "env_name",
    # how older robosuites showed grippers, targets and windows
    "camera_depth", "gripper_visualization", "gripper_visualizations", "indicator_configs", "use_indicator_object",
    "renderer", "renderer_config",
    # arguments of robomimic's wrapper, which asyncflow gives itself
    "postprocess_visual_obs", "render", "render_offscreen", "use_image_obs",
)  # fmt: skip
_MAX_CONTROL_FREQ = 500  # Hz: one step of the simulation an action
_FLAGS = ("lite_physics", "reward_shaping", "use_camera_obs", "use_object_obs")


def translate_kwargs(env_meta: Mapping[str, Any], *, is_converted: bool = True) -> dict[str, Any]:
    """Return the keywords with which robosuite builds a description's environment.

    Args:
        env_meta: Has `env_name`, text, and `env_kwargs`, a mapping.
        is_converted: Whether it is put into the words of robosuite 1.5; else it stays in those of 1.4.

    Raises:
        ConfigError: A keyword that no robosuite could use, as far as that is known without it.
    """
    given = env_meta["env_kwargs"]
    if given.get("env_name", env_meta["env_name"]) != env_meta["env_name"]:
        raise ConfigError(f"env_kwargs.env_name = {given['env_name']!r}: the description is of {env_meta['env_name']}")
    names = _RENAMED if is_converted else {}
    renamed = {new: given[old] for old, new in names.items() if old in given}
    kwargs = {**renamed, **{key: value for key, value in given.items() if key not in (*_UNUSED, *names)}}
    _check_types(kwargs)
    if is_converted and kwargs.get("controller_configs") is not None:
        has_grippers = kwargs.get("gripper_types", "default") is not None
        kwargs["controller_configs"] = convert_controllers(
            kwargs["controller_configs"], name_robots(kwargs), has_grippers
        )
    return kwargs


def check_robots(env_kwargs: Mapping[str, Any], num_arms: int, env_name: str) -> None:
    """Refuse robots whose arms a task cannot have; a robot that is not known is left to robosuite.

    Raises:
        ConfigError: One arm for two, or two robots for one arm.
    """
    robots = name_robots(env_kwargs)
    if "robots" not in env_kwargs:
        return
    if num_arms == 2 and len(robots) == 1 and is_single_arm(robots[0]):
        raise ConfigError(f"env_kwargs.robots = {robots}: {env_name} needs two robots, or one with two arms")
    if len(robots) > num_arms:
        raise ConfigError(f"env_kwargs.robots = {robots}: {env_name} takes {num_arms} at most")


def _check_types(kwargs: Mapping[str, Any]) -> None:
    for key in kwargs:
        if not isinstance(key, str):
            raise ConfigError(f"env_kwargs: the keyword {key!r} must be text")
    robots = kwargs.get("robots", "")
    names = robots if isinstance(robots, (list, tuple)) and robots else [robots]
    if not all(isinstance(name, str) for name in names):
        raise ConfigError(f"env_kwargs.robots = {robots!r}: expected a robot's name, or a list of them")
    freq = kwargs.get("control_freq", 20)
    if not _is_number(freq) or not 0 < freq <= _MAX_CONTROL_FREQ:
        raise ConfigError(f"env_kwargs.control_freq = {freq!r}: expected a number above 0, at most {_MAX_CONTROL_FREQ}")
    scale = kwargs.get("reward_scale")
    if scale is not None and not _is_number(scale):
        raise ConfigError(f"env_kwargs.reward_scale = {scale!r}: expected a number or null")
    for key in _FLAGS:
        if not isinstance(kwargs.get(key, False), bool):
            raise ConfigError(f"env_kwargs.{key} = {kwargs[key]!r}: expected true or false")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
