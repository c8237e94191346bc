"""How simulators of LIBERO are built, under the interpreter that has the benchmark."""

from __future__ import annotations

from asyncflow.config.libero import ARM_KEYS, list_tasks
from asyncflow.config.observations import read_settings, rendered_fields
from asyncflow.config.sections import EnvConfig
from asyncflow.config.simulator_settings import SimulatorSettings
from asyncflow.config.task_table import Task
from asyncflow.envs.worker import Recipe

SIMULATOR = "asyncflow.simulators.libero.simulator"


def find_libero(config: EnvConfig) -> Recipe:
    """Return how simulators of `env.task=libero_spatial/3` and its like are built.

    Raises:
        ConfigError: There is no such task.
    """
    (task,) = list_tasks(config.task)
    obs_keys = ARM_KEYS if config.obs_keys is None else tuple(config.obs_keys)
    height, width = config.camera_size
    settings = SimulatorSettings(
        task=Task(task.name, task.horizon, "of LIBERO", obs_keys),
        horizon=config.horizon or task.horizon,
        obs_keys=obs_keys,
        fast_step=config.fast_step,
        rendered=rendered_fields(config),
        rendered_with=read_settings(config),
        camera_size=(height, width),
    )
    arguments = {
        "settings": settings.to_json(),
        "num_steps_wait": config.num_steps_wait,
        "rotate_images": config.rotate_images,
    }
    return Recipe(f"{SIMULATOR}:build", arguments, f"{SIMULATOR}:preload", "libero")
