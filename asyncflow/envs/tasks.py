"""The tasks that asyncflow knows by name, and environment descriptions read from files.

Owns names, horizons and default observations. It must import neither torch nor a simulator: `asyncflow tasks` and
the check of a configuration answer at once.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asyncflow.errors import CheckpointError, ConfigError
from asyncflow.plain_values import MAX_DEPTH, is_deep
from asyncflow.plugins import ENVS, plugin_names, refuse_taken_name

if TYPE_CHECKING:
    from asyncflow.config import EnvConfig

TOY, TOY_IMAGES, TOY_POINTS = "Toy", "ToyImages", "ToyPoints"
TOYS = {
    TOY: "reach a goal in the plane, in pure torch",
    TOY_IMAGES: "the same, seen by a camera from above",
    TOY_POINTS: "the same, seen as a point cloud",
}
ROBOSUITE = 1  # of robomimic's EnvType
_OTHER_SIMULATORS = {2: "gym", 3: "iGibson, of MOMART"}
_ARM_KEYS = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
_ROBOT_CAMERAS = ("robot0_robotview", "robot0_eye_in_hand")
POINTS = "points."  # before the camera, in the key of a point cloud's shape
POINT_SETTINGS = ("num_points", "point_bounds", "camera_size")  # keys of `env` with which point clouds are made
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
        **_TWO_ARMS
        | {"obs_keys": ("robot0_eef_pos", "robot0_eef_quat", "robot1_eef_pos", "robot1_eef_quat", "object")},
    ),
    "Wipe": Task(
        "Wipe",
        _HORIZON,
        "wipe the table clean",
        obs_keys=("robot0_eef_pos", "robot0_eef_quat", "object"),
        object_size=8,
        arm_obs=_ARM_OBS | {"gripper_qpos": 0, "gripper_qvel": 0, "contact": 1},
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
_BY_ENV_NAME = {task.env_name: name for name, task in TASKS.items()}


@dataclass(frozen=True)
class SimulatorSettings:
    """Everything that a simulator is built from, apart from its seed.

    Attributes:
        task: The task, or a description of one that the table lacks, from `env_meta`.
        horizon: Env steps until an episode is truncated.
        obs_keys: robomimic's names of what `state` concatenates.
        env_meta: robomimic's description; None means one built from the task.
        fast_step: Whether simulators that `FastStep` covers are stepped by it.
        cameras: robosuite's names of the cameras of which there are images.
        camera_size: Height and width of what cameras render, in pixels.
        point_clouds: robosuite's names of the cameras of which there are point clouds.
        num_points: Points of a cloud.
        point_bounds: The box that points are kept in, metres in the world: low x, y, z, then high x, y, z.
    """

    task: Task
    horizon: int
    obs_keys: tuple[str, ...]
    env_meta: dict[str, Any] | None = None
    fast_step: bool = True
    cameras: tuple[str, ...] = ()
    camera_size: tuple[int, int] = (84, 84)
    point_clouds: tuple[str, ...] = ()
    num_points: int = 1024
    point_bounds: tuple[float, ...] = (-math.inf, -math.inf, -math.inf, math.inf, math.inf, math.inf)

    @property
    def rendering_key(self) -> str | None:
        """The key of the configuration because of which something is rendered; None if nothing is."""
        if self.cameras:
            return "env.cameras"
        return "env.point_clouds" if self.point_clouds else None

    @property
    def image_shapes(self) -> dict[str, tuple[int, ...]]:
        """As `EnvSpec.image_shapes`."""
        return dict.fromkeys(self.cameras, (3, *self.camera_size))

    @property
    def point_obs_shapes(self) -> dict[str, tuple[int, ...]]:
        """The part of `EnvSpec.obs_shapes` that describes point clouds."""
        return {POINTS + camera: (self.num_points, 6) for camera in self.point_clouds}

    @property
    def point_settings(self) -> dict[str, Any]:
        """As `EnvSpec.point_settings`; lists, as JSON gives them back."""
        if not self.point_clouds:
            return {}
        values = (self.num_points, list(self.point_bounds), list(self.camera_size))
        return dict(zip(POINT_SETTINGS, values, strict=True))


def task_names() -> list[str]:
    """Return every name that `env.task` accepts."""
    return [*TOYS, *TASKS, *plugin_names(ENVS)]


def own_name(name: str) -> str:
    """Return what asyncflow calls a task that may be named as in robosuite, `PickPlaceCan`; others stay."""
    return _BY_ENV_NAME.get(name, name)


def find_task(name: str) -> Task:
    """Return a simulated task by its name.

    Raises:
        ConfigError: There is none of this name; the message names the nearest and all of them.
    """
    if own_name(name) in TASKS:
        return TASKS[own_name(name)]
    by_folded = {known.casefold(): known for known in [*_BY_ENV_NAME, *task_names()]}
    near = difflib.get_close_matches(name.casefold(), by_folded, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(by_folded[match] for match in near)}?" if near else ";"
    raise ConfigError(f"env.task = {name!r} is not a task{hint} tasks: {', '.join(task_names())}")


def name_of_env(env_meta: Any) -> str:
    """Return what `env.task` calls the environment of a description; robosuite's name where the table lacks it."""
    name = str(env_meta.get("env_name", "")) if isinstance(env_meta, dict) else ""
    return next((known for known, task in TASKS.items() if task.env_name == name), name)


def is_described(config: EnvConfig) -> bool:
    """Tell whether `resolve_task` knows what is simulated; it does not know the toys, nor tasks of other packages.

    Raises:
        ConfigError: As `is_plugin`.
    """
    return not is_plugin(config) and config.task not in TOYS


def is_plugin(config: EnvConfig) -> bool:
    """Tell whether an installed package builds the environments.

    Raises:
        ConfigError: It is not clear what is meant: the package took a name of asyncflow's own, or there is also an
            `env.env_meta`, which describes something else.
    """
    is_own = config.task in TOYS or own_name(config.task) in TASKS
    if config.env_meta is None and is_own:
        refuse_taken_name(ENVS, config.task, "env.task")
    is_other = not is_own and config.task in plugin_names(ENVS)
    if config.env_meta is not None and (is_other or config.task in TOYS):
        raise ConfigError(
            f"env.env_meta = {config.env_meta}: describes another environment than env.task = {config.task}; leave one "
            "of them out"
        )
    return is_other


def resolve_task(config: EnvConfig) -> SimulatorSettings:
    """Return what `env` describes, with the task's horizon and observations where the configuration has none.

    Raises:
        ConfigError: An unknown task, or an observation or a camera that it lacks; an `env.env_meta` that cannot be
            used, or one of an environment that the table lacks without `env.horizon`.
    """
    check_cameras(config)
    if config.env_meta is None:
        env_meta, task = None, find_task(config.task)
        _check_obs_keys(config, task)
    else:
        env_meta = load_env_meta(config.env_meta)  # only its simulator knows what it observes
        task = _task_of_meta(env_meta, config)
    obs_keys = task.obs_keys if config.obs_keys is None else tuple(config.obs_keys)
    height, width = config.camera_size
    return SimulatorSettings(
        task=task,
        horizon=config.horizon or task.horizon,
        obs_keys=obs_keys,
        env_meta=env_meta,
        fast_step=config.fast_step,
        cameras=tuple(config.cameras),
        camera_size=(height, width),
        point_clouds=tuple(config.point_clouds),
        num_points=config.num_points,
        point_bounds=tuple(config.point_bounds),
    )


def check_cameras(config: EnvConfig) -> None:
    """Refuse cameras that the task lacks, as far as that is known without a simulator.

    Raises:
        ConfigError: A camera that a task of the table lacks; a toy takes no cameras, and no history either.
    """
    if config.task in TOYS and config.env_meta is None:
        if config.cameras or config.point_clouds or config.n_obs_steps > 1:
            points = f"env.point_clouds = {config.point_clouds}, " if config.point_clouds else ""
            raise ConfigError(
                f"env.cameras = {config.cameras}, {points}env.n_obs_steps = {config.n_obs_steps}: "
                f"env.task = {config.task} takes neither cameras nor a history"
            )
    elif config.env_meta is None and is_described(config):
        available = find_task(config.task).cameras
        check_camera_names(tuple(config.cameras), available)
        check_camera_names(tuple(config.point_clouds), available, "env.point_clouds")


def check_camera_names(asked: tuple[str, ...], available: tuple[str, ...], key: str = "env.cameras") -> None:
    """Refuse cameras that are not there; `key` is where they are asked for.

    Raises:
        ConfigError: Names the first one and lists those that are there.
    """
    for name in asked:
        if name not in available:
            raise ConfigError(f"{key}: there is no camera {name!r}; cameras: {', '.join(available)}")


def _check_obs_keys(config: EnvConfig, task: Task) -> None:
    available = task.obs_sizes()
    missing = [key for key in config.obs_keys or [] if key not in available]
    if missing:
        lacking = f"{config.task} has no {', '.join(missing)}; it has {', '.join(available)}"
        raise ConfigError(f"env.obs_keys = {config.obs_keys}: {lacking}")


def _task_of_meta(env_meta: dict[str, Any], config: EnvConfig) -> Task:
    name = env_meta["env_name"]
    for task in TASKS.values():
        if task.env_name == name:
            return task
    if config.horizon is None:
        raise ConfigError(f"env.horizon = null: env.env_meta describes {name}, whose horizon is not known; set it")
    return Task(name, config.horizon, "described by env.env_meta")


def load_env_meta(path: str | Path | dict[str, Any]) -> dict[str, Any]:
    """Read robomimic's description of an environment from a JSON file, or from a dataset or checkpoint of robomimic.

    Args:
        path: The file; or the description itself, which is checked.

    Raises:
        ConfigError: The file is missing, is none of the three, or describes no robosuite environment; one line.
    """
    if not isinstance(path, str | Path):
        return check_env_meta(path, "env.env_meta")
    path, source = Path(path), f"env.env_meta = {path}"
    if not path.is_file():
        raise ConfigError(f"{source}: no such file; expected JSON, a robomimic HDF5 dataset or a robomimic checkpoint")
    if path.suffix in {".pth", ".pt"}:
        return check_env_meta(_read_checkpoint(path), source)
    text = _read_env_args(path) if path.suffix in {".hdf5", ".h5"} else path.read_text(errors="replace")
    return check_env_meta(parse_env_meta(text, source), source)


def parse_env_meta(text: Any, source: str) -> Any:
    """Return what JSON from a file holds.

    Args:
        text: An attribute of a dataset need not be text.
        source: Names the file in a refusal.

    Raises:
        ConfigError: It is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{source}: not valid JSON: {error}") from None


def check_env_meta(env_meta: Any, source: str) -> dict[str, Any]:
    """Return a description of an environment that can be simulated here.

    Raises:
        ConfigError: It is no such description, or one of another simulator than robosuite.
    """
    if not isinstance(env_meta, dict) or not {"env_name", "type", "env_kwargs"} <= env_meta.keys():
        raise ConfigError(f"{source}: expected a mapping with env_name, type and env_kwargs")
    if is_deep(env_meta):
        raise ConfigError(f"{source}: nested more than {MAX_DEPTH} deep")
    kind = env_meta["type"]
    if kind != ROBOSUITE:
        other = f" ({_OTHER_SIMULATORS[kind]})" if kind in list(_OTHER_SIMULATORS) else ""
        raise ConfigError(f"{source}: an environment of type {kind!r}{other}; allowed: {ROBOSUITE} (robosuite)")
    if not isinstance(env_meta["env_name"], str) or not isinstance(env_meta["env_kwargs"], dict):
        raise ConfigError(f"{source}: env_name must be text and env_kwargs a mapping")
    return env_meta


def _read_checkpoint(path: Path) -> dict[str, Any]:
    from asyncflow.robomimic_file import load_robomimic_file  # noqa: PLC0415  torch takes seconds to load

    try:
        return load_robomimic_file(path).env_meta
    except CheckpointError as error:
        raise ConfigError(f"env.env_meta = {error}") from None


def _read_env_args(path: Path) -> Any:
    import h5py  # noqa: PLC0415  half a second that `asyncflow tasks` need not wait for

    try:
        with h5py.File(path, "r") as file:
            return file["data"].attrs["env_args"]
    except (OSError, KeyError, RuntimeError):
        raise ConfigError(f"env.env_meta = {path}: not a robomimic dataset: no data.attrs['env_args']") from None
