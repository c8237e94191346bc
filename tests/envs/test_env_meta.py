"""Keywords of environments as old files and scripts hold them: what can be translated is, the rest is one line."""

import pytest

from asyncflow.config.env_meta import check_robots, translate_kwargs
from asyncflow.errors import ConfigError

KWARGS = {"robots": ["Panda"], "control_freq": 20}


def translate(**kwargs):
    return translate_kwargs({"env_name": "Lift", "env_kwargs": KWARGS | kwargs})


@pytest.mark.parametrize(
    "habit",
    [
        {"env_name": "Lift"},  # robomimic's script for robosuite's demonstrations
        {"camera_depth": False},
        {"gripper_visualizations": True, "use_indicator_object": False},
        {"renderer": "mujoco", "renderer_config": None},
        {"render": False, "render_offscreen": False, "use_image_obs": True, "postprocess_visual_obs": False},
    ],
    ids=str,
)
def test_what_only_concerned_how_things_were_shown_is_left_out(habit):
    assert translate(**habit) == KWARGS


def test_what_was_renamed_is_called_by_its_new_name():
    assert translate(mount_types="NullMount") == KWARGS | {"base_types": "NullMount"}
    assert translate(mount_types="NullMount", base_types="default") == KWARGS | {"base_types": "default"}


def test_controllers_are_translated_for_each_robot():
    arm = {"type": "OSC_POSE", "control_delta": False}
    assert len(translate(robots=["Panda", "Panda"], controller_configs=arm)["controller_configs"]) == 2
    assert translate(controller_configs=None) == KWARGS | {"controller_configs": None}


def test_nothing_of_a_description_is_changed():
    kwargs = {"robots": "Panda", "controller_configs": {"type": "OSC_POSE"}, "mount_types": "default"}
    translate_kwargs({"env_name": "Lift", "env_kwargs": kwargs})
    assert kwargs == {"robots": "Panda", "controller_configs": {"type": "OSC_POSE"}, "mount_types": "default"}


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"env_name": "Stack"}, "env_kwargs.env_name = 'Stack': the description is of Lift"),
        ({"control_freq": "20"}, "env_kwargs.control_freq = '20': expected a number above 0, at most 500"),
        ({"control_freq": 0}, "env_kwargs.control_freq = 0: expected"),
        ({"control_freq": True}, "env_kwargs.control_freq = True: expected"),
        ({"reward_shaping": "no"}, "env_kwargs.reward_shaping = 'no': expected true or false"),
        ({"reward_scale": [1]}, r"env_kwargs.reward_scale = \[1\]: expected a number or null"),
        ({"robots": []}, r"env_kwargs.robots = \[\]: expected a robot's name"),
        ({"robots": ["Panda", 2]}, r"env_kwargs.robots = \['Panda', 2\]: expected a robot's name"),
        ({"controller_configs": {"type": "OSC"}}, "env_kwargs.controller_configs: type = 'OSC' .*allowed: OSC_POSE"),
    ],
)
def test_what_no_robosuite_could_use_is_one_line(kwargs, said):
    with pytest.raises(ConfigError, match=said) as error:
        translate(**kwargs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("robots", "num_arms", "said"),
    [("Panda", 2, "needs two robots, or one with two arms"), (["Panda", "Panda"], 1, "takes 1 at most")],
)
def test_robots_that_a_task_cannot_have_are_one_line(robots, num_arms, said):
    with pytest.raises(ConfigError, match=said):
        check_robots({"robots": robots}, num_arms, "TwoArmLift")


@pytest.mark.parametrize("robots", ["Baxter", ["Panda", "Sawyer"], "OneOfAnotherPackage"])
def test_robots_that_a_task_may_have_are_left_to_robosuite(robots):
    check_robots({"robots": robots}, 2, "TwoArmLift")
