"""The parts of a run, built from its configuration and, where it goes on, from its checkpoint: environments, policy.

Which environment is simulated is decided here, and whether a policy fits it. How rollouts are collected or trained is
none of this module's business.
"""

from __future__ import annotations

from typing import Any

import torch

from asyncflow.config.lerobot_folder import KIND as LEROBOT
from asyncflow.config.lerobot_folder import with_export
from asyncflow.config.observations import read_cameras, read_sizes
from asyncflow.config.sections import Config, PolicyConfig
from asyncflow.envs import make_vec_env
from asyncflow.envs.base import EnvOrigin, VecEnv
from asyncflow.envs.mapping import NameMapping
from asyncflow.envs.source import adopt_environment, restore_environment, tell_change, tell_edit
from asyncflow.errors import CheckpointError, ConfigError
from asyncflow.policies import make_policy
from asyncflow.policies.base import Policy, is_scaled, scale_actions
from asyncflow.policies.policy_file import (
    FILE_NAME,
    PolicyFile,
    check_tensors,
    load_into,
    load_policy_file,
    read_env_spec,
    resolve_checkpoint,
)
from asyncflow.policies.vla.foreign import without_weights
from asyncflow.run.checkpoint import Checkpoint
from asyncflow.seeding import derive_seed
from asyncflow.simulators.spec import EnvSpec


def settle_environment(config: Config, resumed: Checkpoint | None = None) -> Config:
    """Return the configuration with the environment that the run simulates; see `env_source`."""
    if resumed is not None:
        env = restore_environment(config.env, read_env_spec(resumed.path / FILE_NAME))
    else:
        start = read_start(config)
        env = config.env if start is None else adopt_environment(config.env, start.env_spec)
    return config.model_copy(update={"env": env})


def tell_environment(config: Config, resumed: Checkpoint | None = None) -> str | None:
    """Return a line for the user if `env.env_meta` and a policy file describe different environments."""
    if resumed is not None:
        return tell_edit(config.env, read_env_spec(resumed.path / FILE_NAME))
    start = read_start(config)
    return None if start is None else tell_change(config.env, start.env_spec)


def build_env(config: Config, purpose: str, num_envs: int) -> VecEnv:
    """Return environments in the simulator's names; `purpose` keeps the seeds of training and evaluation apart."""
    env = make_vec_env(config.env, config.policy.n_action_steps, num_envs, derive_seed(config.trainer.seed, purpose))
    env.origin = EnvOrigin(config.env, config.trainer.seed)
    return env


def build_policy(
    config: Config, mapping: NameMapping, device: torch.device, resumed: Checkpoint | None = None
) -> Policy:
    """Return the policy that training starts from or goes on with, on `device`.

    Args:
        config: The run.
        mapping: `policy.mapping` for the environments that the policy is to act in.
        device: Where the policy is to be.
        resumed: Where the run goes on.

    Raises:
        ConfigError: The policy's keys do not fit together.
        CheckpointError: `policy.checkpoint` does not exist or does not fit.
    """
    policy_config = without_weights(with_export(config.policy, resumed.path)) if resumed else config.policy
    file = None if resumed else read_start(config)
    stored = resumed.policy if resumed else file.tensors if file else None
    num_stored = None if stored is None else sum(tensor.numel() for tensor in stored.values())
    policy = make_policy(policy_config, mapping.spec, config.trainer.seed, num_stored=num_stored)
    if resumed is not None:
        check_tensors(policy.state_dict(), resumed.policy, str(resumed.path))
        policy.load_state_dict(resumed.policy)
    elif file is not None:
        _check_origin(config.policy, file, mapping)
        load_into(policy, file)
    else:
        scale_untrained(policy, mapping.spec, config.policy)
    policy.anneal(resumed.state.updates if resumed else 0)
    policy.made_from = config.policy
    return policy.to(device)


def scale_untrained(policy: Policy, seen: EnvSpec, config: PolicyConfig) -> None:
    """Scale the actions of a policy that no file scales; `seen` is in the model's names."""
    scale_actions(policy, seen.action_limits)
    is_unlimited = not all(bool(limit.isfinite().all()) for limit in seen.action_limits)
    if is_unlimited and seen.env_meta and "policy.mapping.action" not in config.mapping.parts and is_scaled(policy):
        raise ConfigError(
            f"policy.checkpoint = {config.checkpoint}: the environment's controller takes absolute targets, whose "
            "range only demonstrations tell; give a policy that `asyncflow pretrain` made of them"
        )


def read_start(config: Config) -> PolicyFile | None:
    """Return the file whose weights a run starts from; None from scratch, or where LeRobot's folder gives them."""
    name = config.policy.checkpoint
    return load_policy_file(resolve_checkpoint(name)) if name and config.policy.kind != LEROBOT else None


def _check_origin(config: PolicyConfig, file: PolicyFile, mapping: NameMapping) -> None:
    """Refuse a policy that was made for other observations or actions: a network takes any of the right size."""
    name = f"policy.checkpoint = {config.checkpoint}"
    for key, value in file.mapping.parts.items():
        if key not in config.mapping.parts:
            raise CheckpointError(f"{name}: made with {key} = {value}, which the run leaves out")
    obs_keys = mapping.source.obs_keys
    if config.mapping.obs.state is None and file.env_spec.obs_keys != obs_keys:
        raise CheckpointError(
            f"{name}: made for env.obs_keys = {list(file.env_spec.obs_keys)}, the run has {list(obs_keys)}"
        )
    what = "images" if config.mapping.obs.images is not None else "env.cameras"
    seen, shown = (_describe_cameras(each.spec, what) for each in (file.mapping, mapping))
    if seen != shown:
        raise CheckpointError(f"{name}: made for {seen}; the run has {shown}")


def _describe_cameras(spec: EnvSpec, what: str) -> str:
    cameras = {f"env.{key}": names for key, names in read_cameras(spec.obs).items()}
    keys: dict[str, Any] = {what: cameras.pop("env.cameras")}
    keys |= {f"env.{key}": value for key, value in read_sizes(spec.obs).items()}
    keys["env.n_obs_steps"] = spec.n_obs_steps
    keys |= {key: names for key, names in cameras.items() if names}
    keys |= {f"env.{key}": value for key, value in sorted(spec.rendered_with.items())}
    return ", ".join(f"{key} = {value}" for key, value in keys.items())
