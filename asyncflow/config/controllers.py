"""Controllers as descriptions of environments hold them: robosuite's old formats in the new one, and their limits.

Pure functions of dictionaries, which need no simulator. robosuite 1.4 described an arm (`{"type": "OSC_POSE", ...}`);
robosuite 1.5 describes a robot (`{"type": "BASIC", "body_parts": {"right": {...}}}`). robosuite's own conversion drops
whether targets are absolute, and the frame that they refer to.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Tuple

from asyncflow.errors import ConfigError

KEY = "env_kwargs.controller_configs"
ARM_TYPES = ("OSC_POSE", "OSC_POSITION", "JOINT_POSITION", "JOINT_TORQUE", "IK_POSE")  # 1.5 raises for JOINT_VELOCITY
_ARMS = ("right", "left")
_OSC_SIZES = {"OSC_POSE": 6, "OSC_POSITION": 3}
_SCALES = ("input_max", "input_min", "output_max", "output_min")
_GAINS = {"fixed": (), "variable_kp": ("kp_limits",), "variable": ("damping_ratio_limits", "kp_limits")}
_GAIN_LIMITS = {"kp_limits": (0, 300), "damping_ratio_limits": (0, 100)}  # robosuite's defaults
_DEFAULT_ARM = {"type": "OSC_POSE"}  # of robots with a fixed base
_BIMANUAL = ("Baxter",)
_ORDER_KEY = "composite_controller_specific_configs"
_OLD_ORDER = ["right", "right_gripper", "left", "left_gripper"]  # of an action; robosuite 1.5 has the grippers last
_FIXED_ROBOTS = (*_BIMANUAL, "IIWA", "Jaco", "Kinova3", "Panda", "PandaDexLH", "PandaDexRH", "Sawyer", "UR5e", "XArm7")
_MOST_JOINTS = 7
_NUM_JOINTS = {"UR5e": 6}  # the others' arms have the most

Limits = Tuple[Tuple[float, ...], Tuple[float, ...]]


def name_robots(env_kwargs: Mapping[str, Any]) -> list[str]:
    """Return robosuite's names of the robots of a description, which may name a single one by itself."""
    robots = env_kwargs.get("robots")
    return list(robots) if isinstance(robots, (list, tuple)) else [str(robots)]


def is_single_arm(robot: str) -> bool:
    """Tell whether a robot is known to have one arm only."""
    return robot in _FIXED_ROBOTS and robot not in _BIMANUAL


def convert_controllers(configs: Any, robots: Sequence[str], has_grippers: bool = True) -> list[dict[str, Any] | None]:
    """Return one composite controller of robosuite 1.5 for each robot; None means the robot's own.

    Actions keep their order: in robosuite 1.4 each arm was followed by its gripper, in 1.5 both arms by both grippers.

    Args:
        configs: One description for all robots, or a list with one for each; of robosuite 1.4 or 1.5.
        robots: robosuite's names of the robots.
        has_grippers: Whether the robots' arms end in grippers.

    Raises:
        ConfigError: robosuite could not build it, or not as its file means it.
    """
    num_robots = len(robots)
    each = configs if isinstance(configs, (list, tuple)) else [configs] * num_robots
    if len(each) != num_robots and num_robots == 1 and len(each) == len(_ARMS):
        each = [each]  # one for each arm of a robot with two
    if len(each) != num_robots:
        raise ConfigError(f"{KEY}: {len(each)} controllers for {num_robots} robots; give one, or one for each")
    order = {_ORDER_KEY: {"body_part_ordering": _OLD_ORDER}} if has_grippers else {}
    converted = []
    for robot, config in zip(robots, each):
        controller = _convert_robot(config)
        is_old = controller is not None and "body_parts" not in config
        converted.append({**controller, **order} if controller and is_old and robot in _BIMANUAL else controller)
    return converted


def _convert_robot(config: Any) -> dict[str, Any] | None:
    """Return a robot's controller; that of an arm serves both arms, and a robot with one arm ignores `left`."""
    if config is None:
        return None
    if isinstance(config, (list, tuple)) and len(config) == len(_ARMS):
        arms = dict(zip(_ARMS, map(_convert_old_arm, config)))
        return {"type": "BASIC", "body_parts": arms}
    if not isinstance(config, dict) or not isinstance(config.get("type"), str):
        raise ConfigError(f"{KEY} = {config!r}: expected a mapping with a type, or a list of them")
    if "body_parts" not in config:
        return {"type": "BASIC", "body_parts": {arm: _convert_old_arm(config) for arm in _ARMS}}
    if not isinstance(config["body_parts"], dict):
        raise ConfigError(f"{KEY}.body_parts = {config['body_parts']!r}: expected a mapping of parts")
    parts = dict(config["body_parts"])
    arms = parts.pop("arms", {})  # robosuite's files nest them; what it builds has them beside the other parts
    if not isinstance(arms, dict) or _ARMS[0] not in (parts := {**parts, **arms}):
        raise ConfigError(f"{KEY}.body_parts: there is no arm named {_ARMS[0]}; parts: {', '.join(map(str, parts))}")
    return {**config, "body_parts": {name: _convert_part(name, part) for name, part in parts.items()}}


def _convert_old_arm(arm: Any) -> dict[str, Any]:
    """Return what robosuite 1.4 described: targets are in the world's frame.

    Old files hold `damping`, too. It stays ignored: robosuite's OSC called it `damping_ratio` in every version.
    """
    return {"input_ref_frame": "world", **_convert_arm(arm)}


def _convert_part(name: str, part: Any) -> Any:
    return _convert_arm(part) if name in _ARMS else part


def _convert_arm(arm: Any) -> dict[str, Any]:
    """Return an arm with all that robosuite 1.5 reads of it; `control_delta: false`, which it ignores, is absolute."""
    _check_arm(arm)
    part = {"interpolation": None, "ramp_ratio": 0.2, "gripper": {"type": "GRIP"}, **arm}
    if arm["type"] in _OSC_SIZES and not arm.get("control_delta", True):
        part["input_type"] = "absolute"
    if arm["type"] == "IK_POSE":  # no limit is no number to robosuite, which then cannot say what its limits are
        part.update({key: math.inf for key in ("ik_pos_limit", "ik_ori_limit") if arm.get(key) is None})
    return part


def _check_arm(arm: Any) -> None:
    """Refuse an arm's controller that robosuite would not build, or whose first step would raise."""
    if not isinstance(arm, dict) or arm.get("type") not in ARM_TYPES:
        kind = arm.get("type") if isinstance(arm, dict) else arm
        raise ConfigError(
            f"{KEY}: type = {kind!r} is no controller of an arm that robosuite 1.5 builds; allowed: "
            f"{', '.join(ARM_TYPES)}"
        )
    kind = arm["type"]
    _check_values(arm)
    if kind == "IK_POSE" and not arm.get("control_delta", True):
        raise ConfigError(f"{KEY}: control_delta = False: robosuite's IK_POSE takes deltas only; use OSC_POSE")
    if kind in _OSC_SIZES:
        for key in ("position_limits", "orientation_limits"):
            if arm.get(key) is not None:
                raise ConfigError(f"{KEY}: {key} = {arm[key]}: robosuite 1.5 has none for {kind}; it must be null")
        for key in _SCALES:
            _check_numbers(arm, key, _OSC_SIZES[kind])
        _check_numbers(arm, "kp", 6)
    _check_gain_limits(arm)
    low, high = arm.get("input_min", -1), arm.get("input_max", 1)
    if any(a >= b for a, b in zip(_spread(low, _MOST_JOINTS), _spread(high, _MOST_JOINTS))):
        raise ConfigError(f"{KEY}: input_max = {high} must exceed input_min = {low}")


def _check_values(arm: dict[str, Any]) -> None:
    allowed: dict[str, tuple[Any, ...]] = {
        "impedance_mode": tuple(_GAINS),
        "input_type": ("delta", "absolute"),
        "input_ref_frame": ("world", "base"),
        "control_delta": (True, False),
        "interpolation": (None, "linear"),
    }
    for key, values in allowed.items():
        if key in arm and arm[key] not in values:
            raise ConfigError(f"{KEY}: {key} = {arm[key]!r}; allowed: {', '.join(map(str, values))}")
    for key in (*_SCALES, "kp", "damping_ratio", "ramp_ratio", "ik_pos_limit", "ik_ori_limit"):
        _check_numbers(arm, key)


def _check_numbers(arm: dict[str, Any], key: str, size: int | None = None) -> None:
    """Refuse what is neither a number nor a list of numbers, of `size` where that is known."""
    value = arm.get(key)
    if value is None or _is_number(value):
        return
    if not isinstance(value, (list, tuple)) or not all(map(_is_number, value)) or size not in (None, len(value)):
        wanted = "a list of numbers" if size is None else f"a list of {size}"
        raise ConfigError(f"{KEY}: {key} = {value!r}: expected a number or {wanted} for {arm['type']}")


def _check_gain_limits(arm: dict[str, Any]) -> None:
    for key in _GAIN_LIMITS:
        pair = arm.get(key)
        if pair is None:
            continue
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ConfigError(f"{KEY}: {key} = {pair!r}: expected the lowest and the highest")
        for bound in pair:
            _check_numbers({"type": arm["type"], key: bound}, key, 6 if arm["type"] in _OSC_SIZES else None)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def find_action_limits(configs: Any, robots: list[str], action_dim: int) -> Limits | None:
    """Return the lowest and the highest action that robosuite executes, without building it.

    Absolute targets are not limited by robosuite: theirs are infinite. None for robots that are more than arms.

    Args:
        configs: As of `convert_controllers`, which accepts it.
        robots: robosuite's names of the robots.
        action_dim: Size of an action; what the arms leave of it is the grippers'.
    """
    controllers = convert_controllers(configs, robots)
    arms: list[list[Limits]] = []
    for robot, controller in zip(robots, controllers):
        names = _ARMS if robot in _BIMANUAL else _ARMS[:1]
        parts = dict.fromkeys(names, _DEFAULT_ARM) if controller is None else controller["body_parts"]
        if robot not in _FIXED_ROBOTS or not set(names) <= parts.keys():
            return None
        arms.append([_limit_arm(parts[name], _NUM_JOINTS.get(robot, _MOST_JOINTS)) for name in names])
    each = [arm for of_robot in arms for arm in of_robot]
    num_grippers, rest = divmod(action_dim - sum(len(low) for low, _ in each), len(each))
    if rest or num_grippers < 0:
        return None
    gripper = ((-1.0,) * num_grippers, (1.0,) * num_grippers)
    limits: list[Limits] = []
    for controller, of_robot in zip(controllers, arms):
        is_old = ((controller or {}).get(_ORDER_KEY) or {}).get("body_part_ordering") == _OLD_ORDER
        grippers = [gripper] * len(of_robot)
        limits += itertools.chain(*zip(of_robot, grippers)) if is_old else [*of_robot, *grippers]
    low, high = (tuple(bound for part in limits for bound in part[side]) for side in (0, 1))
    return low, high


def _limit_arm(arm: Mapping[str, Any], num_joints: int) -> Limits:
    """Return the limits of one arm's part of an action: gains first, where they are in it, then the target."""
    size = _OSC_SIZES.get(arm["type"], num_joints)
    if arm["type"] == "IK_POSE":
        limits = (*_spread(arm["ik_pos_limit"], 3), *_spread(arm["ik_ori_limit"], 3))
        return tuple(-limit for limit in limits), limits
    is_pose = arm["type"] in (*_OSC_SIZES, "JOINT_POSITION")  # the others have neither gains nor absolute targets
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    for key in _GAINS[arm.get("impedance_mode", "fixed")] if is_pose else ():
        lowest, highest = arm.get(key) or _GAIN_LIMITS[key]
        width = 6 if arm["type"] in _OSC_SIZES else num_joints
        low, high = low + _spread(lowest, width), high + _spread(highest, width)
    if is_pose and arm.get("input_type") == "absolute":
        return low + (-math.inf,) * size, high + (math.inf,) * size
    return low + _spread(arm.get("input_min", -1), size), high + _spread(arm.get("input_max", 1), size)


def _spread(value: Any, size: int) -> tuple[float, ...]:
    return tuple(map(float, value)) if isinstance(value, (list, tuple)) else (float(value),) * size
