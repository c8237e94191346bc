"""The tasks of robosuite: names, horizons, what is observed of them and where cameras stand.

Imports neither torch nor a simulator: `asyncflow tasks` and the check of a configuration answer at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_ARM_KEYS = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
_ROBOT_CAMERAS = ("robot0_robotview", "robot0_eye_in_hand")
_CAMERAS = ("frontview", "birdview", "agentview", "sideview", *_ROBOT_CAMERAS)
# What robosuite observes of a Panda, and how many numbers each is.
_ARM_OBS = {
    "eef_pos": 3, "eef_quat": 4, "eef_quat_site": 4, "gripper_qpos": 2, "gripper_qvel": 2,
    "joint_acc": 7, "joint_pos": 7, "joint_pos_cos": 7, "joint_pos_sin": 7, "joint_vel": 7,
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A simulated task.

    Attributes:
        env_name: robosuite's name of the environment.
        horizon: Env steps until an episode is truncated.
        summary: What the robot has to do.
        obs_keys: robomimic's names of what `state` concatenates.
        robots: robosuite's names of the arms.
        env_kwargs: Further arguments of `robosuite.make`.
        cameras: robosuite's names of the cameras.
        object_size: How many numbers the observation `object` has.
        arm_obs: What is observed of each arm, and how many numbers each is.
        arm_action_dim: Size of the action of one arm and its gripper.
    """

    env_name: str
    horizon: int
    summary: str
    obs_keys: tuple[str, ...] = (*_ARM_KEYS, "object")
    robots: tuple[str, ...] = ("Panda",)
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    cameras: tuple[str, ...] = _CAMERAS
    object_size: int = 0
    arm_obs: Mapping[str, int] = field(default_factory=lambda: _ARM_OBS)
    arm_action_dim: int = 7

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Task:
        """Return a task that JSON holds, as `dataclasses.asdict` describes it."""
        lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **lists})

    @property
    def action_dim(self) -> int:
        """Size of an action."""
        return self.arm_action_dim * len(self.robots)

    def obs_sizes(self) -> dict[str, int]:
        """Return what the simulator of a known task observes, by robomimic's names, and how many numbers each is."""
        arms = {f"robot{arm}_{name}": n for arm in range(len(self.robots)) for name, n in self.arm_obs.items()}
        return {"object": self.object_size, **arms}


_HORIZON = 500  # of robosuite's benchmark; tasks of robomimic's and MimicGen's datasets have theirs
_BIN_CAMERAS = ("frontview", "birdview", "agentview", *_ROBOT_CAMERAS)
_SECOND_CAMERAS = ("robot1_robotview", "robot1_eye_in_hand")
_TWO_ARMS: dict[str, Any] = {
    "obs_keys": (*_ARM_KEYS, "robot1_eef_pos", "robot1_eef_quat", "robot1_gripper_qpos", "object"),
    "robots": ("Panda", "Panda"),
    "env_kwargs": {"env_configuration": "opposed"},
}
_NO_GRIPPER = {key: size for key, size in _ARM_OBS.items() if not key.startswith("gripper")}


def _place(name: str, summary: str, object_size: int, horizon: int = _HORIZON) -> Task:
    """Return a task of the two bins, which lack a camera."""
    return Task(name, horizon, summary, cameras=_BIN_CAMERAS, object_size=object_size)


TASKS: dict[str, Task] = {
    "Lift": Task("Lift", 400, "lift a cube from the table", object_size=10),
    "Can": _place("PickPlaceCan", "move a can into its bin", 14, horizon=400),
    "Square": Task("NutAssemblySquare", 400, "put a square nut onto its peg", object_size=14),
    "Stack": Task("Stack", 400, "put the red cube onto the green one", object_size=23),
    "Door": Task("Door", 400, "turn the handle and open the door", object_size=14),
    "ToolHang": Task("ToolHang", 700, "assemble a frame and hang a tool on it", object_size=44),
    "Transport": Task(
        "TwoArmTransport",
        700,
        "two arms hand a hammer over",
        cameras=(*_CAMERAS, "shouldercamera0", "shouldercamera1", *_SECOND_CAMERAS),
        object_size=41,
        **_TWO_ARMS,
    ),
    "TwoArmLift": Task(
        "TwoArmLift",
        _HORIZON,
        "two arms lift a pot",
        cameras=(*_CAMERAS, *_SECOND_CAMERAS),
        object_size=19,
        **_TWO_ARMS,
    ),
    "TwoArmHandover": Task(
        "TwoArmHandover",
        _HORIZON,
        "one arm hands a hammer to the other",
        cameras=(*_CAMERAS, *_SECOND_CAMERAS),
        object_size=16,
        **_TWO_ARMS,
    ),
    "TwoArmPegInHole": Task(
        "TwoArmPegInHole",
        _HORIZON,
        "two arms put a peg into a hole",
        cameras=(*_CAMERAS, *_SECOND_CAMERAS),
        object_size=17,
        arm_obs=_NO_GRIPPER,
        arm_action_dim=6,
        **{
            **_TWO_ARMS,
            "obs_keys": ("robot0_eef_pos", "robot0_eef_quat", "robot1_eef_pos", "robot1_eef_quat", "object"),
        },
    ),
    "Wipe": Task(
        "Wipe",
        _HORIZON,
        "wipe the table clean",
        obs_keys=("robot0_eef_pos", "robot0_eef_quat", "object"),
        object_size=8,
        arm_obs={**_ARM_OBS, "gripper_qpos": 0, "gripper_qvel": 0, "contact": 1},
        arm_action_dim=6,
    ),
    "NutAssembly": Task("NutAssembly", _HORIZON, "put two nuts onto their pegs", object_size=28),
    "NutAssemblyRound": Task("NutAssemblyRound", _HORIZON, "put a round nut onto its peg", object_size=14),
    "NutAssemblySingle": Task("NutAssemblySingle", _HORIZON, "put one of two nuts onto its peg", object_size=15),
    "PickPlace": _place("PickPlace", "move four things into their bins", 56),
    "PickPlaceSingle": _place("PickPlaceSingle", "move one of four things into its bin", 15),
    "PickPlaceMilk": _place("PickPlaceMilk", "move a milk carton into its bin", 14),
    "PickPlaceBread": _place("PickPlaceBread", "move a loaf of bread into its bin", 14),
    "PickPlaceCereal": _place("PickPlaceCereal", "move a box of cereals into its bin", 14),
}
MEASURED = ("Lift", "Can", "Square", "Stack", "Door", "ToolHang", "Transport")  # in the pages of benchmarks


def _mimicgen(scene: str, variants: str, summary: str, object_size: int, horizon: int) -> dict[str, Task]:
    """Return the tasks of one of MimicGen's scenes: `Stack`, "D0 D1" are `stack_d0` and `stack_d1`."""
    name = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in scene).lstrip("_")
    cameras = (*_CAMERAS, "agentview_full")
    return {
        f"{name}_{variant.lower()}": Task(
            f"{scene}_{variant}", horizon, summary, object_size=object_size, cameras=cameras
        )
        for variant in variants.split()
    }


# Horizons are those of MimicGen's own evaluations. What needs robosuite's task zoo besides is not here.
MIMICGEN: dict[str, Task] = {
    **_mimicgen("Stack", "D0 D1", "put the red cube onto the green one", 23, 400),
    **_mimicgen("StackThree", "D0 D1", "put the blue cube onto the red one, and that onto the green one", 39, 400),
    "square_d0": Task("Square_D0", 400, "put a square nut onto its peg", object_size=14),
    "square_d1": Task("Square_D1", 400, "put a square nut onto its peg", object_size=17),
    **_mimicgen("Square", "D2", "put a square nut onto its peg", 17, 400),
    **_mimicgen("Threading", "D0 D1 D2", "thread a needle through the eye of a tripod", 28, 400),
    **_mimicgen("Coffee", "D0 D1 D2", "put a pod into the coffee machine and close it", 57, 400),
    **_mimicgen("CoffeePreparation", "D0 D1", "fetch mug and pod and prepare the coffee machine", 86, 800),
    **_mimicgen("ThreePieceAssembly", "D0 D1 D2", "assemble three pieces", 42, 500),
    **_mimicgen("MugCleanup", "D0 D1 O1 O2", "put a mug into the drawer and close it", 29, 500),
    "nut_assembly_d0": Task("NutAssembly_D0", 500, "put two nuts onto their pegs", object_size=28),
    "pick_place_d0": _place("PickPlace_D0", "move four things into their bins", 56, horizon=1000),
}
KNOWN = {**TASKS, **MIMICGEN}
BY_ENV_NAME = {task.env_name: name for name, task in KNOWN.items()}


def own_name(name: str) -> str:
    """Return what asyncflow calls a task that may be named as in robosuite, `PickPlaceCan`; others stay."""
    return BY_ENV_NAME.get(name, name)
