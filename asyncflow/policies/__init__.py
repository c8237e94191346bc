"""Policies: what decides, evaluates its decisions again, and is trained."""

from __future__ import annotations

import torch

from asyncflow.config import PolicyConfig
from asyncflow.errors import ConfigError
from asyncflow.policies.base import Policy
from asyncflow.policies.flow import FlowPolicy
from asyncflow.policies.gaussian import GaussianPolicy
from asyncflow.policies.image_encoder import Shapes
from asyncflow.seeding import derive_seed

__all__ = ["FlowPolicy", "GaussianPolicy", "Policy", "make_policy"]


def make_policy(
    config: PolicyConfig, obs_shapes: Shapes, action_dim: int, seed: int, image_shapes: Shapes | None = None
) -> Policy:
    """Build a policy on the CPU; its weights depend on `config`, the shapes and `seed` alone.

    Args:
        config: What to build.
        obs_shapes: Shape of every observation without the batch dimension; `state` must be a vector, or a history.
        action_dim: Size of one action.
        seed: The run's seed.
        image_shapes: Camera -> `(3, height, width)`, with n_obs_steps in front for a history.

    Raises:
        ConfigError: The observations have no `state` vector, `config` is an impossible combination, or an
            image is too small for its encoder.
    """
    if len(obs_shapes.get("state", ())) not in (1, 2):
        raise ConfigError(
            f"policy.kind = {config.kind} needs a vector observation named `state`, got {obs_shapes}; see env.obs_keys"
        )
    build = FlowPolicy if config.kind == "flow" else GaussianPolicy
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also reseed CUDA, which the fork does not restore.
        torch.default_generator.manual_seed(derive_seed(seed, "init"))
        return build(config, obs_shapes, action_dim, image_shapes or {})
