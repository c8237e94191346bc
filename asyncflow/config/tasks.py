"""From a configuration to what is simulated: a task by its name, or a description of an environment from a file.

It must import neither torch nor a simulator: `asyncflow tasks` and
the check of a configuration answer at once.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asyncflow.config.controllers import name_robots
from asyncflow.config.env_meta import check_robots, translate_kwargs
from asyncflow.config.libero import is_libero
from asyncflow.config.observations import KINDS, asked_cameras, read_settings, rendered_fields
from asyncflow.config.plain_values import MAX_DEPTH, is_deep
from asyncflow.config.plugins import ENVS, is_named_simulator, plugin_names, refuse_taken_name
from asyncflow.config.simulator_settings import SimulatorSettings, check_camera_names
from asyncflow.config.suites import SUITES, TOY_GOALS
from asyncflow.config.task_table import BY_ENV_NAME, KNOWN, MIMICGEN, TASKS, Task, own_name
from asyncflow.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from asyncflow.config.sections import EnvConfig

TOY, TOY_IMAGES, TOY_POINTS = "Toy", "ToyImages", "ToyPoints"
TOYS = {
    TOY: "reach a goal in the plane, in pure torch",
    TOY_IMAGES: "the same, seen by a camera from above",
    TOY_POINTS: "the same, seen as a point cloud",
    **{task: f"two goals, seen by a camera from above; told: {told}" for task, told in TOY_GOALS.items()},
}
GYM = "gym:"  # before an id that gymnasium knows, as in `gym:Pendulum-v1`
ROBOSUITE = 1  # of robomimic's EnvType
_OTHER_SIMULATORS = {2: "gym", 3: "iGibson, of MOMART"}


def task_names() -> list[str]:
    """Return every name that `env.task` accepts."""
    return [*TOYS, *SUITES, *KNOWN, *plugin_names(ENVS)]


def find_task(name: str) -> Task:
    """Return a simulated task by its name.

    Raises:
        ConfigError: There is none of this name; the message names the nearest.
    """
    if own_name(name) in KNOWN:
        return KNOWN[own_name(name)]
    by_folded = {known.casefold(): known for known in [*BY_ENV_NAME, *task_names()]}
    near = difflib.get_close_matches(name.casefold(), by_folded, n=2, cutoff=0.6)
    hint = f"; did you mean {' or '.join(by_folded[match] for match in near)}?" if near else ";"
    if re.search(r"-v\d+$", name):  # as gymnasium names versions
        hint = f"; did you mean gym:{name}?"
    raise ConfigError(
        f"env.task = {name!r} is not a task{hint} `asyncflow tasks` lists them; your own simulator is module:Class"
    )


def name_of_env(env_meta: Any) -> str:
    """Return what `env.task` calls the environment of a description; robosuite's name where the table lacks it."""
    return own_name(str(env_meta.get("env_name", ""))) if isinstance(env_meta, dict) else ""


def is_described(config: EnvConfig) -> bool:
    """Tell whether `resolve_task` knows what is simulated: not toys, gymnasium's ids, LIBERO, or other packages' tasks.

    Raises:
        ConfigError: As `is_plugin`.
    """
    if config.tasks:
        return all(is_described(each) for each in config.each_task())
    return not is_plugin(config) and not _is_undescribed(config.task)


def _is_undescribed(task: str) -> bool:
    return task in TOYS or task.startswith(GYM) or is_libero(task) or is_named_simulator(task)


def is_plugin(config: EnvConfig) -> bool:
    """Tell whether an installed package builds the environments.

    Raises:
        ConfigError: It is not clear what is meant: the package took a name of asyncflow's own, or there is also an
            `env.env_meta`, which describes something else.
    """
    is_undescribed = _is_undescribed(config.task)
    is_own = is_undescribed or own_name(config.task) in KNOWN
    if config.env_meta is None and is_own:
        refuse_taken_name(ENVS, config.task, "env.task")
    is_other = not is_own and config.task in plugin_names(ENVS)
    if config.env_meta is not None and (is_other or is_undescribed):
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
        task = find_described_task(env_meta, config, "env.env_meta")
    obs_keys = task.obs_keys if config.obs_keys is None else tuple(config.obs_keys)
    height, width = config.camera_size
    return SimulatorSettings(
        task=task,
        horizon=config.horizon or task.horizon,
        obs_keys=obs_keys,
        env_meta=env_meta,
        fast_step=config.fast_step,
        rendered=rendered_fields(config),
        rendered_with=read_settings(config),
        camera_size=(height, width),
    )


def is_mimicgen(task: Task) -> bool:
    """Tell whether MimicGen simulates a task."""
    return BY_ENV_NAME.get(task.env_name) in MIMICGEN


def check_cameras(config: EnvConfig) -> None:
    """Refuse cameras that the task lacks, as far as that is known without a simulator.

    Raises:
        ConfigError: A camera that a task of the table lacks; a toy takes no cameras, and no history either.
    """
    if config.tasks:
        for each in config.each_task():
            check_cameras(each)
        return
    if config.task.startswith(GYM) and (config.cameras or config.point_clouds):
        raise ConfigError(
            f"env.cameras = {config.cameras}, env.point_clouds = {config.point_clouds}: env.task = {config.task} is "
            "observed as a vector"
        )
    if config.task in TOYS and config.env_meta is None:
        asked = [f"env.{KINDS[name].key} = {list(cameras)}, " for name, cameras in asked_cameras(config).items()]
        if asked or config.n_obs_steps > 1:
            raise ConfigError(
                f"{''.join(asked)}env.n_obs_steps = {config.n_obs_steps}: env.task = {config.task} takes neither "
                "cameras nor a history"
            )
    elif config.env_meta is None and is_described(config):
        for kind, cameras in asked_cameras(config).items():
            check_camera_names(kind, cameras, find_task(config.task).cameras)


def _check_obs_keys(config: EnvConfig, task: Task) -> None:
    available = task.obs_sizes()
    missing = [key for key in config.obs_keys or [] if key not in available]
    if missing:
        lacking = f"{config.task} has no {', '.join(missing)}; it has {', '.join(available)}"
        raise ConfigError(f"env.obs_keys = {config.obs_keys}: {lacking}")


def find_described_task(env_meta: dict[str, Any], config: EnvConfig, source: str) -> Task:
    """Return the task of a checked description, or one made of the configuration's keys where it is a package's.

    Raises:
        ConfigError: It is a package's, and `env.horizon` or `env.obs_keys` is missing.
    """
    name = env_meta["env_name"]
    if name in BY_ENV_NAME:
        task = KNOWN[BY_ENV_NAME[name]]
        has_one_robot = len(task.robots) == 2 and len(name_robots(env_meta["env_kwargs"])) == 1
        return replace(task, obs_keys=tuple(map(_name_of_bimanual, task.obs_keys))) if has_one_robot else task
    if config.horizon is None or config.obs_keys is None:
        raise ConfigError(f"{source}: asyncflow does not know {name}; set env.horizon and env.obs_keys")
    return Task(name, config.horizon, "described by a file", tuple(config.obs_keys))


def _name_of_bimanual(key: str) -> str:
    """Return what the arm of a second robot observes, in the words of one robot with two arms."""
    return key.replace("robot0_", "robot0_right_").replace("robot1_", "robot0_left_")


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
    _check_name(env_meta["env_name"], source)
    try:
        kwargs = translate_kwargs(env_meta)
        if env_meta["env_name"] in BY_ENV_NAME:
            task = KNOWN[BY_ENV_NAME[env_meta["env_name"]]]
            check_robots(kwargs, len(task.robots), task.env_name)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    return env_meta


def _check_name(name: str, source: str) -> None:
    """Refuse an environment that neither robosuite nor an installed package has, nor MimicGen."""
    if name in BY_ENV_NAME or name in plugin_names(ENVS):
        return
    near = difflib.get_close_matches(name, BY_ENV_NAME, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ";"
    known = ", ".join(task.env_name for task in TASKS.values())
    raise ConfigError(f"{source}: env_name = {name!r} is no environment of robosuite{hint} environments: {known}")


def _read_checkpoint(path: Path) -> dict[str, Any]:
    from asyncflow.config.robomimic_file import load_robomimic_file  # noqa: PLC0415  torch takes seconds to load

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
