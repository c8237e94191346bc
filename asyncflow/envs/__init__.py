"""Environments: the contract (`base`), simulators in worker processes (`workers`), a toy.

Importing this package loads neither torch nor a simulator; the modules that need them are imported when an
environment is built.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from asyncflow.caches import prepare_caches
from asyncflow.config.libero import is_libero
from asyncflow.config.plugins import is_named_simulator
from asyncflow.config.tasks import GYM, TOYS, is_mimicgen, is_plugin, resolve_task, task_names
from asyncflow.errors import ConfigError

if TYPE_CHECKING:
    from asyncflow.config.sections import EnvConfig
    from asyncflow.envs.base import VecEnv
    from asyncflow.envs.worker import Recipe

__all__ = ["make_vec_env", "task_names"]


def make_vec_env(config: EnvConfig, chunk_length: int, num_envs: int, seed: int) -> VecEnv:
    """Build the environments of `config.task` or `config.tasks`; waits until every simulator is constructed.

    Args:
        config: What is simulated. Its `num_envs` is not read: evaluation asks for a number of its own.
        chunk_length: Actions of a chunk, H.
        num_envs: Environments, N.
        seed: Environment i is constructed from `derive_seed(seed, "simulator", i)`.

    Raises:
        ConfigError: An unknown task, or an `env.env_meta` that cannot be used; the message is one line.
        EnvError: A simulator could not be constructed.
    """
    tasks = {each.task: each for each in config.each_task()}
    if any(is_plugin(each) for each in tasks.values()):
        if config.tasks:
            raise ConfigError(f"env.tasks = {config.tasks}: what a package registers as environments stands by itself")
        from asyncflow.envs.checked_env import build_registered  # noqa: PLC0415

        return build_registered(config, chunk_length, num_envs, seed)
    if all(task in TOYS for task in tasks):
        from asyncflow.envs.toy import ToyVecEnv  # noqa: PLC0415  keeps torch out of the package's import

        if config.python is not None:
            raise ConfigError(f"env.python = {config.python}: {', '.join(tasks)} is simulated here; leave it out")
        return ToyVecEnv(num_envs, chunk_length, config.horizon, list(tasks))
    from asyncflow.envs.workers import WorkerVecEnv  # noqa: PLC0415

    recipes = {task: _find_recipe(each, is_alone=not config.tasks) for task, each in tasks.items()}
    return WorkerVecEnv(recipes if config.tasks else recipes[config.task], config, num_envs, chunk_length, seed)


def _find_recipe(config: EnvConfig, is_alone: bool) -> Recipe:
    """Return how simulators of one task are built; of several, each is told what it is about."""
    if config.task in TOYS:
        raise ConfigError(f"env.tasks: {config.task} is a toy; toys can be spread over with other toys alone")
    if config.task.startswith(GYM):
        from asyncflow.envs.simulators import find_gym  # noqa: PLC0415

        return find_gym(config)
    if is_named_simulator(config.task):
        from asyncflow.envs.simulators import find_named  # noqa: PLC0415

        return find_named(config)
    if is_libero(config.task):
        from asyncflow.envs.libero import find_libero  # noqa: PLC0415

        return find_libero(config)
    settings = resolve_task(config)
    prepare_caches()  # here, so that it is told once and not by every worker
    if not is_alone:
        settings = replace(settings, instruction=settings.task.summary)

    from asyncflow.envs.worker import Recipe  # noqa: PLC0415

    kind, simulator = "robosuite", "asyncflow.simulators.robosuite.simulator"
    if is_mimicgen(settings.task):
        kind, simulator = "mimicgen", "asyncflow.simulators.robosuite.mimicgen"
    return Recipe(f"{simulator}:build", {"settings": settings.to_json()}, f"{simulator}:preload", kind)
