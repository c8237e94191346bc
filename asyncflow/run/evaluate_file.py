"""Evaluates a policy file in the environment that it carries, whatever preset it was trained with.

`asyncflow eval` calls it; no run folder is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from asyncflow.config.observations import read_cameras, read_sizes
from asyncflow.config.sections import Config, EnvConfig
from asyncflow.config.tasks import TOYS
from asyncflow.devices import resolve_device
from asyncflow.envs import make_vec_env
from asyncflow.envs.base import VecEnv
from asyncflow.envs.mapping import map_names
from asyncflow.envs.source import read_description
from asyncflow.errors import CheckpointError, ConfigError
from asyncflow.policies import make_policy
from asyncflow.policies.policy_file import PolicyFile, load_into, load_policy_file, resolve_checkpoint
from asyncflow.policies.vla.foreign import without_weights
from asyncflow.run.evaluate import EvalResult, evaluate
from asyncflow.run.footprint import check_environments
from asyncflow.seeding import derive_seed
from asyncflow.simulators.spec import EnvSpec


def evaluate_checkpoint(
    checkpoint: str, config: Config, num_episodes: int, on_progress: Callable[[int], None] = lambda _: None
) -> EvalResult:
    """Run exactly `num_episodes` episodes, none of which a run evaluates itself on.

    A run chooses its best checkpoint by its own evaluations, so on the same episodes it would look better than it is.

    Args:
        checkpoint: A run, a checkpoint folder, a policy file or shipped weights.
        config: Supplies the seed, the device, the number of environments and of workers; the rest is the file's.
        num_episodes: Episodes to run.
        on_progress: Called before every decision with the number of finished episodes.

    Raises:
        ConfigError: The checkpoint or the device does not exist, or its `policy.mapping` does not fit its environment.
        EnvError: A simulator failed.
    """
    file = load_policy_file(resolve_checkpoint(checkpoint))
    device = resolve_device(config.trainer.device)
    torch.set_num_threads(config.trainer.num_threads)
    config_to_load = without_weights(file.policy_config)
    num_envs = min(config.env.num_envs, num_episodes)
    if num_envs < (num_tasks := len(file.env_spec.task_table)):
        raise ConfigError(f"{file.path}: made for {num_tasks} tasks; needs as many episodes and environments at least")
    check_environments(num_envs, file.env_spec, is_simulated=bool(file.env_spec.env_meta))
    num_stored = sum(tensor.numel() for tensor in file.tensors.values())
    policy = make_policy(config_to_load, file.mapping.spec, config.trainer.seed, num_stored=num_stored)
    load_into(policy, file)
    seed = derive_seed(config.trainer.seed, "report")
    built = _rebuild_env(file, config, num_envs, derive_seed(seed, "evaluation"))
    try:
        _check_same(built, file)
        env = map_names(built, file.mapping)
        return evaluate(policy.to(device), env, num_episodes, seed, on_progress)
    finally:
        built.close()


def _rebuild_env(file: PolicyFile, config: Config, num_envs: int, seed: int) -> VecEnv:
    """Build the environment that a policy file describes, with its own controller, observations and horizon.

    Raises:
        CheckpointError: The file does not say which environment that is, or the one of its name has become another.
    """
    spec, chunk_length = file.env_spec, file.policy_config.n_action_steps
    if spec.tasks:
        return _rebuild_spread(spec, config, chunk_length, num_envs, seed)
    if spec.task in TOYS:
        return make_vec_env(EnvConfig(task=spec.task, horizon=spec.horizon), chunk_length, num_envs, seed)
    if not spec.task and not spec.env_meta:
        raise CheckpointError(
            f"{file.path}: names no environment to evaluate it in: neither a task (EnvSpec.task, the name that a "
            "package registered) nor an env_meta"
        )
    changes: dict[str, Any] = {"horizon": spec.horizon, "obs_keys": list(spec.obs_keys) or None}
    changes |= {"n_obs_steps": spec.n_obs_steps} | read_cameras(spec.obs) | spec.rendered_with | read_sizes(spec.obs)
    if spec.task:
        changes |= {"task": spec.task, "env_meta": None}
        return make_vec_env(config.env.model_copy(update=changes), chunk_length, num_envs, seed)
    # The default task, in whose place env_meta stands.
    changes |= {"task": EnvConfig().task, "env_meta": read_description(spec)}
    return make_vec_env(config.env.model_copy(update=changes), chunk_length, num_envs, seed)


def _rebuild_spread(spec: EnvSpec, config: Config, chunk_length: int, num_envs: int, seed: int) -> VecEnv:
    """Build environments of several tasks, each with its own horizon unless all had another one."""
    horizons = {task.horizon for task in spec.tasks}
    changes: dict[str, Any] = {"tasks": [task.name for task in spec.tasks], "env_meta": None}
    changes |= {"horizon": horizons.pop() if len(horizons) == 1 else None, "obs_keys": list(spec.obs_keys) or None}
    changes |= {"n_obs_steps": spec.n_obs_steps} | spec.rendered_with
    if not all(task.name in TOYS for task in spec.tasks):  # whose camera needs no key
        changes |= read_cameras(spec.obs) | read_sizes(spec.obs)
    return make_vec_env(config.env.model_copy(update=changes), chunk_length, num_envs, seed)


def _check_same(env: VecEnv, file: PolicyFile) -> None:
    """Refuse another environment than the policy was made for, such as that of a newer version of a package.

    Raises:
        CheckpointError: Observations or actions have other sizes.
    """
    made_for, built = (_describe_sizes(spec) for spec in (file.env_spec, env.simulator_spec))
    if made_for != built:
        raise CheckpointError(f"{file.path}: made for an environment of {made_for}; what it names has {built}")


def _describe_sizes(spec: EnvSpec) -> str:
    shapes = {key: list(field.shape) for key, field in sorted(spec.obs.items())}
    return f"observations {shapes} and actions of {spec.action_dim}"
