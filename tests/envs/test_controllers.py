"""Controllers as files describe them: robosuite 1.4 and 1.5 mean what they meant; what cannot be right is one line."""

import math
import re

import pytest

from asyncflow.config.controllers import convert_controllers, find_action_limits
from asyncflow.errors import ConfigError

INF = math.inf
OSC = {
    "type": "OSC_POSE", "input_max": 1, "input_min": -1, "kp": 150, "damping": 2, "impedance_mode": "fixed",
    "output_max": [0.05, 0.05, 0.05, 0.5, 0.5, 0.5], "output_min": [-0.05, -0.05, -0.05, -0.5, -0.5, -0.5],
    "kp_limits": [0, 300], "damping_limits": [0, 10], "position_limits": None, "orientation_limits": None,
    "uncouple_pos_ori": True, "control_delta": True, "interpolation": None, "ramp_ratio": 0.2,
}  # fmt: skip
COMPOSITE = {"type": "BASIC", "body_parts": {"right": {**OSC, "input_type": "delta", "input_ref_frame": "base"}}}


def convert_one(config):
    return convert_controllers(config, ["Panda"])[0]["body_parts"]["right"]


def refused(config, num_robots=1):
    with pytest.raises(ConfigError) as error:
        convert_controllers(config, ["Panda"] * num_robots)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_arm_of_robosuite_1_4_keeps_its_frame_its_targets_and_its_damping():
    part = convert_one(OSC)
    assert (part["input_ref_frame"], part["kp"], part["gripper"]) == ("world", 150, {"type": "GRIP"})
    assert "damping_ratio" not in part  # robosuite never read the `damping` of old files
    assert convert_one(OSC | {"damping_ratio": 0.7})["damping_ratio"] == 0.7
    assert convert_one(OSC | {"control_delta": False})["input_type"] == "absolute"
    assert convert_one(OSC).get("input_type", "delta") == "delta"


def test_an_arm_of_robosuite_1_5_keeps_its_own_frame():
    assert convert_one(OSC | {"input_ref_frame": "base", "input_type": "absolute"})["input_ref_frame"] == "base"


def test_control_delta_in_a_part_of_robosuite_1_5_means_absolute_targets_in_its_own_frame():
    composite = {"type": "BASIC", "body_parts": {"right": COMPOSITE["body_parts"]["right"] | {"control_delta": False}}}
    part = convert_one(composite)
    assert (part["input_type"], part["input_ref_frame"]) == ("absolute", "base")
    assert convert_one(COMPOSITE)["input_type"] == "delta"


def test_joint_positions_have_no_control_delta_in_any_version():
    assert "input_type" not in convert_one({"type": "JOINT_POSITION", "control_delta": False})


def test_arms_that_are_nested_as_in_robosuites_files_are_found():
    assert convert_one({"type": "BASIC", "body_parts": {"arms": {"right": OSC}}})["kp"] == 150


def test_a_list_means_the_same_as_its_only_entry():
    assert convert_controllers([OSC], ["Panda"]) == convert_controllers(OSC, ["Panda"])
    assert convert_controllers([OSC, OSC], ["Panda"] * 2) == convert_controllers(OSC, ["Panda"] * 2)
    assert convert_controllers([COMPOSITE], ["Panda"]) == convert_controllers(COMPOSITE, ["Panda"])
    assert convert_controllers([None, OSC], ["Panda"] * 2)[0] is None


def test_one_description_serves_both_arms_of_a_robot_and_a_list_gives_each_its_own():
    both = convert_controllers(OSC, ["Panda"])[0]["body_parts"]
    assert both["left"] == both["right"]
    parts = convert_controllers([[OSC, OSC | {"kp": 40}]], ["Panda"])[0]["body_parts"]
    assert (parts["right"]["kp"], parts["left"]["kp"]) == (150, 40)
    assert convert_controllers([OSC, OSC | {"kp": 40}], ["Panda"])[0]["body_parts"] == parts


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (OSC | {"type": "OSC_POSES"}, "type = 'OSC_POSES' .*allowed: OSC_POSE, OSC_POSITION"),
        (OSC | {"type": "JOINT_VELOCITY"}, "no controller of an arm that robosuite 1.5 builds; allowed: OSC_POSE"),
        (OSC | {"position_limits": [[0, 0, 0], [1, 1, 1]]}, "position_limits = .* must be null"),
        (OSC | {"output_max": [0.05, 0.05, 0.05]}, r"output_max = \[0.05, 0.05, 0.05\].*a list of 6"),
        (OSC | {"kp": "150"}, "kp = '150': expected a number"),
        (OSC | {"kp_limits": 300}, "kp_limits = 300: expected the lowest and the highest"),
        (OSC | {"impedance_mode": "soft"}, "impedance_mode = 'soft'; allowed: fixed, variable_kp, variable"),
        ({"type": "IK_POSE", "control_delta": False}, "control_delta = False: .*deltas only"),
        ({"body_parts": {}}, "expected a mapping with a type"),
        ({"type": "BASIC", "body_parts": 3}, "body_parts = 3: expected a mapping"),
        ("OSC_POSE", "expected a mapping with a type"),
        ([OSC, OSC, OSC], "3 controllers for 1 robots"),
        (OSC | {"input_max": -1}, "input_max = -1 must exceed input_min = -1"),
        ({"type": "BASIC", "body_parts": {"torso": {}}}, "no arm named right; parts: torso"),
    ],
)
def test_what_cannot_be_right_is_one_line(config, said):
    assert re.search(said, refused(config))


def two_arms(arm):
    return {"type": "BASIC", "body_parts": {"right": arm, "left": arm}}


def limits(config, robots=("Panda",), action_dim=7):
    return find_action_limits(config, list(robots), action_dim)


def test_limits_are_the_controllers():
    assert limits(OSC) == limits(None) == ((-1.0,) * 7, (1.0,) * 7)
    wide = limits(OSC | {"input_max": 10, "input_min": [-10, -10, -10, -5, -5, -5]})
    assert wide == ((-10.0, -10.0, -10.0, -5.0, -5.0, -5.0, -1.0), (10.0,) * 6 + (1.0,))
    gains = limits(OSC | {"impedance_mode": "variable", "damping_ratio_limits": [0, 10]}, action_dim=19)
    assert gains == ((0.0,) * 12 + (-1.0,) * 7, (10.0,) * 6 + (300.0,) * 6 + (1.0,) * 7)
    assert limits({"type": "IK_POSE", "ik_pos_limit": 0.02, "ik_ori_limit": 0.05})[1] == (*[0.02] * 3, *[0.05] * 3, 1.0)


def test_absolute_targets_have_no_limits_but_grippers_and_gains_have():
    assert limits(OSC | {"control_delta": False}) == ((-INF,) * 6 + (-1.0,), (INF,) * 6 + (1.0,))
    gains = limits(OSC | {"control_delta": False, "impedance_mode": "variable_kp"}, action_dim=13)
    assert gains == ((0.0,) * 6 + (-INF,) * 6 + (-1.0,), (300.0,) * 6 + (INF,) * 6 + (1.0,))
    joints = {"type": "BASIC", "body_parts": {"right": {"type": "JOINT_POSITION", "input_type": "absolute"}}}
    assert limits(joints, action_dim=8) == ((-INF,) * 7 + (-1.0,), (INF,) * 7 + (1.0,))


def test_limits_of_several_arms_follow_each_other():
    absolute = OSC | {"control_delta": False}
    assert limits([OSC, absolute], ["Panda", "Panda"], 14)[1] == (1.0,) * 7 + (INF,) * 6 + (1.0,)
    assert limits(absolute, ["Baxter"], 14)[0] == ((-INF,) * 6 + (-1.0,)) * 2
    assert limits(two_arms(absolute), ["Baxter"], 14)[0] == (-INF,) * 12 + (-1.0,) * 2


def test_limits_that_only_a_simulator_knows_are_left_to_it():
    assert limits(None, ["GR1"], 24) is None
    assert limits(OSC, action_dim=5) is None
