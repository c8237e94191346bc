"""Policies: what decides, evaluates its decisions again, and is trained."""

from __future__ import annotations

import torch

from asyncflow.config import PolicyConfig
from asyncflow.errors import ConfigError
from asyncflow.policies.base import Policy
from asyncflow.policies.flow import FlowPolicy
from asyncflow.policies.gaussian import GaussianPolicy
from asyncflow.seeding import derive_seed

__all__ = ["FlowPolicy", "GaussianPolicy", "Policy", "make_policy"]


def make_policy(config: PolicyConfig, obs_shapes: dict[str, tuple[int, ...]], action_dim: int, seed: int) -> Policy:
    """Build a policy on the CPU; its weights depend on `config`, the shapes and `seed` alone.

    Args:
        config: What to build.
        obs_shapes: Shape of every observation without the batch dimension; `state` must be a vector.
        action_dim: Size of one action.
        seed: The run's seed.

    Raises:
        ConfigError: The observations have no `state` vector, or `config` is an impossible combination.
    """
    shape = obs_shapes.get("state", ())
    if len(shape) != 1:
        raise ConfigError(
            f"policy.kind = {config.kind} needs a vector observation named `state`, got {obs_shapes}; see env.obs_keys"
        )
    build = FlowPolicy if config.kind == "flow" else GaussianPolicy
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also reseed CUDA, which the fork does not restore.
        torch.default_generator.manual_seed(derive_seed(seed, "init"))
        return build(config, shape[0], action_dim)
